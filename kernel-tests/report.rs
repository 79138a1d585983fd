//! Report lines and their sum.
//!
//! The lines of the guest's harness are counted by the host's, so writing and reading them is one
//! module. What a case printed is indented, and can therefore never be taken for a report line.

use std::fmt;
use std::time::Duration;

use crate::Way;

/// How a case ended.
#[derive(Debug)]
pub(crate) enum Verdict {
    Passed,
    /// In one line why, and what the case printed.
    Failed {
        reason: String,
        output: String,
    },
    Skipped(String),
}

/// Counts of verdicts. Displays as the closing line of a test program.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) skipped: u32,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Tally {
    /// Prints a verdict and counts it.
    pub(crate) fn report(&mut self, name: &str, way: Way, verdict: &Verdict, elapsed: Option<Duration>) {
        let took = elapsed.map(|t| format!(" {:.1}s", t.as_secs_f64())).unwrap_or_default();
        match verdict {
            Verdict::Passed => {
                self.passed += 1;
                println!("ok {name} [{way}]{took}");
            }
            Verdict::Failed { reason, output } => {
                self.failed += 1;
                println!("FAILED {name} [{way}]{took}: {reason}");
                output.lines().for_each(|line| println!("    {line}"));
            }
            Verdict::Skipped(reason) => {
                self.skipped += 1;
                println!("skipped {name} [{way}]: {reason}");
            }
        }
    }

    /// Counts a report line written by [`Tally::report`] elsewhere and returns its case; `None`, and no
    /// count, for any other line.
    pub(crate) fn count<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        let (word, rest) = line.split_once(' ')?;
        let (name, _) = rest.split_once(" [")?;
        match word {
            "ok" => self.passed += 1,
            "FAILED" => self.failed += 1,
            "skipped" => self.skipped += 1,
            _ => return None,
        }
        Some(name)
    }
}
