//! Layers point down: who may import whom, held by scanning the sources.
//!
//! The scanner knows tokens, not types: comments and literals are blanked, then every path that starts
//! with `crate` (or climbs to it by `super`) names a folder of `src/`. Unit tests inside the sources
//! are left out, because a test may build its input with a higher layer; `unsafe` is looked for in
//! them too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A folder of `src/` and the folders it may import, itself aside.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("sys", &["base"]),
    ("format", &["base"]),
    ("codec", &["base"]),
    ("net", &["base"]),
    ("telemetry", &["base"]),
    ("oci", &["base", "codec", "net"]),
    ("image", &["base", "format", "sys"]),
    ("blob", &["base", "format", "codec"]),
    ("source", &["base", "sys", "net", "telemetry"]),
    ("cache", &["base", "sys", "codec", "telemetry", "blob", "source"]),
    ("build", &["base", "sys", "format", "codec", "image", "blob"]),
    // `build` only to lift bootstraps of RAFS v5, whose trees it lays out as those it builds.
    ("reader", &["base", "sys", "format", "codec", "image", "blob", "source", "build"]),
    ("tools", &["base", "sys", "format", "codec", "image", "blob", "source", "reader", "build"]),
    // `format` only to write the image of a few hundred bytes with which a host is tried out.
    ("export", &["base", "sys", "format", "telemetry", "image", "cache"]),
    ("credentials", &["base", "sys", "net"]),
    (
        "daemon",
        &[
            "base",
            "sys",
            "codec",
            "net",
            "oci",
            "telemetry",
            "credentials",
            "image",
            "blob",
            "source",
            "reader",
            "cache",
            "export",
        ],
    ),
    (
        "cli",
        &[
            "base",
            "sys",
            "format",
            "codec",
            "net",
            "oci",
            "telemetry",
            "credentials",
            "image",
            "blob",
            "source",
            "reader",
            "cache",
            "build",
            "tools",
            "export",
            "daemon",
        ],
    ),
];

/// The one folder that may say `unsafe`.
const UNSAFE_HOME: &str = "sys";

