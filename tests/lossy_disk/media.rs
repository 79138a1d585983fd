//! What may be left of a disk after a power cut.
//!
//! [`Media`] follows the log of a disk and knows at any point of it what stable storage may hold:
//!
//! * A sector of 512 bytes holds what it was last synced as, or anything written to it since. Each
//!   sector decides for itself, so writes are lost, torn and reordered.
//! * The length of a file is any it had since its last sync. What it never held is a hole, which
//!   reads as zeros.
//! * A directory has seen all changes up to its last sync, and any of the later ones: all, none, the
//!   first few, or a choice.
//! * A sync that fails promises nothing, and never tries the same bytes again: the kernel takes the
//!   pages it could not write for clean.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::model::{BLOCK, FileState, Model, Node, Op, ROOT, SECTOR, State};
use super::rng::Rng;

/// What one sector may hold; `None` is a hole.
#[derive(Clone, Debug)]
struct Sector {
    versions: Vec<Option<Bytes>>,
    dirty: bool,
}

#[derive(Clone, Debug)]
struct FileMedia {
    sectors: BTreeMap<usize, Sector>,
    lens: Vec<usize>,
    number: u64,
    born: u64,
    changed: u64,
}

#[derive(Clone, Debug, Default)]
struct DirMedia {
    safe: BTreeMap<String, Node>,
    pending: Vec<Op>,
}

/// What stable storage may hold after a prefix of a log.
#[derive(Clone, Debug)]
pub(crate) struct Media {
    births: bool,
    nodes: Node,
    epoch: u64,
    /// Operations followed so far.
    followed: u64,
    dirs: BTreeMap<Node, DirMedia>,
    files: BTreeMap<Node, FileMedia>,
}

/// How kind a power cut is to one file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Luck {
    /// What was not synced is lost.
    Nothing,
    /// Everything arrived.
    Everything,
    /// Each sector or name by its own.
    Mixed,
}

impl Luck {
    fn toss(rng: &mut Rng) -> Self {
        [Self::Nothing, Self::Everything, Self::Mixed][rng.below(3)]
    }
}

impl Media {
    /// Stable storage under `disk` at the beginning of its log, with everything on it safe.
    pub(crate) fn under(disk: &Model) -> Self {
        let state = disk.lock();
        assert!(state.log.is_empty(), "the log begins with the disk");
        let dirs =
            state.dirs.iter().map(|(&node, entries)| (node, DirMedia { safe: entries.clone(), pending: Vec::new() }));
        let files = state.files.iter().map(|(&node, file)| {
            let sectors = file.bytes.chunks(SECTOR).enumerate().filter(|(at, _)| file.data[at * SECTOR / BLOCK]);
            let sectors = sectors
                .map(|(at, bytes)| (at, Sector { versions: vec![Some(Bytes::copy_from_slice(bytes))], dirty: false }));
            let media = FileMedia {
                sectors: sectors.collect(),
                lens: vec![file.bytes.len()],
                number: file.number,
                born: file.born,
                changed: file.changed,
            };
            (node, media)
        });
        let (births, nodes, epoch) = (state.births, state.nodes, state.epoch);
        Self { births, nodes, epoch, followed: 0, dirs: dirs.collect(), files: files.collect() }
    }

    /// Follows the disk by one operation.
    pub(crate) fn follow(&mut self, op: &Op) {
        let now = self.epoch << 32 | self.followed;
        self.followed += 1;
        if let Op::SetLen { node, .. } | Op::Write { node, .. } = op {
            // Times are written with names, and often before bytes.
            self.file(*node).changed = now;
        }
        match op {
            Op::MakeDir { node, parent, .. } => {
                self.nodes = self.nodes.max(*node);
                self.dirs.insert(*node, DirMedia::default());
                self.pend(*parent, op);
            }
            Op::Create { node, parent, number, born, .. } => {
                self.nodes = self.nodes.max(*node);
                let (sectors, lens) = (BTreeMap::new(), vec![0]);
                let media = FileMedia { sectors, lens, number: *number, born: *born, changed: 0 };
                self.files.insert(*node, media);
                self.pend(*parent, op);
            }
            Op::Rename { parent, .. } | Op::Remove { parent, .. } => self.pend(*parent, op),
            Op::SetLen { node, len } => self.file(*node).set_len(*len),
            Op::Write { node, at, bytes } => self.file(*node).write(*at, bytes),
            Op::Sync { node, ok } => match self.dirs.get_mut(node) {
                Some(dir) if *ok => dir.settle(),
                Some(_) => {}
                None => self.file(*node).sync(*ok),
            },
        }
    }

    fn pend(&mut self, dir: Node, op: &Op) {
        self.dirs.get_mut(&dir).expect("a directory").pending.push(op.clone());
    }

