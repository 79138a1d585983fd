//! Lists of what is hot in an image, as people, scripts and tracing tools write them.
//!
//! Three forms, told apart by content:
//!
//! - **Text**: one absolute path per line, most urgent first. Blanks around it and empty lines are
//!   ignored. A line that ends in `:OFFSET+LENGTH[,OFFSET+LENGTH...]`, decimal numbers of bytes,
//!   always means parts of a file; a path that itself ends so is written in the next form.
//! - **JSON lines**: a line that starts with `{` is an object with `path`, or with `path_hex` for
//!   bytes that are no text, and `ranges`, pairs of offset and length. It may stand among text.
//! - **One JSON document**: `{"version":"v1","files":[{"path":"/a","ranges":[[0,4096]]}]}`.
//!
//! `ranges` missing or empty means all of the file. Unknown fields are ignored.

use serde::Deserialize;

use crate::build::HotPath;

/// Most bytes of a list.
pub const MAX_LIST: u64 = 64 << 20;
/// Most paths and ranges of a list together: a few bytes of JSON become many of memory.
const MAX_ITEMS: usize = 1 << 20;
/// Most objects and arrays in JSON: two for each path, one for each range, and those around them.
const MAX_BRACKETS: usize = 2 * MAX_ITEMS + 2;

/// Why a list cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HotListError {
    #[error("line {line} is not an absolute path: {text:?}")]
    NotAbsolute { line: usize, text: String },
    #[error("line {line}: {range:?} is not OFFSET+LENGTH, with both below 2^64")]
    Range { line: usize, range: String },
    #[error("line {line} is not one JSON object with path or path_hex, and ranges")]
    Json {
        line: usize,
        #[source]
        cause: serde_json::Error,
    },
    #[error("the list is one JSON document, but not of version and files with path or path_hex, and ranges")]
    Document(#[source] serde_json::Error),
    #[error("{0:?} is not an even number of hexadecimal digits")]
    Hex(String),
    #[error("the path {0:?} is not absolute")]
    Relative(String),
    #[error("version is {0:?}, \"v1\" is what is understood")]
    Version(String),
    #[error("there are more than {MAX_ITEMS} paths and ranges")]
    TooMany,
    #[error("the list is empty")]
    Empty,
}

/// Tells a document from everything else.
#[derive(Deserialize)]
struct HasFiles {
    #[serde(rename = "files")]
    _files: serde::de::IgnoredAny,
}

#[derive(Deserialize)]
struct Document {
    version: String,
    files: Vec<Entry>,
}

/// Offsets and lengths.
type Ranges = Vec<(u64, u64)>;

#[derive(Deserialize)]
struct Entry {
    path: Option<String>,
    path_hex: Option<String>,
    ranges: Option<Ranges>,
}

/// Reads a list of any form. At least one path is in it.
pub fn parse(list: &[u8]) -> Result<Vec<HotPath>, HotListError> {
    let hot = if serde_json::from_slice::<HasFiles>(list).is_ok() {
        bounded(list)?;
        document(serde_json::from_slice(list).map_err(HotListError::Document)?)?
    } else {
        lines(list)?
    };
    if hot.is_empty() { Err(HotListError::Empty) } else { Ok(hot) }
}

/// Refuses JSON that could become too much before its items are counted: what opens an object or
/// an array outside of strings, in unknown fields too.
fn bounded(json: &[u8]) -> Result<(), HotListError> {
    let (mut brackets, mut in_string, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => brackets += 1,
            _ => {}
        }
    }
    if brackets > MAX_BRACKETS { Err(HotListError::TooMany) } else { Ok(()) }
}

fn document(document: Document) -> Result<Vec<HotPath>, HotListError> {
    if document.version != "v1" {
        return Err(HotListError::Version(document.version));
    }
    let mut budget = MAX_ITEMS;
    document.files.into_iter().map(|entry| entry.hot(&mut budget)).collect()
}

fn lines(list: &[u8]) -> Result<Vec<HotPath>, HotListError> {
    let (mut hot, mut budget) = (Vec::new(), MAX_ITEMS);
    for (line, text) in (1..).zip(list.split(|byte| *byte == b'\n')) {
        match text.trim_ascii() {
            [] => {}
            json @ [b'{', ..] => {
                bounded(json)?;
                let entry: Entry = serde_json::from_slice(json).map_err(|cause| HotListError::Json { line, cause })?;
                hot.push(entry.hot(&mut budget)?);
            }
            text @ [b'/', ..] => {
                let (path, ranges) = split(text, line)?;
                hot.push(counted(HotPath { path: path.to_vec(), ranges }, &mut budget)?);
            }
            text => return Err(HotListError::NotAbsolute { line, text: shortened(text) }),
        }
    }
    Ok(hot)
}

impl Entry {
    fn hot(self, budget: &mut usize) -> Result<HotPath, HotListError> {
        let path = match (self.path, self.path_hex) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(digits)) => unhex(&digits).ok_or_else(|| HotListError::Hex(shortened(digits.as_bytes())))?,
            _ => return Err(HotListError::Relative(String::new())),
        };
        if !path.starts_with(b"/") {
            return Err(HotListError::Relative(shortened(&path)));
        }
        counted(HotPath { path, ranges: self.ranges.unwrap_or_default() }, budget)
    }
}

fn counted(hot: HotPath, budget: &mut usize) -> Result<HotPath, HotListError> {
    *budget = budget.checked_sub(1 + hot.ranges.len()).ok_or(HotListError::TooMany)?;
    Ok(hot)
}

