//! Prefetch, as JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::hex;
use crate::cache::PrefetchStats;

/// What to fetch before anybody asks.
///
/// In JSON `"none"`, `"hints"`, `"all"` or `{"files": [...]}`; `true` is read as `"all"` and `false` as
/// `"none"`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", from = "Spelled")]
pub enum PrefetchOrder {
    None,
    /// What the image's own prefetch table names, in its order.
    #[default]
    Hints,
    /// The same first, and then everything else, blob by blob.
    All,
    /// Files and parts of files, in this order.
    Files(Vec<FileRanges>),
}

impl PrefetchOrder {
    /// In one word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Hints => "hints",
            Self::All => "all",
            Self::Files(_) => "files",
        }
    }
}

/// The ways to write a [`PrefetchOrder`].
#[derive(Deserialize)]
#[serde(untagged)]
enum Spelled {
    Everything(bool),
    Order(Word),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    None,
    Hints,
    All,
    Files(Vec<FileRanges>),
}

impl From<Spelled> for PrefetchOrder {
    fn from(spelled: Spelled) -> Self {
        match spelled {
            Spelled::Everything(false) | Spelled::Order(Word::None) => Self::None,
            Spelled::Everything(true) | Spelled::Order(Word::All) => Self::All,
            Spelled::Order(Word::Hints) => Self::Hints,
            Spelled::Order(Word::Files(files)) => Self::Files(files),
        }
    }
}

/// A path of an image and the parts of the file that are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRanges {
    /// From the image's root. A directory means everything in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The same in hexadecimal digits, for a path that is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
    /// Offset and length in bytes of the parts; all of the file if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<(u64, u64)>,
}

impl FileRanges {
    /// Parts of the file at `path`.
    pub fn new(path: &[u8], ranges: Vec<(u64, u64)>) -> Self {
        match str::from_utf8(path) {
            Ok(text) => Self { path: Some(text.to_owned()), path_hex: None, ranges },
            Err(_) => Self { path: None, path_hex: Some(hex(path)), ranges },
        }
    }

    /// The path, if there is exactly one that makes sense.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match (&self.path, &self.path_hex) {
            (Some(path), None) => Some(path.clone().into_bytes()),
            (None, Some(digits)) => unhex(digits),
            _ => None,
        }
    }
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let nibble = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(nibble(*high)? << 4 | nibble(*low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

/// Which mounted image is meant: exactly one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefetchTarget {
    /// Mount point, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// SHA-256 of the bootstrap, or the first digits of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// `POST /v1/prefetch`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefetchRequest {
    /// Whose data.
    pub target: PrefetchTarget,
    pub order: PrefetchOrder,
}

/// One prefetch, under way or ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrefetchReport {
    /// Unique while the daemon runs.
    pub id: u64,
    /// Where the image is mounted.
    pub dir: PathBuf,
    /// SHA-256 of the bootstrap.
    pub image: String,
    /// `hints`, `all` or `files`.
    pub order: String,
    /// What in the order leads nowhere, at most 16.
    pub remarks: Vec<String>,
    #[serde(flatten)]
    pub stats: PrefetchStats,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_in_every_spelling_and_written_in_one() {
        let files = PrefetchOrder::Files(vec![FileRanges::new(b"/a\xff", vec![(0, 4096)])]);
        for (text, order, written) in [
            ("true", PrefetchOrder::All, "\"all\""),
            ("false", PrefetchOrder::None, "\"none\""),
            ("\"hints\"", PrefetchOrder::Hints, "\"hints\""),
            (
                r#"{"files": [{"path_hex": "2F61ff", "ranges": [[0, 4096]]}]}"#,
                files,
                r#"{"files":[{"path_hex":"2f61ff","ranges":[[0,4096]]}]}"#,
            ),
        ] {
            let read: PrefetchOrder = serde_json::from_str(text).unwrap();
            let same = match (&read, &order) {
                (PrefetchOrder::Files(read), PrefetchOrder::Files(order)) => read[0].bytes() == order[0].bytes(),
                _ => read == order,
            };
            assert!(same, "{text}: {read:?}");
            assert_eq!(serde_json::to_string(&order).unwrap(), written);
        }
        for bad in ["\"most\"", "1", r#"{"files": [{"path": "/a", "size": 1}]}"#] {
            assert!(serde_json::from_str::<PrefetchOrder>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_path_is_given_once() {
        let both = FileRanges { path: Some("/a".into()), path_hex: Some("2f".into()), ranges: Vec::new() };
        assert_eq!(both.bytes(), None);
        assert_eq!(FileRanges::default().bytes(), None);
        assert_eq!(FileRanges { path_hex: Some("2f6".into()), ..FileRanges::default() }.bytes(), None);
        assert_eq!(FileRanges { path_hex: Some("2f6z".into()), ..FileRanges::default() }.bytes(), None);
    }
}
