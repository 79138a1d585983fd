//! Taking over from a daemon that has vanished: everything that its keepers hold, and the numbers of
//! the events that it had taken.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::post::socket_path;
use super::wire::{Kind, Name, Op, Word};
use super::{End, RANKS, STUCK, bury};
use crate::sys::journal::{Journal, Outstanding};
use crate::sys::{fdpass, process};

/// How long a keeper may take to find that the last daemon has gone: the end of that daemon closes its talks one after
/// the other, and who was told first may have started this process meanwhile.
const NOTICE: Duration = Duration::from_secs(2);

/// How often it is asked meanwhile.
const LOOK: Duration = Duration::from_millis(10);

/// What a dead daemon left with its keepers.
pub struct Inheritance {
    pub(super) ends: [Option<End>; RANKS],
    pub(super) held: BTreeMap<Name, OwnedFd>,
    /// What a service manager held and handed over.
    handed: Vec<(Name, OwnedFd)>,
    /// Events that it had taken. Each with its descriptor number reserved; `None` where something
    /// in this process had the number already.
    pub events: Vec<(Outstanding, Option<OwnedFd>)>,
    journal: Option<Journal>,
}

impl fmt::Debug for Inheritance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inheritance").field("held", &self.held.len()).field("events", &self.events.len()).finish()
    }
}

/// Takes over from a daemon that has vanished, if there are keepers below `run`.
///
/// To be called while this process has opened next to nothing and has one thread: descriptor
/// numbers that name events of the dead daemon are reserved here, and until that is done the
/// kernel could give them to something else.
///
/// `handed` is what a service manager had been given and handed to this process, by label.
///
/// # Errors
/// `AddrInUse` if the daemon of those keepers lives, and goes on to.
pub fn inherit(run: &Path, handed: Vec<(String, OwnedFd)>) -> io::Result<Option<Inheritance>> {
    let named = |(label, fd): (String, OwnedFd)| Some((Name::from_label(&label)?, fd));
    let mut all = Inheritance {
        ends: [None, None],
        held: BTreeMap::new(),
        handed: handed.into_iter().filter_map(named).collect(),
        events: Vec::new(),
        journal: None,
    };
    let (mut stuck, until) = (None, Instant::now() + NOTICE);
    for rank in 0..RANKS {
        let Some((end, held)) = all.ask(run, rank, until)? else { continue };
        let held = match held {
            // It was killed, and its socket was still there.
            Err(error) if has_gone(&error) => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock && stuck.is_none() => {
                stuck = Some((end, error));
                continue;
            }
            other => other?,
        };
        all.ends[rank] = Some(end);
        // The dead daemon may have told one of them something that it did not tell the other.
        let known: Vec<Name> = all.held.keys().copied().filter(|name| !held.contains(name)).collect();
        for name in known {
            let end = all.ends[rank].as_ref().expect("just set");
            end.tell(Word::about(Op::Hold, name), all.held.get(&name).map(|fd| fd as _))?;
        }
    }
    match (stuck, all.ends.iter().any(Option::is_some)) {
        (Some((end, _)), true) => {
            tracing::error!(pid = end.pid, "a keeper does not answer, and another one has everything: it is ended");
            // Were it to go on later, it would deny readers of a daemon that serves.
            bury(Some(end));
        }
        // The last that has anything must live.
        (Some((_, error)), false) => return Err(error),
        (None, _) => {}
    }
    if let [Some(first), Some(_)] = &all.ends {
        // What only the second knew.
        for (name, fd) in &all.held {
            first.tell(Word::about(Op::Hold, *name), Some(fd))?;
        }
    }
    all.add_handed()?;
    let serves = |kind| all.held.contains_key(&Name::only(kind));
    let is_there = all.ends.iter().any(Option::is_some) || serves(Kind::Group) || serves(Kind::Cachefiles);
    Ok(is_there.then_some(all))
}

/// Whether the other end of a talk has ended.
fn has_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof)
}

