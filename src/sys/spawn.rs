//! Starting a program whose command line was laid out beforehand.
//!
//! The keeper starts a daemon in place of one that died. It has no memory to ask for then, and it
//! ignores signals that a daemon must not ignore, so this is `posix_spawn` on arrays that were made
//! when there was still time.

use std::ffi::{CStr, CString, OsString};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;

use nix::unistd::Pid;

/// A command line, ready to be started.
#[derive(Debug)]
pub struct Prepared {
    /// Owns what `pointers` points to.
    words: Vec<CString>,
    /// Ends with null.
    pointers: Vec<*mut libc::c_char>,
}

// SAFETY: the pointers lead into `words`, which moves along with them and is never changed.
unsafe impl Send for Prepared {}

unsafe extern "C" {
    /// The environment of this process (`environ(7)`); not in the libc crate for every target.
    static environ: *const *mut libc::c_char;
}

impl Prepared {
    /// `words` are the program's path and its arguments.
    ///
    /// # Errors
    /// If there is no program, or a word holds a NUL byte.
    pub fn new(words: Vec<OsString>) -> io::Result<Self> {
        if words.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program is named"));
        }
        let words: Vec<CString> =
            words.into_iter().map(|word| CString::new(word.into_vec())).collect::<Result<_, _>>()?;
        let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr().cast_mut()).collect();
        pointers.push(std::ptr::null_mut());
        Ok(Self { words, pointers })
    }

    /// Starts it in a session of its own, with all signals as they are by default; with `program` in
    /// the place of the program that was named, if there is one.
    pub fn start(&self, program: Option<BorrowedFd<'_>>) -> io::Result<Pid> {
        // The child still has the descriptor when it looks for the program.
        let mut named = [0; 32];
        if let Some(program) = program {
            write!(&mut named[..31], "/proc/self/fd/{}", program.as_raw_fd())?;
        }
        let named = CStr::from_bytes_until_nul(&named).map_err(io::Error::other)?;
        let path = if program.is_some() { named } else { &self.words[0] };
        let check = |code: libc::c_int| if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) };
        let mut attributes = MaybeUninit::<libc::posix_spawnattr_t>::uninit();
        let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
        let mut pid = 0;
        // SAFETY: attributes and signals are set up before they are used and torn down after; the
        // strings are alive as long as `self`, and each array ends with null.
        unsafe {
            check(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
            libc::sigfillset(signals.as_mut_ptr());
            libc::posix_spawnattr_setsigdefault(attributes.as_mut_ptr(), signals.as_ptr());
            let flags = libc::c_int::from(libc::POSIX_SPAWN_SETSID) | libc::POSIX_SPAWN_SETSIGDEF;
            let flags = libc::c_short::try_from(flags).expect("two small flags");
            libc::posix_spawnattr_setflags(attributes.as_mut_ptr(), flags);
            let code = libc::posix_spawn(
                &raw mut pid,
                path.as_ptr(),
                std::ptr::null(),
                attributes.as_ptr(),
                self.pointers.as_ptr(),
                environ,
            );
            libc::posix_spawnattr_destroy(attributes.as_mut_ptr());
            check(code)?;
        }
        Ok(Pid::from_raw(pid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};

    #[test]
    fn a_program_starts_with_its_arguments_and_without_inherited_deafness() {
        let words = ["/bin/sh", "-c", "kill -TERM $$; exit 3"].map(OsString::from);
        let prepared = Prepared::new(words.into()).unwrap();
        let pid = prepared.start(None).unwrap();
        assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Signaled(_, nix::sys::signal::SIGTERM, _)));
    }

    #[test]
    fn another_program_can_take_the_place_of_the_one_that_was_named() {
        use std::os::fd::AsFd;
        let prepared = Prepared::new(["/nowhere/at/all", "-c", "exit 4"].map(OsString::from).into()).unwrap();
        let shell = std::fs::File::open(std::fs::canonicalize("/bin/sh").unwrap()).unwrap();
        let pid = prepared.start(Some(shell.as_fd())).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 4));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let prepared = Prepared::new(vec!["/nowhere/at/all".into()]).unwrap();
        assert_eq!(prepared.start(None).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(Prepared::new(vec![]).is_err());
    }
}
