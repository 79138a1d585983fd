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

/// Lets every other thread and process have processor and disk before the calling thread. Best
/// effort: what fails makes it more of a nuisance, not wrong.
pub fn step_back() {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_IDLE: libc::c_int = 3 << 13;
    // SAFETY: both take numbers only; 0 is the calling thread.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE);
    }
}
