//! From what somebody wants of an image, by paths and ranges of files, to ranges of its devices.

use std::collections::HashSet;
use std::ops::ControlFlow;

use super::api::{FileRanges, PrefetchOrder};
use crate::base::{BLOCK, ByteRange};
use crate::cache::Want;
use crate::image::{Extent, Image, ImageError, Inode, Kind, Nid};

/// Most ranges of one order: what is behind is left out, and said so.
const MOST_WANTS: usize = 1 << 20;

/// Most remarks that are kept.
const MOST_REMARKS: usize = 16;

/// Ranges of devices in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) wants: Vec<Want>,
    /// Whether everything else is wanted as well, behind them.
    pub(super) rest: bool,
    /// What leads nowhere.
    pub(super) remarks: Vec<String>,
    /// Inodes that are in `wants` from end to end, with all below them.
    whole: HashSet<Nid>,
}

/// What `order` means for `image`.
pub(super) fn plan(image: &Image, order: &PrefetchOrder) -> Plan {
    let mut plan = Plan::default();
    match order {
        PrefetchOrder::None => {}
        PrefetchOrder::Hints => plan.add_hints(image),
        PrefetchOrder::All => {
            plan.add_hints(image);
            plan.rest = true;
        }
        PrefetchOrder::Files(files) => files.iter().for_each(|file| plan.add_file(image, file)),
    }
    plan
}

impl Plan {
    /// What the image itself wants first: its hot blobs, which have just that, or else the files of its prefetch table.
    fn add_hints(&mut self, image: &Image) {
        let hot = image.devices().iter().enumerate().filter(|(_, device)| device.is_hot());
        self.wants.extend(hot.filter_map(|(device, hot)| Some(Want { device, decoded: ByteRange::new(0, hot.len)? })));
        if !self.wants.is_empty() {
            return;
        }
        for nid in image.prefetch() {
            let added = self.add_tree(image, nid);
            self.note(added, || format!("inode {nid} of the prefetch table"));
        }
    }

    fn add_file(&mut self, image: &Image, file: &FileRanges) {
        let Some(path) = file.bytes() else {
            return self.remark("an entry names no path".to_owned());
        };
        let name = || path.escape_ascii().to_string();
        let found = image.lookup(&path);
        match found {
            Ok(Some(inode)) if matches!(inode.kind, Kind::Regular | Kind::Directory) => {
                let added = if file.ranges.is_empty() || inode.kind == Kind::Directory {
                    self.add_tree(image, inode.nid)
                } else {
                    let range = |&(at, len): &(u64, u64)| ByteRange::new(at, at.saturating_add(len));
                    let mut ranges = file.ranges.iter().filter_map(range);
                    ranges.try_for_each(|range| self.add(image, &inode, range))
                };
                self.note(added, name);
            }
            Ok(Some(_)) => self.remark(format!("{} is no file with data", name())),
            Ok(None) => self.remark(format!("{} is not in the image", name())),
            Err(error) => self.note(Err(error), name),
        }
    }

    /// All that is at `top` and below it.
    fn add_tree(&mut self, image: &Image, top: Nid) -> Result<(), ImageError> {
        let mut walk = image.walk_from(top);
        while let Some(visit) = walk.next_visit() {
            let inode = visit?.inode;
            // Named once more, by another directory or another link: it has its place already.
            let is_new = self.whole.insert(inode.nid);
            if is_new && inode.kind == Kind::Regular {
                self.add(image, &inode, ByteRange::new(0, inode.size).unwrap_or_default())?;
            }
        }
        Ok(())
    }

    /// A part of a regular file.
    fn add(&mut self, image: &Image, inode: &Inode, part: ByteRange) -> Result<(), ImageError> {
        let part = part.clamp_end(inode.size);
        if part.is_empty() {
            return Ok(());
        }
        let mut visit = |extent: Extent<'_>| {
            let Extent::Device { at, device, decoded } = extent else { return ControlFlow::Continue(()) };
            if at >= part.end() || self.wants.len() >= MOST_WANTS {
                return ControlFlow::Break(());
            }
            let skipped = part.start().saturating_sub(at);
            let len = decoded.len().min(part.end() - at);
            let cut = ByteRange::new(decoded.start().saturating_add(skipped), decoded.start() + len);
            // Empty or reversed before the part begins.
            if let Some(decoded) = cut.filter(|cut| !cut.is_empty()).and_then(|cut| cut.align_out(BLOCK)) {
                self.push(Want { device, decoded });
            }
            ControlFlow::Continue(())
        };
        image.extents_from(inode, part.start(), &mut visit)?;
        if self.wants.len() >= MOST_WANTS {
            self.remark(format!("there are more than {MOST_WANTS} ranges; the rest is left out"));
        }
        Ok(())
    }

    /// Chunks of a file mostly follow each other.
    fn push(&mut self, want: Want) {
        match self.wants.last_mut() {
            Some(last) if last.device == want.device && last.decoded.end() == want.decoded.start() => {
                last.decoded = last.decoded.hull(want.decoded);
            }
            _ => self.wants.push(want),
        }
    }

    fn note(&mut self, outcome: Result<(), ImageError>, name: impl FnOnce() -> String) {
        if let Err(error) = outcome {
            self.remark(format!("{}: {error}", name()));
        }
    }

    fn remark(&mut self, text: String) {
        if self.remarks.len() < MOST_REMARKS && !self.remarks.contains(&text) {
            self.remarks.push(text);
        }
    }
}