/// A path and the ranges behind it, if what stands behind the last colon looks like ranges.
fn split(text: &[u8], line: usize) -> Result<(&[u8], Ranges), HotListError> {
    let whole = Ok((text, Vec::new()));
    let Some(colon) = text.iter().rposition(|byte| *byte == b':') else { return whole };
    let (path, behind) = (&text[..colon], &text[colon + 1..]);
    let Ok(behind) = str::from_utf8(behind) else { return whole };
    let numbers = |range: &str| {
        let (offset, len) = range.split_once('+')?;
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (is_number(offset) && is_number(len)).then_some((offset.to_owned(), len.to_owned()))
    };
    let Some(pairs) = behind.split(',').map(numbers).collect::<Option<Vec<_>>>() else { return whole };
    let ranges = pairs.into_iter().map(|(offset, len)| {
        let wrong = || HotListError::Range { line, range: shortened(format!("{offset}+{len}").as_bytes()) };
        Ok((offset.parse().map_err(|_| wrong())?, len.parse().map_err(|_| wrong())?))
    });
    Ok((path, ranges.collect::<Result<_, _>>()?))
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let nibble = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(nibble(*high)? << 4 | nibble(*low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

/// Enough of what somebody wrote to find it again.
fn shortened(text: &[u8]) -> String {
    text[..text.len().min(80)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hot(path: &[u8], ranges: &[(u64, u64)]) -> HotPath {
        HotPath { path: path.to_vec(), ranges: ranges.to_vec() }
    }

    #[test]
    fn text_is_paths_with_ranges_only_where_all_of_the_end_is_ranges() {
        for (line, want) in [
            ("/a", hot(b"/a", &[])),
            ("  /a b\t\r", hot(b"/a b", &[])),
            ("/a:0+4096", hot(b"/a", &[(0, 4096)])),
            ("/a:0+1,7+18446744073709551615", hot(b"/a", &[(0, 1), (7, u64::MAX)])),
            ("/a:b:3+4", hot(b"/a:b", &[(3, 4)])),
            ("/a:", hot(b"/a:", &[])),
            ("/a:12", hot(b"/a:12", &[])),
            ("/a:1+2,", hot(b"/a:1+2,", &[])),
            ("/a:+1+2", hot(b"/a:+1+2", &[])),
            ("/a:1+2x", hot(b"/a:1+2x", &[])),
            (r#"{"path": "/a:1+2"}"#, hot(b"/a:1+2", &[])),
            (r#"{"path_hex": "2Fff0a", "ranges": [[1, 2]], "size": 3}"#, hot(b"/\xff\n", &[(1, 2)])),
        ] {
            assert_eq!(parse(line.as_bytes()).unwrap(), [want], "{line}");
        }
        assert_eq!(parse(b"/b\n\n/a\xff\n").unwrap(), [hot(b"/b", &[]), hot(b"/a\xff", &[])]);
    }

    #[test]
    fn a_document_may_span_lines() {
        let list =
            "{\"version\": \"v1\",\n \"files\": [\n{\"path\": \"/a\"},\n{\"path\": \"/b\", \"ranges\": [[0, 1]]}]}\n";
        assert_eq!(parse(list.as_bytes()).unwrap(), [hot(b"/a", &[]), hot(b"/b", &[(0, 1)])]);
    }

    #[test]
    fn brackets_within_strings_are_not_counted() {
        let brackets = "[".repeat(MAX_BRACKETS + 1);
        for (json, sound) in [
            (format!(r#"{{"path":"/{brackets}"}}"#), true),
            (format!(r#"{{"path":"/\\\"{brackets}"}}"#), true),
            (format!(r#"{{"path":"/\\"{brackets}}}"#), false),
        ] {
            assert_eq!(bounded(json.as_bytes()).is_ok(), sound, "{}", &json[..20]);
        }
        let ranges = |count| "[0,1],".repeat(count);
        let entry = |count: usize| format!(r#"{{"path":"/a","ranges":[{}[0,1]]}}"#, ranges(count - 1));
        assert_eq!(parse(entry(MAX_ITEMS - 1).as_bytes()).unwrap()[0].ranges.len(), MAX_ITEMS - 1);
        assert!(matches!(parse(entry(MAX_ITEMS).as_bytes()), Err(HotListError::TooMany)));
    }

    #[test]
    fn lists_that_mean_nothing_are_refused_by_line() {
        for (list, want) in [
            ("", "the list is empty"),
            (" \n\n", "the list is empty"),
            (r#"{"version":"v1","files":[]}"#, "the list is empty"),
            (r#"{"version":"v2","files":[]}"#, "version is \"v2\", \"v1\" is what is understood"),
            (
                r#"{"version":"v1","files":[{"path":1}]}"#,
                "the list is one JSON document, but not of version and files with path or path_hex, and ranges",
            ),
            ("/a\nb\n", "line 2 is not an absolute path: \"b\""),
            (
                "/a:1+99999999999999999999",
                "line 1: \"1+99999999999999999999\" is not OFFSET+LENGTH, with both below 2^64",
            ),
            ("/a\n{\"path\":", "line 2 is not one JSON object with path or path_hex, and ranges"),
            (r#"{"path":"a"}"#, "the path \"a\" is not absolute"),
            (r#"{"path_hex":"2f6"}"#, "\"2f6\" is not an even number of hexadecimal digits"),
            (r#"{"path":"/a","ranges":[[-1,2]]}"#, "line 1 is not one JSON object with path or path_hex, and ranges"),
        ] {
            assert_eq!(parse(list.as_bytes()).unwrap_err().to_string(), want, "{list}");
        }
    }
}