#[test]
fn every_import_is_in_the_table() {
    let mut wrong = Vec::new();
    for file in sources() {
        let text = std::fs::read_to_string(&file.path).expect("a readable source file");
        let Some(folder) = file.module.first() else { continue };
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| name == folder) else {
            wrong.push(format!("{}: `{folder}` is not in the table", file.path.display()));
            continue;
        };
        for import in imports(&text, &file.module) {
            if import != *folder && !allowed.contains(&import.as_str()) {
                wrong.push(format!("{}: `{folder}` may not import `{import}`", file.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_folder_of_the_table_exists() {
    let folders: BTreeSet<_> = sources().into_iter().filter_map(|file| file.module.into_iter().next()).collect();
    let table: BTreeSet<_> = MAY_IMPORT.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(folders, table);
}

#[test]
fn unsafe_is_said_in_one_folder_only() {
    let mut wrong = Vec::new();
    for file in sources() {
        let text = std::fs::read_to_string(&file.path).expect("a readable source file");
        if file.module.first().is_none_or(|folder| folder != UNSAFE_HOME) && tokens(&text).contains(&"unsafe".into()) {
            wrong.push(file.path.display().to_string());
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn the_crate_root_re_exports_nothing() {
    // A re-export there would be a door around the table.
    let text = std::fs::read_to_string(source_dir().join("lib.rs")).expect("src/lib.rs");
    assert!(!tokens(&text).contains(&"use".into()));
}

#[test]
fn the_scanner_finds_every_way_to_write_an_import() {
    let check = |text: &str, expected: &[&str]| {
        let found = imports(text, &["cache".into(), "store".into()]);
        assert_eq!(found, expected.iter().map(|name| (*name).to_owned()).collect(), "{text}");
    };

    check("use crate::export::choose;", &["export"]);
    check("use crate::{base::id, export::{self, host}, sys};", &["base", "export", "sys"]);
    check("use crate::{\n    self as root,\n    r#net::x,\n};", &["net", "self"]);
    check("fn f() -> crate :: daemon :: X { crate::base::y() }", &["base", "daemon"]);
    check("use super::super::cli::run;", &["cli"]);
    check("use super::super::{cli, base::x};", &["base", "cli"]);
    check("mod inner { use super::super::super::cli; use super::device; }", &["cli"]);
    check("use super::device; use self::x; use std::io;", &[]);
    check("use crate::*;", &["*"]);
    check("macro_rules! m { () => { $crate::export::x() } }", &["export"]);
    check("pub(crate) fn f() {} pub(in crate::cache) fn g() {}", &["cache"]);
}

#[test]
fn the_scanner_skips_comments_literals_and_unit_tests_and_nothing_after_them() {
    let check = |text: &str| {
        let text = format!("{text}\nuse crate::sys;");
        assert_eq!(imports(&text, &["image".into()]), BTreeSet::from(["sys".to_owned()]), "{text}");
    };

    check("// crate::cli::x\n//! crate::cli\n/* crate::cli /* nested */ crate::cli */");
    check(r##"const A: &str = "crate::cli \" crate::cli"; const B: &str = r#"crate::cli " x"#;"##);
    check(r"const C: (char, char, u8) = ('\'', '{', b'}'); fn f<'a>(x: &'a str) {}");
    check("#[cfg(test)]\nmod tests { use crate::cli; fn f() { if x { crate::cli::y() } } }");
    check("#[cfg(test)]\n#[expect(dead_code)]\npub(crate) mod tests { use crate::cli; }");
}

#[test]
fn the_scanner_tells_the_unsafe_keyword_from_names_and_words() {
    assert!(tokens("fn f() { unsafe { g() } }").contains(&"unsafe".into()));
    assert!(!tokens("// unsafe\n#![deny(unsafe_code)]\nlet s = \"unsafe\";").contains(&"unsafe".into()));
}

struct Source {
    path: PathBuf,
    /// Its module path: empty for the crate root, `["cache", "store"]` for `src/cache/store.rs`.
    module: Vec<String>,
}

fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every Rust file below `src/`.
fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    let mut dirs = vec![source_dir()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).expect("a readable source directory") {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(Source { module: module(&path), path });
            }
        }
    }
    assert!(found.len() > MAY_IMPORT.len(), "the sources were not found");
    found
}

fn module(path: &Path) -> Vec<String> {
    let relative = path.strip_prefix(source_dir()).expect("a path below src").with_extension("");
    let mut parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod")
        || matches!(parts.as_slice(), [one] if one == "lib" || one == "main")
    {
        parts.pop();
    }
    parts
}

/// Names that follow the crate's root in the paths of a file whose module path is `module`.
fn imports(text: &str, module: &[String]) -> BTreeSet<String> {
    let tokens = tokens(text);
    let mut found = BTreeSet::new();
    // Brace depths at which inline modules opened: each is one `super` further from the root.
    let mut inline = Vec::new();
    let mut depth = 0;
    let mut at = 0;
    while at < tokens.len() {
        match tokens[at].as_str() {
            "#" if tokens[at..].starts_with(&["#", "[", "cfg", "(", "test", ")", "]"].map(String::from)) => {
                at = after_item(&tokens, at + 7);
                continue;
            }
            "{" => {
                depth += 1;
                if at >= 2 && tokens[at - 2] == "mod" {
                    inline.push(depth);
                }
            }
            "}" => {
                inline.pop_if(|opened| *opened == depth);
                depth -= 1;
            }
            "crate" => found.extend(names_after(&tokens, at + 1)),
            "super" => {
                let steps = tokens[at..].chunks(2).take_while(|pair| *pair == ["super", "::"]).count();
                if steps == module.len() + inline.len() {
                    found.extend(names_after(&tokens, at + 2 * steps - 1));
                }
                at += 2 * steps.max(1) - 1;
            }
            _ => {}
        }
        at += 1;
    }
    found
}

/// What stands after the `::` at `at`: one name, or the first names of a group's members.
fn names_after(tokens: &[String], at: usize) -> Vec<String> {
    let rest = match &tokens[at.min(tokens.len())..] {
        [colons, rest @ ..] if colons == "::" => rest,
        _ => return Vec::new(),
    };
    if rest.first().is_none_or(|first| first != "{") {
        return rest.first().cloned().into_iter().collect();
    }
    let mut names = Vec::new();
    let mut depth = 0;
    for pair in rest.windows(2) {
        match pair[0].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if depth == 1 && (pair[0] == "{" || pair[0] == ",") && pair[1] != "}" {
            names.push(pair[1].clone());
        }
    }
    names
}

/// The index after the item that starts at `at`: its closing brace or semicolon.
fn after_item(tokens: &[String], at: usize) -> usize {
    let mut depth = 0_i32;
    for (index, token) in tokens.iter().enumerate().skip(at) {
        match token.as_str() {
            "{" | "(" | "[" => depth += 1,
            ")" | "]" => depth -= 1,
            "}" => {
                depth -= 1;
                if depth == 0 {
                    return index + 1;
                }
            }
            ";" if depth == 0 => return index + 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Words, `::` and single signs; without comments, blanks, and the insides of literals.
fn tokens(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest) {
            length
        } else if first == '"' {
            quoted(rest, '"')
        } else if rest.starts_with("b\"") || rest.starts_with("c\"") {
            1 + quoted(&rest[1..], '"')
        } else if rest.starts_with("b'") {
            1 + quoted(&rest[1..], '\'')
        } else if first == '\'' {
            // A lifetime is a quote and a word with no quote after its first letter.
            let mut after = rest[1..].chars();
            let (one, two) = (after.next(), after.next());
            if one == Some('\\') || two == Some('\'') { quoted(rest, '\'') } else { 1 }
        } else if first.is_alphanumeric() || first == '_' {
            let word = rest.strip_prefix("r#").unwrap_or(rest);
            let length = word.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(word.len());
            found.push(word[..length].to_owned());
            rest.len() - word.len() + length
        } else if rest.starts_with("::") {
            found.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                found.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    found
}

/// Length of the block comment that `text` starts with; they nest.
fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let two = &text.as_bytes()[at..text.len().min(at + 2)];
        match two {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// Length of the raw string that `text` starts with, if it does.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let inside = body[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&end)? + end.len();
    Some(text.len() - inside.len() + length)
}

/// Length of the literal that `text` starts with, which ends at the next `quote` without a backslash.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}
