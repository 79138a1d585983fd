//! Places where a test may have this process killed.
//!
//! `RAFSD_FAULT_POINT=NAME:FILE` makes the process end by SIGKILL at the point NAME, once: whoever
//! removes FILE does it, so a daemon that is started again in the same environment lives.
//!
//! `RAFSD_PRETEND=NAME,NAME` has the process take the kernel for one that lacks something, so that what is done
//! then is tried on kernels that have it.
//!
//! Nothing of this is in a release build.

/// Reaches the point `name`.
#[cfg(not(debug_assertions))]
pub fn reach(_name: &str) {}

/// Reaches the point `name`.
#[cfg(debug_assertions)]
pub fn reach(name: &str) {
    use std::sync::OnceLock;

    static WANTED: OnceLock<Option<(String, std::path::PathBuf)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let setting = std::env::var("RAFSD_FAULT_POINT").ok()?;
        let (point, token) = setting.split_once(':')?;
        Some((point.to_owned(), token.into()))
    });
    if let Some((point, token)) = wanted
        && point == name
        && std::fs::remove_file(token).is_ok()
    {
        // SAFETY: a signal to this process itself, which ends it.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        // Whoever else runs here must not get any further either.
        loop {
            std::thread::park();
        }
    }
}

/// Whether the kernel is to be taken for one that is as `name` says.
#[cfg(not(debug_assertions))]
pub fn pretends(_name: &str) -> bool {
    false
}

/// Whether the kernel is to be taken for one that is as `name` says.
#[cfg(debug_assertions)]
pub fn pretends(name: &str) -> bool {
    std::env::var("RAFSD_PRETEND").is_ok_and(|names| names.split(',').any(|it| it == name))
}
