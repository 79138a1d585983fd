//! One ranged read: which units it brings, who waits for them, and how it comes apart.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::core::Core;
use super::guides::ListId;
use super::inflight::Lead;
use super::users::Readers;
use crate::base::{ByteRange, Class, RequestId};
use crate::blob::{Unit, UnitIndex};
use crate::sys::files::is_data;
use crate::telemetry::Telemetry;

/// One ranged read and the duty to finish the units it brings.
pub(super) struct Window {
    pub(super) core: Arc<Core>,
    pub(super) stored: ByteRange,
    /// Not empty.
    pub(super) units: Vec<Led>,
    /// When a reader began to wait; `None` while nobody does.
    pub(super) asked: Option<Instant>,
    /// The request of the kernel that it was made for or promoted by.
    pub(super) request: RequestId,
    /// Whether it is part of a prefetch that gives way to everything else. No more so once a reader
    /// waits for one of its units.
    pub(super) bulk: bool,
    /// The list that says that something of it will be read soon.
    pub(super) list: Option<ListId>,
    /// What has come already of a bulk read that gave way, from the start of `stored` on.
    pub(super) head: BytesMut,
}

/// A unit on its way, and the duty to finish it.
pub(super) struct Led {
    pub(super) unit: Unit,
    pub(super) lead: Lead,
    /// How often its bytes came and were wrong.
    pub(super) wrong: usize,
}

impl Window {
    /// A read of its own for `units`, for readers or ahead of one.
    pub(super) fn new(core: Arc<Core>, stored: ByteRange, units: Vec<Led>, asked: Option<Instant>) -> Self {
        let list = core.guides.list_of(units.iter().map(|led| led.lead.unit()));
        Self { core, stored, units, asked, request: RequestId::NONE, bulk: false, list, head: BytesMut::new() }
    }

    /// Parts of which each is wholly urgent or wholly bulk, in order. What has come of the first is
    /// kept if it is bulk; a reader's read brings its own.
    pub(super) fn split_by_urgency(self) -> Vec<Self> {
        let Self { core, units, request, mut head, .. } = self;
        let longest = core.engine.options.window;
        let mut parts: Vec<Self> = Vec::new();
        for group in groups(units) {
            let is_urgent = group.iter().any(|led| led.lead.urgency().class() == Class::OnDemand);
            let stored = group[0].unit.stored;
            match parts.last_mut() {
                Some(part) if part.bulk != is_urgent && (part.bulk || part.stored.hull(stored).len() <= longest) => {
                    part.stored = part.stored.hull(stored);
                    part.units.extend(group);
                }
                _ => {
                    let head = std::mem::take(&mut head);
                    let part = Self::new(Arc::clone(&core), stored, group, is_urgent.then(Instant::now));
                    parts.push(if is_urgent { Self { request, ..part } } else { Self { bulk: true, head, ..part } });
                }
            }
        }
        parts
    }

    pub(super) fn class(&self) -> Class {
        let classes = self.units.iter().map(|led| led.lead.urgency().class());
        classes.min().unwrap_or(Class::Prefetch)
    }

    /// Whose readers wait for it, or will soon.
    pub(super) fn readers(&self) -> Readers {
        let mut all = Readers::default();
        self.units.iter().for_each(|led| all.add_all(&led.lead.urgency().readers()));
        all
    }

    /// Whether a reader has waited this long already.
    pub(super) fn is_late(&self, deadline: Duration) -> bool {
        self.asked.is_some_and(|asked| asked.elapsed() >= deadline)
    }

    /// Whether its units can be asked for by more than one read.
    pub(super) fn is_divisible(&self) -> bool {
        self.units.iter().any(|led| led.unit.stored != self.stored)
    }

    /// Whether the file of the device has blocks where its units go, as far as can be told. Asks the disk. They may be
    /// shared with another file, so that writing there takes room all the same.
    pub(super) fn has_blocks(&self) -> bool {
        let has = |file: &File| self.units.iter().all(|led| is_data(file.as_fd(), led.unit.blocks()).unwrap_or(false));
        self.core.ledger.file().is_some_and(has)
    }

    pub(super) fn span(&self) -> RangeInclusive<UnitIndex> {
        let units = || self.units.iter().map(|led| led.lead.unit());
        units().min().unwrap_or(0)..=units().max().unwrap_or(0)
    }

    /// Notes that its units are being fetched now, and how long a reader has waited for that.
    pub(super) fn start(&mut self, now: Instant, telemetry: &Telemetry) {
        let mut is_first = true;
        for led in &mut self.units {
            is_first &= led.lead.start(now);
        }
        if let Some(asked) = self.asked.filter(|_| is_first) {
            telemetry.fills.queue.observe(now.saturating_duration_since(asked));
        }
    }

    pub(super) fn holds(&self, device: u64, unit: UnitIndex) -> bool {
        self.core.id == device && self.units.iter().any(|led| led.lead.unit() == unit)
    }
}

/// Units that share their stored bytes together, all others alone. They come in order of stored
/// ranges, as [`super::plan`] leaves them, so those that share are neighbours.
pub(super) fn groups(units: Vec<Led>) -> Vec<Vec<Led>> {
    let mut groups: Vec<Vec<Led>> = Vec::new();
    for led in units {
        match groups.last_mut() {
            Some(group) if group[0].unit.shares_with(&led.unit) => group.push(led),
            _ => groups.push(vec![led]),
        }
    }
    groups
}
