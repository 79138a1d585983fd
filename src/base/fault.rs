/// What a failure means for whoever may try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The same request may well succeed soon: a time-out, a reset connection, a busy server.
    Transient,
    /// Repeating the request cannot help: not found, not allowed, not supported.
    Permanent,
    /// Bytes arrived and are wrong.
    Corrupt,
    /// Nobody wants the answer any more.
    Cancelled,
}
