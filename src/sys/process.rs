//! What a long-lived process asks of the system about itself.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Makes the process deaf to the signals that stop a service or a terminal job. `SIGKILL` stays.
pub fn ignore_stop_signals() -> io::Result<()> {
    for name in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        // SAFETY: ignoring a signal installs no handler, so no code runs in signal context.
        unsafe { signal(name, SigHandler::SigIgn)? };
    }
    Ok(())
}

/// Leaves the terminal and process group of whoever started this process.
pub fn leave_session() -> io::Result<()> {
    nix::unistd::setsid()?;
    Ok(())
}

/// Gives the process a name of its own in `ps` and `top`; at most 15 bytes are kept.
pub fn set_name(name: &std::ffi::CStr) {
    // Only a bad pointer could make this fail.
    let _ = nix::sys::prctl::set_name(name);
}

/// Allows as many open descriptors as the hard limit does: each waiting reader costs one.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Asks the kernel to take other processes first when memory runs out: readers of many containers
/// wait for this one. Best effort, because it needs privilege in the process's own namespace.
pub fn protect_from_oom() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
}
