//! What people and scripts write for the command line: lists of what to fetch first, patterns, ranges
//! of ids. An input is one byte, which of them; and the text.

use rafsd::build::{IdRange, Pattern, PrefetchHints};
use rafsd::tools::hotlist;

/// Paths that a pattern is asked about.
const PATHS: [&[&[u8]]; 5] =
    [&[b"a"], &[b"a", b"b"], &[b"usr", b"lib", b"x.so"], &[b"]", b"\\", b"**"], &[b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"]];

/// The input for a text; `list` as in [`read`].
pub fn pack(list: u8, text: &[u8]) -> Vec<u8> {
    [&[list], text].concat()
}

pub fn run(input: &[u8]) {
    let _ = read(input);
}

/// Whether the text means something.
pub fn read(input: &[u8]) -> bool {
    let Some((list, text)) = input.split_first() else { return false };
    match list % 4 {
        0 => {
            let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count();
            let ignored = PrefetchHints::parse(text).ignored();
            assert!(ignored <= lines, "a line is ignored once");
            ignored < lines
        }
        1 => {
            let hot = hotlist::parse(text);
            assert!(hot.iter().flatten().all(|hot| hot.path.starts_with(b"/")), "paths are absolute");
            hot.is_ok_and(|hot| !hot.is_empty())
        }
        2 => Pattern::new(text).is_ok_and(|pattern| {
            for path in PATHS {
                assert!(!pattern.matches(path, false) || pattern.matches(path, true), "a directory is an entry");
            }
            assert!(!pattern.matches(&[], true), "the root is never named");
            true
        }),
        _ => std::str::from_utf8(text).is_ok_and(|text| {
            let Ok(range) = text.parse::<IdRange>() else { return false };
            assert_eq!(range.to_string().parse(), Ok(range), "what is shown is read back");
            assert!(range.overlaps(&range));
            true
        }),
    }
}