impl Inheritance {
    /// Asks the keeper of `rank`, if there is one, for everything that it has, and until `until` again if it takes the
    /// last daemon for alive. Gives it, and the names.
    fn ask(&mut self, run: &Path, rank: usize, until: Instant) -> io::Result<Option<(End, io::Result<Vec<Name>>)>> {
        loop {
            let socket = match fdpass::connect(&socket_path(run, rank)) {
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
                other => other?,
            };
            fdpass::set_timeout(socket.as_fd(), Some(STUCK))?;
            let (pid, _) = fdpass::peer(socket.as_fd())?;
            let held = Word::new(Op::Attach).send(&socket, None).and_then(|()| self.receive(&socket));
            if held.as_ref().is_err_and(|error| error.kind() == ErrorKind::AddrInUse) && Instant::now() < until {
                thread::sleep(LOOK);
                continue;
            }
            return Ok(Some((End { socket, pid, child: None }, held)));
        }
    }

    /// Receives everything from one keeper and gives the names.
    fn receive(&mut self, socket: &OwnedFd) -> io::Result<Vec<Name>> {
        let mut names = Vec::new();
        loop {
            match Word::receive(socket)? {
                (Word { op: Op::Held, name, .. }, Some(fd)) => {
                    names.push(name);
                    if self.held.contains_key(&name) {
                        continue;
                    }
                    if name.kind == Kind::Journal {
                        self.reserve(fd.try_clone()?)?;
                    }
                    self.held.insert(name, fd);
                }
                (Word { op: Op::Done, .. }, _) => return Ok(names),
                (Word { op: Op::Failed, value, .. }, _) if value == u64::from(libc::EBUSY.unsigned_abs()) => {
                    return Err(io::Error::new(ErrorKind::AddrInUse, "a daemon is serving here"));
                }
                _ => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }

    /// Adds what no keeper had.
    fn add_handed(&mut self) -> io::Result<()> {
        let missing = |(name, _): &(Name, OwnedFd)| !self.held.contains_key(name);
        let journal = self.handed.iter().position(|it| it.0.kind == Kind::Journal && missing(it));
        if let Some(at) = journal {
            let (name, fd) = self.handed.swap_remove(at);
            self.reserve(fd.try_clone()?)?;
            self.held.insert(name, fd);
        }
        for (name, fd) in std::mem::take(&mut self.handed) {
            self.held.entry(name).or_insert(fd);
        }
        Ok(())
    }

    /// Makes room for the number of an event, if a descriptor that was handed over has it.
    fn clear_the_way(&mut self, number: i32) {
        for (_, fd) in self.handed.iter_mut().filter(|(_, fd)| fd.as_raw_fd() == number) {
            // Where it fails the reader is denied.
            if let Ok(moved) = process::move_up(fd.as_fd()) {
                *fd = moved;
            }
        }
    }

    /// Keeps the numbers of the dead daemon's events from being given to new ones.
    fn reserve(&mut self, journal: OwnedFd) -> io::Result<()> {
        let journal = match Journal::open(journal) {
            Ok(journal) => journal,
            // Of a newer or older release, or damaged: the events in it are unknown, and are denied.
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                tracing::error!(%error, "the journal of the last daemon cannot be read; its waiting readers are denied");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for event in journal.inherited() {
            self.clear_the_way(event.number);
            self.events.push((event, process::occupy(event.number).ok().flatten()));
        }
        self.journal = Some(journal);
        Ok(())
    }

    /// A copy of what was held under `name`.
    pub fn take(&self, name: Name) -> Option<OwnedFd> {
        self.held.get(&name).and_then(|fd| fd.try_clone().ok())
    }

    /// The journal, if it could be read.
    pub fn take_journal(&mut self) -> Option<Journal> {
        self.journal.take()
    }

    /// Names of all parts of FUSE connections.
    pub fn connections(&self) -> impl Iterator<Item = Name> + '_ {
        self.held.keys().copied().filter(|name| name.kind == Kind::Fuse)
    }

    /// Names of all device files.
    pub fn devices(&self) -> impl Iterator<Item = Name> + '_ {
        self.held.keys().copied().filter(|name| name.kind == Kind::Device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_that_dies_before_it_has_answered_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let dying: Vec<_> = (0..RANKS).map(|rank| fdpass::listen(&socket_path(dir.path(), rank)).unwrap()).collect();
        let ended = std::thread::spawn(move || {
            for (rank, listener) in dying.into_iter().enumerate() {
                // Before it is heard, and after.
                let client = fdpass::accept(listener.as_fd()).unwrap();
                if rank > 0 {
                    Word::receive(&client).unwrap();
                }
            }
        });

        let inherited = inherit(dir.path(), Vec::new()).unwrap();

        assert!(inherited.is_none(), "{inherited:?}");
        ended.join().unwrap();
    }
}
