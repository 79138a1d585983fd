//! What a confined keeper may not do itself: start a daemon, and take mounts out of the tree.
//!
//! A filter of system calls and the rules for files pass on to whatever a confined thread starts, and
//! a daemon must be free to confine itself its own way. So threads are started before the keeper
//! confines itself, one for each. Each is given one thing to do at a time, and waits otherwise. Neither asking
//! nor doing takes memory.
//!
//! The thread that unmounts has no [descriptors](crate::sys::descriptors): what it waits for may end with those of the
//! keeper only.

use std::ffi::CStr;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};

use nix::unistd::Pid;

use crate::sys::descriptors;
use crate::sys::mount::detach_here;
use crate::sys::spawn::Prepared;

/// Longest path that the kernel takes, with its end.
const PATH: usize = 4096;

/// The threads that stay outside. They end when this is dropped.
pub(super) struct Hands {
    starting: Arc<Table>,
    removing: Arc<Table>,
}

struct Table {
    desk: Mutex<Desk>,
    changed: Condvar,
}

struct Desk {
    slot: Slot,
    /// What is to be taken down, and behind it nothing but zeros.
    target: [u8; PATH],
}

/// What is to be done, or what came of it.
enum Slot {
    Nothing,
    /// Start a daemon, of this program in place of the one that was named, if there is one.
    Start(Option<OwnedFd>),
    /// Take the target out of the tree.
    Detach,
    Started(io::Result<Pid>),
    Detached(io::Result<()>),
    /// Nobody asks any more.
    Over,
}

impl Hands {
    /// Starts the threads, with the command line of daemons if any are to be started.
    pub(super) fn start(successor: Option<Prepared>) -> io::Result<Self> {
        let (starting, removing) = (Arc::new(Table::new()), Arc::new(Table::new()));
        let builder = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let table = starting.clone();
        builder("hands").spawn(move || table.work(successor.as_ref()))?;
        let table = removing.clone();
        let (tell, told) = channel();
        builder("hands-remove").spawn(move || {
            descriptors::leave_all();
            let _ = tell.send(());
            table.work(None);
        })?;
        // Before there is anything that it must not have.
        told.recv().map_err(io::Error::other)?;
        Ok(Self { starting, removing })
    }

    /// Starts a daemon; `program` in the place of the one that was named, if there is one.
    pub(super) fn start_daemon(&self, program: Option<impl AsFd>) -> io::Result<Pid> {
        let program = program.map(|program| program.as_fd().try_clone_to_owned()).transpose()?;
        match self.starting.ask(Slot::Start(program), b"") {
            Slot::Started(outcome) => outcome,
            _ => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    /// Takes a mount out of the tree.
    pub(super) fn detach(&self, target: &[u8]) -> io::Result<()> {
        if target.len() >= PATH {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        match self.removing.ask(Slot::Detach, target) {
            Slot::Detached(outcome) => outcome,
            _ => Err(ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        for table in [&self.starting, &self.removing] {
            table.desk.lock().unwrap().slot = Slot::Over;
            table.changed.notify_all();
        }
    }
}

impl Table {
    fn new() -> Self {
        Self { desk: Mutex::new(Desk { slot: Slot::Nothing, target: [0; PATH] }), changed: Condvar::new() }
    }

    /// Lays `wanted` on the table and waits for what comes of it. Only one thread asks.
    fn ask(&self, wanted: Slot, target: &[u8]) -> Slot {
        let mut desk = self.desk.lock().unwrap();
        desk.target.fill(0);
        desk.target[..target.len()].copy_from_slice(target);
        desk.slot = wanted;
        self.changed.notify_all();
        let is_open = |desk: &mut Desk| matches!(desk.slot, Slot::Start(_) | Slot::Detach);
        let mut desk = self.changed.wait_while(desk, is_open).unwrap();
        std::mem::replace(&mut desk.slot, Slot::Nothing)
    }

    /// Does what is asked, until nobody asks any more.
    fn work(&self, successor: Option<&Prepared>) {
        let mut desk = self.desk.lock().unwrap();
        loop {
            // Whoever asked waits for the lock: nothing else happens in this process meanwhile.
            desk.slot = match std::mem::replace(&mut desk.slot, Slot::Nothing) {
                Slot::Start(program) => {
                    let none = || io::Error::from(ErrorKind::Unsupported);
                    let start = |prepared: &Prepared| prepared.start(program.as_ref().map(AsFd::as_fd));
                    Slot::Started(successor.ok_or_else(none).and_then(start))
                }
                Slot::Detach => Slot::Detached(match CStr::from_bytes_until_nul(&desk.target) {
                    Ok(target) => detach_here(target),
                    Err(_) => Err(ErrorKind::InvalidInput.into()),
                }),
                Slot::Over => return,
                other => other,
            };
            self.changed.notify_all();
            let is_idle = |desk: &mut Desk| !matches!(desk.slot, Slot::Start(_) | Slot::Detach | Slot::Over);
            desk = self.changed.wait_while(desk, is_idle).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};

    #[test]
    fn one_thing_after_the_other_is_done_and_answered() {
        let words = ["/bin/sh", "-c", "exit 5"].map(std::ffi::OsString::from);
        let hands = Hands::start(Some(Prepared::new(words.into()).unwrap())).unwrap();
        for _ in 0..3 {
            let pid = hands.start_daemon(None::<OwnedFd>).unwrap();
            assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 5));
            assert!(hands.detach(b"/nowhere/at/all").is_err());
        }
        let shell = std::fs::File::open("/bin/false").unwrap();
        let pid = hands.start_daemon(Some(&shell)).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 1));
    }

    #[test]
    fn without_a_command_line_nothing_is_started() {
        let hands = Hands::start(None).unwrap();
        assert_eq!(hands.start_daemon(None::<OwnedFd>).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
