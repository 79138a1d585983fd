//! What daemon and keeper say to each other: words of one fixed form, some with a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::sys::fdpass;

/// What a word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Daemon: I am the daemon now; give me everything. Answered by [`Op::Held`] words and
    /// [`Op::Done`].
    Attach,
    /// Daemon: keep the descriptor that comes with this under its name, in place of an older one.
    Hold,
    /// Daemon: forget what has this name.
    Release,
    /// Daemon: I am about to end with mounts in use. The value is 1 for a successor at once, 0 for none.
    Leave,
    /// Daemon: nothing is in use: let go of everything and end.
    Finish,
    /// Anybody: how is it?
    Status,
    /// Anybody: end the mounts of a daemon that has vanished.
    Recover,
    /// Keeper: this is held; the descriptor comes along.
    Held,
    /// Keeper: done.
    Done,
    /// Keeper: this could not be done; the value is an errno.
    Failed,
    /// Daemon, to a keeper that it has just started: you hold everything; be the keeper of your rank.
    TakePost,
    /// Daemon, to the one that has the rank: the process with this number takes your post, and holds
    /// everything that you do.
    Relief,
    /// Daemon: I have taken everything over, and whoever waits is being answered.
    Serving,
}

const OPS: [Op; 13] = [
    Op::Attach,
    Op::Hold,
    Op::Release,
    Op::Leave,
    Op::Finish,
    Op::Status,
    Op::Recover,
    Op::Held,
    Op::Done,
    Op::Failed,
    Op::TakePost,
    Op::Relief,
    Op::Serving,
];

/// The kinds of descriptors that are held. In this order they are given to a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The fanotify group.
    Group,
    /// The journal of its events. Early, because a successor must reserve descriptor numbers
    /// before it is given many more.
    Journal,
    /// The lock of the cache directory.
    Lock,
    /// The inotify instance that watches superblocks.
    Watch,
    /// `/dev/cachefiles`, bound.
    Cachefiles,
    /// The program to start as a successor, in place of the one that was named first.
    Program,
    /// The file of a device, opened for writing before it was marked.
    Device,
    /// What a FUSE mount needs to go on: its connection, and the memory of the requests that were
    /// taken from it.
    Fuse,
}

// What is new comes last: keepers of an older release may still be there after an upgrade.
const KINDS: [Kind; 8] =
    [Kind::Group, Kind::Journal, Kind::Lock, Kind::Watch, Kind::Cachefiles, Kind::Program, Kind::Device, Kind::Fuse];

/// The same as words, in the same order.
const LABELS: [&str; 8] = ["group", "journal", "lock", "watch", "cachefiles", "program", "device", "fuse"];

impl Kind {
    /// Whether there are several of the kind, each with a key.
    const fn has_key(self) -> bool {
        matches!(self, Self::Device | Self::Fuse)
    }

    /// Whether readers get errors, never wrong bytes, once nobody holds it any more. Then it is let go of
    /// when no daemon comes in time, and no service manager is asked to hold it longer.
    pub(super) const fn fails_closed(self) -> bool {
        matches!(self, Self::Cachefiles | Self::Fuse)
    }
}

/// What names a held descriptor: its kind, and what tells it from others of the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub kind: Kind,
    /// For a device, device and inode number of its file; for a FUSE mount, the number of its record
    /// and of the part; else zeros.
    pub key: [u64; 2],
}

impl Name {
    /// What a service manager calls it.
    pub fn label(self) -> String {
        let kind = LABELS[self.kind as usize];
        let [first, second] = self.key;
        if self.kind.has_key() { format!("{kind}-{first}-{second}") } else { kind.to_owned() }
    }

    /// The inverse of [`Name::label`].
    pub fn from_label(label: &str) -> Option<Self> {
        let mut parts = label.split('-');
        let known = parts.next()?;
        let kind = KINDS[LABELS.iter().position(|label| *label == known)?];
        let key = if kind.has_key() { [parts.next()?.parse().ok()?, parts.next()?.parse().ok()?] } else { [0; 2] };
        parts.next().is_none().then_some(Self { kind, key })
    }

    /// The name of what there is only one of.
    pub const fn only(kind: Kind) -> Self {
        Self { kind, key: [0; 2] }
    }
}

/// One word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) op: Op,
    pub(super) name: Name,
    pub(super) value: u64,
}

/// The same on the wire, native endianness: both ends run on one host.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    op: u32,
    kind: u32,
    key: [u64; 2],
    value: u64,
}

const _: () = assert!(size_of::<Raw>() == 32);

impl Word {
    pub(super) const fn new(op: Op) -> Self {
        Self { op, name: Name::only(Kind::Group), value: 0 }
    }

    pub(super) const fn about(op: Op, name: Name) -> Self {
        Self { op, name, value: 0 }
    }

    pub(super) const fn with(self, value: u64) -> Self {
        Self { value, ..self }
    }

    pub(super) fn send(self, to: &OwnedFd, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let raw = Raw { op: self.op as u32, kind: self.name.kind as u32, key: self.name.key, value: self.value };
        fdpass::send(to.as_fd(), raw.as_bytes(), fd)
    }

    /// Waits for a word.
    ///
    /// # Errors
    /// `UnexpectedEof` when the other end has gone, `InvalidData` for what is no word.
    pub(super) fn receive(from: &OwnedFd) -> io::Result<(Self, Option<OwnedFd>)> {
        let mut buffer = [0; 64];
        let (len, fd) = fdpass::receive(from.as_fd(), &mut buffer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let raw = Raw::read_from_bytes(&buffer[..len]).map_err(|_| io::ErrorKind::InvalidData)?;
        let op = usize::try_from(raw.op).ok().and_then(|op| OPS.get(op));
        let kind = usize::try_from(raw.kind).ok().and_then(|kind| KINDS.get(kind));
        let (Some(&op), Some(&kind)) = (op, kind) else { return Err(io::ErrorKind::InvalidData.into()) };
        Ok((Self { op, name: Name { kind, key: raw.key }, value: raw.value }, fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_lead_back_to_names() {
        for kind in KINDS {
            let name = if kind.has_key() { Name { kind, key: [7, 1 << 40] } } else { Name::only(kind) };
            assert_eq!(Name::from_label(&name.label()), Some(name));
        }
        for bad in ["", "control", "device", "device-1", "device-1-x", "group-1", "device-1-2-3", "fuse-1"] {
            assert_eq!(Name::from_label(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn words_arrive_as_they_were_sent_and_others_are_refused() {
        let (left, right) = fdpass::pair().unwrap();
        for (op, kind) in OPS.into_iter().zip(KINDS.into_iter().cycle()) {
            let word = Word { op, name: Name { kind, key: [1 << 40, 2] }, value: 3 };
            word.send(&left, Some(left.as_fd())).unwrap();
            let (got, fd) = Word::receive(&right).unwrap();
            assert_eq!((got, fd.is_some()), (word, true));
        }
        for bad in [&b"hello"[..], &[0xff; 32], &[0; 33]] {
            fdpass::send(left.as_fd(), bad, None).unwrap();
            assert_eq!(Word::receive(&right).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        drop(left);
        assert_eq!(Word::receive(&right).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
