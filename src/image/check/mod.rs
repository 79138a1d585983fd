//! Whether a bootstrap is consistent: everything that can be said without opening a blob.
//!
//! [`check()`] looks at every table, every inode and every directory once and reports what it
//! finds; it does not stop at the first fault. What the kernel or the reference reader would refuse
//! or show wrongly is an *error*; what is only odd, wasteful or unknown to other readers is a
//! *remark* (`build-rules.md` section 7, `rafs-v6.md` section 14).
//!
//! The work is bounded by the length of the bootstrap: every byte that an inode takes up counts
//! against it, so inodes that lie over each other to look like more end the search. A bounded number
//! of findings is kept, the rest is counted.

mod chunks;
mod claims;
mod code;
mod tables;
mod tree;

#[cfg(test)]
mod tests;

pub use code::{Code, Severity};

use serde::Serialize;

use super::{Image, ImageError, Nid};

/// Findings that a report keeps; the others are only counted.
pub const MAX_FINDINGS: usize = 1000;

/// Characters that a finding keeps of each text; the longest paths are cut.
const MAX_TEXT: usize = 2048;

/// What [`check()`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The first [`MAX_FINDINGS`], in the order of the search.
    pub findings: Vec<Finding>,
    /// Number of errors, whether kept or not.
    pub errors: u64,
    /// Number of remarks, whether kept or not.
    pub remarks: u64,
    /// Paths seen, the root included.
    pub paths: u64,
    /// Inodes seen.
    pub inodes: u64,
    /// Chunk indexes seen in files.
    pub chunks: u64,
}

/// One fault or oddity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub code: Code,
    /// Which structure: a table with a row, or an inode with one of its paths.
    pub place: String,
    /// What is there, and what should be.
    pub detail: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { severity, code, place, detail } = self;
        write!(f, "{severity}[{code}] {place}: {detail}")
    }
}

impl Report {
    /// The report on a bootstrap that cannot even be opened.
    pub fn unusable(cause: &ImageError) -> Self {
        let mut report = Self::default();
        report.add(Code::Unusable, "bootstrap", || cause.to_string());
        report
    }

    /// Whether there is no error; remarks do not count.
    pub fn is_sound(&self) -> bool {
        self.errors == 0
    }

    /// Adds what another look at the same image found, behind what is here. Numbers of what was seen
    /// stay.
    pub fn absorb(&mut self, other: Self) {
        self.errors += other.errors;
        self.remarks += other.remarks;
        let room = MAX_FINDINGS.saturating_sub(self.findings.len());
        self.findings.extend(other.findings.into_iter().take(room));
    }

    /// Adds a finding. `detail` is made only if the finding is kept.
    pub fn add(&mut self, code: Code, place: impl ToString, detail: impl FnOnce() -> String) {
        match code.severity() {
            Severity::Error => self.errors += 1,
            Severity::Remark => self.remarks += 1,
        }
        if self.findings.len() < MAX_FINDINGS {
            let severity = code.severity();
            let [place, detail] = [place.to_string(), detail()].map(|text| text.chars().take(MAX_TEXT).collect());
            self.findings.push(Finding { severity, code, place, detail });
        }
    }

    /// Adds a finding unless `holds`.
    fn expect(&mut self, holds: bool, code: Code, place: impl ToString, detail: impl FnOnce() -> String) {
        if !holds {
            self.add(code, place, detail);
        }
    }
}

/// A structure as it is named in a finding; text only when one is made.
enum Place<'a> {
    /// Row of a table.
    Row(&'static str, u64),
    /// An inode, and the names that lead to it.
    Inode(Nid, &'a [&'a [u8]]),
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Row(table, number) => write!(f, "{table} {number}"),
            Self::Inode(nid, []) => write!(f, "inode {nid} /"),
            Self::Inode(nid, path) => {
                write!(f, "inode {nid} ")?;
                path.iter().try_for_each(|name| write!(f, "/{}", name.escape_ascii()))
            }
        }
    }
}

/// Looks at everything in `image`.
pub fn check(image: &Image) -> Report {
    let mut report = Report::default();
    tables::check(image, &mut report);
    let mut records = chunks::Records::check(image, &mut report);
    tree::check(image, &mut records, &mut report);
    records.report_unused(image, &mut report);
    report
}
