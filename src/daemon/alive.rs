//! Whether the daemon is well, for whoever has to restart it when it is not.

use std::time::Duration;

use super::Daemon;

/// Threads that answer the kernel and do not come round.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} did not answer within {:?}", .threads.join(" and "), .within)]
pub struct Stuck {
    /// Their names.
    pub threads: Vec<&'static str>,
    pub within: Duration,
}

impl Daemon {
    /// Asks every thread that answers the kernel to come round. Blocks for up to twice this time;
    /// to be called on the runtime's blocking threads, so that an answer says of them, too, that
    /// they are well.
    pub fn ensure_alive(&self, within: Duration) -> Result<(), Stuck> {
        let threads = self.backends.unresponsive(within);
        if threads.is_empty() { Ok(()) } else { Err(Stuck { threads, within }) }
    }
}
