//! Connections of FUSE mounts in the hands of the keepers, by the record of their mount.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Daemon;
use super::keeper::{Inheritance, Keepers, Kind, Name};
use super::records::{Record, RecordId};
use super::served::{Attachment, Mounted};
use crate::export::fuse::{Keep, Legacy, Part};

/// The parts of one connection, as the keepers number them.
const PARTS: [Part; 5] = [Part::Device, Part::Requests, Part::Slots, Part::Names, Part::Directory];

/// The keepers, for the connection of one mount.
#[derive(Debug)]
pub(super) struct Kept<'a> {
    pub(super) keepers: &'a Keepers,
    pub(super) record: RecordId,
}

impl Keep for Kept<'_> {
    fn keep(&self, part: Part, fd: Arc<OwnedFd>) -> io::Result<()> {
        self.keepers.hold(name(self.record.number(), part), fd)
    }
}

fn name(record: u64, part: Part) -> Name {
    let number = PARTS.iter().position(|it| *it == part).expect("all are listed");
    Name { kind: Kind::Fuse, key: [record, number as u64] }
}

/// Connections of a dead daemon.
#[derive(Debug, Default)]
pub(super) struct Connections(BTreeMap<Name, OwnedFd>);

impl Connections {
    /// Those that its keepers have.
    pub(super) fn of(inherited: &Inheritance) -> Self {
        Self(inherited.connections().filter_map(|name| Some((name, inherited.take(name)?))).collect())
    }

    /// What a successor needs of that of one mount. `None` if the keepers let go of it, or never had it.
    pub(super) fn take(&mut self, id: RecordId, record: &Record) -> Option<Legacy> {
        let lasting = record.fuse?;
        let device = self.0.remove(&name(id.number(), Part::Device))?;
        let mut other = |part| self.0.remove(&name(id.number(), part));
        let (requests, slots) = (other(Part::Requests), other(Part::Slots));
        let (names, directory) = (other(Part::Names), other(Part::Directory));
        Some(Legacy { device, requests, slots, names, directory, lasting })
    }
}

impl Daemon {
    /// Forgets a mount that has ended, or has not begun: its record, and its connection if it has one.
    pub(super) fn forget(&self, record: RecordId) {
        self.records.remove(record);
        self.release_connection(record);
    }

    /// Has the keepers keep the connections over io_uring that were made ready for a successor. The others end with
    /// this process.
    pub(super) fn keep_slots(&self) {
        let state = self.state.lock().unwrap();
        for mounted in state.mounts.values().flatten().chain(&state.lingering) {
            let Mounted { record, attachment: Attachment::Fuse(attachment), .. } = mounted else { continue };
            let left = attachment.connection().and_then(|connection| connection.left_in_slots());
            let Some(left) = left else { continue };
            let keep = Kept { keepers: &self.keepers, record: *record };
            let kept = left.and_then(|(device, slots)| {
                keep.keep(Part::Slots, slots)?;
                keep.keep(Part::Device, device)
            });
            if let Err(error) = kept {
                tracing::error!(%error, "a FUSE connection over io_uring ends with this daemon");
            }
        }
    }

    /// Has the keepers let go of the connection of a mount, if it has one.
    pub(super) fn release_connection(&self, record: RecordId) {
        PARTS.iter().for_each(|part| self.keepers.release(name(record.number(), *part)));
    }

    /// Lets go of connections that no mount was taken over for: whoever waits there gets an error.
    pub(super) fn let_go(&self, left: &Connections) {
        left.0.keys().for_each(|name| self.keepers.release(*name));
    }
}
