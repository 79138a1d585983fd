/// Why a range is wanted, most urgent first.
///
/// The order decides which queued work runs next and who may use the memory reserve: a reader
/// asleep in the kernel always goes before work nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody is asleep on these bytes.
    OnDemand,
    /// Nobody waits yet; a sequential reader is expected soon, or a blob is being completed.
    Prefetch,
}
