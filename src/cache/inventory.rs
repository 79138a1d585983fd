//! What is in a store, for people and for accounts.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::bits::{self, Identity};
use super::is_needed;
use super::place::identity;
use super::presence::{bit, set_bit, words_for};
use super::shelves::{Shelf, Shelves, allocated};
use super::store::StoreError;
use super::victims::LotKind;
use crate::base::BlobId;
use crate::blob::UnitMap;

/// Everything in a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Inventory {
    /// One entry for each directory of a blob, sorted by name.
    pub blobs: Vec<BlobStock>,
    pub bootstraps: Vec<BootstrapStock>,
    /// Bytes on disk of the kernel's own cache, as far as its files have names.
    pub kernel_cache_bytes: u64,
    /// Bytes on disk of what images have promised about it.
    pub promises_bytes: u64,
}

/// What there is of one blob.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BlobStock {
    /// The blob's id, or that and 16 digits where images disagree about it.
    pub name: String,
    /// The blob's id; `None` if its map is damaged: then nothing of it is trusted.
    pub blob: Option<String>,
    /// Bytes and inodes that it really takes on disk.
    pub bytes: u64,
    pub inodes: u64,
    /// Bytes of the whole decoded blob.
    pub decoded_bytes: u64,
    /// Units that some image names, and those of them that are present.
    pub units: u32,
    pub units_present: u32,
    /// Whether nothing that an image names is missing.
    pub complete: bool,
    /// When it was last taken into use or let go, in seconds since 1970.
    pub last_used: u64,
    pub pinned: bool,
    /// Whether a mounted image uses it, or anybody else has it open.
    pub in_use: bool,
}

/// One copy of a bootstrap.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BootstrapStock {
    /// Its SHA-256.
    pub name: String,
    pub bytes: u64,
    pub last_used: u64,
    pub in_use: bool,
}

impl Inventory {
    /// Bytes on disk of everything.
    pub fn bytes(&self) -> u64 {
        let blobs: u64 = self.blobs.iter().map(|blob| blob.bytes).sum();
        let bootstraps: u64 = self.bootstraps.iter().map(|bootstrap| bootstrap.bytes).sum();
        blobs + bootstraps + self.kernel_cache_bytes + self.promises_bytes
    }
}

/// The units of one blob, and which of them can be trusted.
pub(super) struct Shelved {
    pub(super) map: UnitMap,
    pub(super) words: Vec<u64>,
    pub(super) identity: Identity,
}

impl Shelved {
    fn needed(&self) -> u32 {
        self.map.checkable().0
    }

    fn present(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether nothing that can be present is missing.
    pub(super) fn is_complete(&self) -> bool {
        let needed = self.needed();
        (needed > 0 || self.map.count() == 0) && self.present() >= needed
    }
}

impl Shelves {
    /// Everything that is there. Reads the maps of all blobs.
    pub fn inventory(&self) -> Result<Inventory, StoreError> {
        let blobs = self.names()?.into_iter().map(|name| self.stock(name)).collect();
        let bootstrap = |lot: super::victims::Lot| BootstrapStock {
            name: lot.name,
            bytes: lot.bytes,
            last_used: lot.last_used,
            in_use: lot.held,
        };
        let mut bootstraps: Vec<_> = self.bootstraps().lots().into_iter().map(bootstrap).collect();
        bootstraps.sort_by(|a, b| a.name.cmp(&b.name));
        let (kernel_cache_bytes, promises_bytes) = self.other_bytes();
        Ok(Inventory { blobs, bootstraps, kernel_cache_bytes, promises_bytes })
    }

    fn stock(&self, name: String) -> BlobStock {
        let (bytes, inodes) = allocated(&self.dir(&name));
        let alive = self.alive();
        let (in_use, device) = (self.is_used(&alive, &name), alive.get(&name).and_then(|shelf| shelf.device.upgrade()));
        drop(alive);
        let mut stock = BlobStock {
            blob: None,
            bytes,
            inodes,
            decoded_bytes: 0,
            units: 0,
            units_present: 0,
            complete: false,
            last_used: self.last_used(&name),
            pinned: self.is_pinned(&name),
            in_use,
            name,
        };
        if let Some(device) = device {
            let (map, stats) = (device.map(), device.stats());
            stock.describe(map.blob(), map.decoded_len());
            (stock.units, stock.units_present) = (stats.units, stats.units_present);
            stock.complete = stats.complete;
        } else if let Some(shelved) = self.shelved(&stock.name) {
            stock.describe(shelved.map.blob(), shelved.map.decoded_len());
            (stock.units, stock.units_present) = (shelved.needed(), shelved.present());
            stock.complete = shelved.is_complete();
        }
        stock
    }

    /// What the files in directory `name` prove; `None` if they prove nothing.
    pub(super) fn shelved(&self, name: &str) -> Option<Shelved> {
        let place = self.place(name);
        let map = place.saved()?;
        // Not opened, for that would count as a use.
        let data = place.disk.facts(&place.data()).ok()?;
        let fits = data.is_file && data.len == map.decoded_len();
        let identity = fits.then(|| identity(&map, &data))?;
        let read = bits::read(&place.disk.read(&place.dir.join("present")).unwrap_or_default(), &identity);
        let mut words = vec![0; words_for(map.count())];
        for (index, unit) in (0..).zip(map.units()) {
            if is_needed(unit) && bit(&read, index) {
                set_bit(&mut words, index);
            }
        }
        Some(Shelved { map, words, identity })
    }

    /// Tells the index of twins of every complete blob that is not open, for open ones tell of
    /// themselves.
    pub(super) fn tell_twins(&self) {
        self.names().unwrap_or_default().iter().for_each(|name| self.tell_twins_of(name));
    }

    /// The same for the blob in directory `name`, if there is one.
    pub(super) fn tell_twins_of(&self, name: &str) {
        let data = self.dir(name).join("data");
        // Looked at before its map is read, which may be large, and once more afterwards.
        let is_alive = || self.alive().get(name).is_some_and(Shelf::is_alive);
        if self.twins.knows(&data) || is_alive() {
            return;
        }
        let Some(shelved) = self.shelved(name).filter(Shelved::is_complete) else { return };
        let alive = self.alive();
        // One that was opened since may have become incomplete by what its image adds.
        if !alive.get(name).is_some_and(Shelf::is_alive) {
            self.twins.add(&data, &shelved.map);
        }
    }

    /// Bytes on disk of everything, measured now.
    pub fn bytes(&self) -> u64 {
        let blobs: u64 = self.names().unwrap_or_default().iter().map(|name| allocated(&self.dir(name)).0).sum();
        let (kernel, promises) = self.other_bytes();
        blobs + allocated(self.bootstraps().dir()).0 + kernel + promises
    }

    /// Bytes and inodes on disk of one thing; nothing if it is not there.
    pub fn allocated(&self, kind: LotKind, name: &str) -> (u64, u64) {
        match kind {
            LotKind::Blob => allocated(&self.dir(name)),
            LotKind::Bootstrap => allocated(&self.bootstraps().dir().join(name)),
            LotKind::Kernel => allocated(&self.root.join("cachefiles/cache").join(name)),
        }
    }
}

impl BlobStock {
    fn describe(&mut self, blob: &BlobId, decoded_bytes: u64) {
        self.blob = Some(blob.to_string());
        self.decoded_bytes = decoded_bytes;
    }
}

/// When a file was last changed, in seconds since 1970.
pub(super) fn changed(path: &std::path::Path) -> Option<u64> {
    u64::try_from(fs::metadata(path).ok()?.mtime()).ok()
}
