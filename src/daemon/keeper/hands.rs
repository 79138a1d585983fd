//! What a confined keeper may not do itself: start a daemon, and take mounts out of the tree.
//!
//! A filter of system calls and the rules for files pass on to whatever a confined thread starts, and
//! a daemon must be free to confine itself its own way. So one thread is started before the keeper
//! confines itself. It is given one thing to do at a time, and waits otherwise. Asking it takes no
//! memory.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};

use nix::unistd::Pid;

use crate::sys::mount;
use crate::sys::spawn::Prepared;

/// The thread that stays outside. It ends when this is dropped.
pub(super) struct Hands(Arc<Table>);

struct Table {
    slot: Mutex<Slot>,
    changed: Condvar,
}

/// What is to be done, or what came of it.
enum Slot {
    Nothing,
    /// Start a daemon, of this program in place of the one that was named, if there is one.
    Start(Option<OwnedFd>),
    Detach(PathBuf),
    Started(io::Result<Pid>),
    Detached(io::Result<()>),
    /// Nobody asks any more.
    Over,
}

impl Hands {
    /// Starts the thread, with the command line of daemons if any are to be started.
    pub(super) fn start(successor: Option<Prepared>) -> io::Result<Self> {
        let table = Arc::new(Table { slot: Mutex::new(Slot::Nothing), changed: Condvar::new() });
        let of_thread = table.clone();
        std::thread::Builder::new().name("hands".into()).spawn(move || of_thread.work(successor.as_ref()))?;
        Ok(Self(table))
    }

    /// Starts a daemon; `program` in the place of the one that was named, if there is one.
    pub(super) fn start_daemon(&self, program: Option<impl AsFd>) -> io::Result<Pid> {
        let program = program.map(|program| program.as_fd().try_clone_to_owned()).transpose()?;
        match self.0.ask(Slot::Start(program)) {
            Slot::Started(outcome) => outcome,
            _ => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    /// Takes a mount out of the tree.
    pub(super) fn detach(&self, target: PathBuf) -> io::Result<()> {
        match self.0.ask(Slot::Detach(target)) {
            Slot::Detached(outcome) => outcome,
            _ => Err(ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        *self.0.slot.lock().unwrap() = Slot::Over;
        self.0.changed.notify_all();
    }
}

impl Table {
    /// Lays `wanted` on the table and waits for what comes of it. Only one thread asks.
    fn ask(&self, wanted: Slot) -> Slot {
        let mut slot = self.slot.lock().unwrap();
        *slot = wanted;
        self.changed.notify_all();
        let is_open = |slot: &mut Slot| matches!(slot, Slot::Start(_) | Slot::Detach(_));
        let mut slot = self.changed.wait_while(slot, is_open).unwrap();
        std::mem::replace(&mut *slot, Slot::Nothing)
    }

    /// Does what is asked, until nobody asks any more.
    fn work(&self, successor: Option<&Prepared>) {
        let mut slot = self.slot.lock().unwrap();
        loop {
            // Whoever asked waits for the lock: nothing else happens in this process meanwhile.
            *slot = match std::mem::replace(&mut *slot, Slot::Nothing) {
                Slot::Start(program) => {
                    let none = || io::Error::from(ErrorKind::Unsupported);
                    let start = |prepared: &Prepared| prepared.start(program.as_ref().map(AsFd::as_fd));
                    Slot::Started(successor.ok_or_else(none).and_then(start))
                }
                Slot::Detach(target) => Slot::Detached(mount::detach(&target)),
                Slot::Over => return,
                other => other,
            };
            self.changed.notify_all();
            let is_idle = |slot: &mut Slot| !matches!(slot, Slot::Start(_) | Slot::Detach(_) | Slot::Over);
            slot = self.changed.wait_while(slot, is_idle).unwrap();
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
            assert!(hands.detach("/nowhere/at/all".into()).is_err());
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