    fn file(&mut self, node: Node) -> &mut FileMedia {
        self.files.get_mut(&node).expect("a file")
    }

    /// One disk that may be found after the power comes back. `luck` rules all files and
    /// directories; without it each tosses its own.
    pub(crate) fn survivor(&self, luck: Option<Luck>, rng: &mut Rng) -> Model {
        let mut state = State::empty(self.births, self.nodes);
        state.epoch = self.epoch + 1;
        let mut todo = vec![ROOT];
        while let Some(node) = todo.pop() {
            let own = luck.unwrap_or_else(|| Luck::toss(rng));
            if let Some(dir) = self.dirs.get(&node) {
                let entries = dir.survivor(own, rng);
                todo.extend(entries.values());
                state.dirs.insert(node, entries);
            } else {
                state.files.insert(node, self.files[&node].survivor(self.births, own, rng));
            }
        }
        Model::over(state)
    }
}

fn change(entries: &mut BTreeMap<String, Node>, op: &Op) {
    match op {
        Op::MakeDir { node, name, .. } | Op::Create { node, name, .. } => {
            entries.insert(name.clone(), *node);
        }
        Op::Rename { from, to, .. } => {
            if let Some(node) = entries.remove(from) {
                entries.insert(to.clone(), node);
            }
        }
        Op::Remove { name, .. } => {
            entries.remove(name);
        }
        Op::SetLen { .. } | Op::Write { .. } | Op::Sync { .. } => unreachable!("no change of names"),
    }
}

impl DirMedia {
    fn settle(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        pending.iter().for_each(|op| change(&mut self.safe, op));
    }

    fn survivor(&self, luck: Luck, rng: &mut Rng) -> BTreeMap<String, Node> {
        let mut entries = self.safe.clone();
        // A journal keeps the order of changes; other file systems need not.
        let first = rng.below(self.pending.len() + 1);
        let journal = rng.below(2) == 0;
        for (at, op) in self.pending.iter().enumerate() {
            let arrived = match luck {
                Luck::Nothing => false,
                Luck::Everything => true,
                Luck::Mixed if journal => at < first,
                Luck::Mixed => rng.below(2) == 0,
            };
            if arrived {
                change(&mut entries, op);
            }
        }
        entries
    }
}

impl FileMedia {
    fn set_len(&mut self, len: usize) {
        self.lens.push(len);
        for (_, sector) in self.sectors.range_mut(len.div_ceil(SECTOR)..) {
            sector.versions.push(None);
            sector.dirty = true;
        }
    }

    fn write(&mut self, at: usize, bytes: &Bytes) {
        assert!(at.is_multiple_of(SECTOR), "the cache writes whole sectors");
        let end = at + bytes.len();
        let longest = *self.lens.last().expect("never empty");
        if end > longest {
            self.lens.push(end);
        }
        for from in (at..end).step_by(SECTOR) {
            let piece = bytes.slice(from - at..(from + SECTOR).min(end) - at);
            let sector =
                self.sectors.entry(from / SECTOR).or_insert_with(|| Sector { versions: vec![None], dirty: false });
            sector.versions.push(Some(piece));
            sector.dirty = true;
        }
    }

    fn sync(&mut self, ok: bool) {
        for sector in self.sectors.values_mut().filter(|sector| sector.dirty) {
            sector.dirty = false;
            if ok {
                sector.versions.drain(..sector.versions.len() - 1);
            }
        }
        if ok {
            self.lens.drain(..self.lens.len() - 1);
        }
    }

    fn survivor(&self, births: bool, luck: Luck, rng: &mut Rng) -> FileState {
        let pick = |count: usize, rng: &mut Rng| match luck {
            Luck::Nothing => 0,
            Luck::Everything => count - 1,
            Luck::Mixed => rng.below(count),
        };
        let len = self.lens[pick(self.lens.len(), rng)];
        let mut file = FileState {
            bytes: vec![0; len],
            data: vec![false; len.div_ceil(BLOCK)],
            number: self.number,
            born: self.born,
            changed: self.changed,
        };
        // Allocated without having been written: some file systems call that data. Where births are not
        // told either, nothing could tell a new file from an old one.
        file.data.iter_mut().for_each(|data| *data = births && luck == Luck::Mixed && rng.below(2) == 0);
        for (&sector, state) in &self.sectors {
            let (at, version) = (sector * SECTOR, &state.versions[pick(state.versions.len(), rng)]);
            if let Some(bytes) = version.as_ref().filter(|_| at < len) {
                let end = len.min(at + bytes.len());
                file.bytes[at..end].copy_from_slice(&bytes[..end - at]);
                file.data[at / BLOCK] = true;
            }
        }
        file
    }
}
