//! What a long-lived process asks of the system about itself.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::files::inode_id_at;

/// Makes the process deaf to the signals that stop a service or a terminal job. `SIGKILL` stays.
pub fn ignore_stop_signals() -> io::Result<()> {
    for name in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        // SAFETY: ignoring a signal installs no handler, so no code runs in signal context.
        unsafe { signal(name, SigHandler::SigIgn)? };
    }
    Ok(())
}

/// Leaves the terminal and process group of whoever started this process, unless that was started outside of
/// them already, as keepers start their successors.
pub fn leave_session() -> io::Result<()> {
    match nix::unistd::setsid() {
        Err(nix::errno::Errno::EPERM) if nix::unistd::getsid(None) == Ok(nix::unistd::getpid()) => Ok(()),
        outcome => Ok(outcome.map(drop)?),
    }
}

/// A path at which this process, and its children that run the same, find this very program: another file may have its
/// name by now.
///
/// # Errors
/// `/proc` is not there.
pub fn own_program() -> io::Result<PathBuf> {
    const LINK: &str = "/proc/self/exe";
    let named = std::env::current_exe()?;
    let own = inode_id_at(Path::new(LINK))?;
    let is_own = inode_id_at(&named).is_ok_and(|found| found == own);
    Ok(if is_own { named } else { LINK.into() })
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

/// Whether something failed because this process, or all of them together, have as many files open as they may.
pub fn is_out_of_files(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// How many descriptors this process may have open now.
pub fn descriptor_limit() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// A copy of `fd` under a high number, out of the way of those that the kernel gives.
pub fn move_up(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let half = i32::try_from(descriptor_limit()? / 2).unwrap_or(1 << 20).min(1 << 20);
    let number = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(half))?;
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes the descriptor number `number`, so that the kernel gives it to nothing else until the
/// result is dropped. `None` if something has it already.
///
/// Only while no other thread opens anything: between look and taking, the number could go.
pub fn occupy(number: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: asks for a flag of a number, which may name nothing.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags >= 0 {
        return Ok(None);
    }
    let nothing = std::fs::File::open("/dev/null")?;
    if nothing.as_raw_fd() == number {
        return Ok(Some(nothing.into()));
    }
    // SAFETY: the number names nothing, as was just seen, so no descriptor is closed by this.
    let taken = unsafe { libc::dup3(nothing.as_raw_fd(), number, libc::O_CLOEXEC) };
    if taken < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(taken) }))
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
