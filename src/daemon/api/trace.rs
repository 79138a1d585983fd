//! Traces, as JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::PrefetchTarget;

/// `POST /v1/trace`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceRequest {
    /// Whose reads.
    pub target: PrefetchTarget,
    /// Where whoever stops the trace is to write it, an absolute path. The daemon only remembers it.
    #[serde(default)]
    pub output: Option<PathBuf>,
}

/// A trace under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TraceReport {
    /// Where the image is mounted.
    pub dir: PathBuf,
    /// Where to write the trace.
    pub output: Option<PathBuf>,
    /// Ranges recorded so far.
    pub reads: usize,
    /// Reads that came when the trace was full.
    pub lost: u64,
    /// Blobs whose reads do not reach the daemon, because all of each was in the cache when the image
    /// was mounted.
    pub unseen: Vec<String>,
}

/// Answer to `DELETE /v1/trace`: what was recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TraceResult {
    #[serde(flatten)]
    pub report: TraceReport,
    /// Files and parts of them, in the order of their first access; see docs/TRACE.md.
    pub list: String,
    /// Bytes that were read and belong to no file of this image: another one shares the blob.
    pub unmapped_bytes: u64,
}
