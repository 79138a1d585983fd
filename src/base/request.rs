use std::fmt;

/// Names one request of the kernel in log lines, from the moment it is read to its answer.
///
/// Numbers begin with 1 in each daemon. 0 is work that no request asked for: prefetch, read-ahead, the
/// tables of a blob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl RequestId {
    /// Nobody in particular.
    pub const NONE: Self = Self(0);

    /// The request with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
