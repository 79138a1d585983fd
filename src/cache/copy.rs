//! Units that another complete blob of the store has already: copied instead of fetched.
//!
//! What is copied is checked by the digest of the unit it becomes, like bytes from anywhere else.
//! Where the file system can share blocks it is the *shared* blocks that are read back and checked:
//! what was good in memory a moment ago may be spoilt on the disk.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::inflight::Lead;
use super::pool::Job;
use super::sink::Scratch;
use super::stats::count;
use super::twins::Twin;
use crate::base::RequestId;
use crate::blob::{Unit, UnitIndex, UnitMap, verify};
use crate::sys::files::clone_range;

impl Core {
    /// Queues copies of the led units that lie elsewhere; gives back the others.
    pub(super) fn copy_twins(self: &Arc<Self>, map: &UnitMap, leads: Vec<Lead>) -> Vec<Lead> {
        let mut others = Vec::new();
        for lead in leads {
            let unit = map.units()[lead.unit() as usize];
            match self.engine.twins.find(&unit, self.data.as_deref()) {
                Some(twin) => self.queue_copy(lead, unit, twin),
                None => others.push(lead),
            }
        }
        others
    }

    fn queue_copy(self: &Arc<Self>, lead: Lead, unit: Unit, twin: Twin) {
        let (units, urgency) = (vec![(self.id, lead.unit())], vec![lead.urgency().clone()]);
        let core = Arc::clone(self);
        let run = Box::new(move |scratch: &mut Scratch| core.copy(lead, &unit, &twin, scratch));
        self.engine.jobs().push(Job { units, urgency, run });
    }

    /// Copies one unit, or has it fetched if that cannot be.
    fn copy(self: &Arc<Self>, lead: Lead, unit: &Unit, twin: &Twin, scratch: &mut Scratch) {
        // Dropping the lead cancels whoever waits.
        if self.is_closed() {
            return;
        }
        let room = scratch.room(usize::try_from(unit.blocks().len()).expect("a unit has at most 16 MiB"));
        match self.take(lead.unit(), unit, twin, room) {
            Ok(()) => {
                self.counters.copied.fetch_add(1, Ordering::Relaxed);
                self.counters.filled.fetch_add(1, Ordering::Relaxed);
                count(&self.engine.counters.copied_units, 1);
                count(&self.engine.counters.copied_bytes, unit.blocks().len());
                lead.finish(&Ok(()));
                self.flush_if_full();
            }
            Err(error) => {
                tracing::debug!(blob = %self.blob(), unit = lead.unit(), %error, "cannot be copied; it is fetched");
                let class = lead.urgency().class();
                self.fetch(&self.map(), vec![lead], class, RequestId::NONE, None);
            }
        }
    }

    fn take(&self, index: UnitIndex, unit: &Unit, twin: &Twin, room: &mut [u8]) -> io::Result<()> {
        let twins = &self.engine.twins;
        let from = twin.open(twins).ok_or(io::ErrorKind::NotFound)??;
        if twins.may_share() {
            let shared = self.ledger.land_by(index, |to| {
                clone_range(from.as_fd(), twin.range, to.as_fd(), unit.blocks().start())?;
                read_checked(to, unit.blocks().start(), unit, room)
            });
            match shared {
                Ok(_) => {
                    // Counted like a copy, as the file system counts it for each file.
                    self.engine.space.landed(unit.blocks().len());
                    count(&self.engine.counters.shared_units, 1);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    // Over a foreign sink there is no file to share with; elsewhere it stays so.
                    if self.ledger.file().is_some() {
                        twins.cannot_share();
                    }
                }
                Err(error) => return Err(error),
            }
        }
        read_checked(&from, twin.range.start(), unit, room)?;
        self.land_checked(index, unit, room).map(drop)
    }
}

/// Reads the blocks of `unit` from `at` in `file` and checks them, the padding too.
fn read_checked(file: &File, at: u64, unit: &Unit, room: &mut [u8]) -> io::Result<()> {
    file.read_exact_at(room, at)?;
    let (plain, padding) = room.split_at(usize::try_from(unit.decoded.len()).expect("a unit has at most 16 MiB"));
    verify(&unit.check, plain).map_err(io::Error::other)?;
    if padding.iter().all(|&byte| byte == 0) { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
