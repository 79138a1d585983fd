//! Three images that name one blob: two that agree about it, and one that lies.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange};
use rafsd::blob::{Check, Unit, UnitMap};
use rafsd::cache::{Device, Fill, StoreOptions};
use rafsd::codec::blake3;
use rafsd::source::{BlobSource, BoxFuture, ReadCtx, SourceError};
use tokio::runtime::{Handle, Runtime};

use super::model::Model;
use super::rng::Rng;

/// Units of the blob.
pub(crate) const UNITS: usize = 24;

/// The unit that scripts never read, so that no device becomes complete: then the store would flush
/// on a thread of its own, at a moment that no seed decides.
pub(crate) const NEVER_READ: usize = 10;

/// Where the liar's blob has other bytes.
const LIE: usize = 9;

const BLOB: &str = "one";

/// What an image knows about the blob, and the bytes it commits to.
pub(crate) struct Image {
    pub(crate) name: &'static str,
    /// Units it can check.
    pub(crate) known: Range<usize>,
    plain: Bytes,
    units: Vec<Unit>,
}

impl Image {
    fn new(name: &'static str, known: Range<usize>, lies: bool) -> Self {
        let mut rng = Rng::new(7);
        let (mut plain, mut units) = (Vec::new(), Vec::new());
        for number in 0..UNITS {
            let mut bytes: Vec<u8> =
                (0..4096 * (1 + number % 3)).map(|_| u8::try_from(rng.below(256)).expect("a byte")).collect();
            if lies && number == LIE {
                bytes.iter_mut().for_each(|byte| *byte = !*byte);
            }
            let at = plain.len() as u64;
            let check = if known.contains(&number) { Check::Blake3(blake3(&bytes).0) } else { Check::Unknown };
            let unit = Unit::plain(at, &bytes).expect("a small unit");
            units.push(Unit { check, stored: ByteRange::at(at, bytes.len() as u64).expect("small"), ..unit });
            plain.extend(bytes);
        }
        Self { name, known, plain: plain.into(), units }
    }

    /// All of them.
    pub(crate) fn all() -> &'static [Self; 3] {
        static ALL: OnceLock<[Image; 3]> = OnceLock::new();
        ALL.get_or_init(|| [Self::new("A", 0..14, false), Self::new("B", 8..UNITS, false), Self::new("L", 4..14, true)])
    }

    pub(crate) fn map(&self) -> UnitMap {
        UnitMap::new(BLOB.parse().expect("an id"), self.plain.len() as u64, self.units.clone()).expect("a map")
    }

    pub(crate) fn source(&self) -> Arc<dyn BlobSource> {
        Arc::new(Plain(self.plain.clone()))
    }

    pub(crate) fn range(&self, unit: usize) -> ByteRange {
        self.units[unit].blocks()
    }

    /// The units of this image that `device` calls present.
    pub(crate) fn present(&self, device: &Device) -> Vec<usize> {
        self.known.clone().filter(|&unit| device.present(self.range(unit))).collect()
    }

    /// Looks at everything `device` calls present as a kernel would.
    pub(crate) fn judge(&self, device: &Device, disk: &Model) -> Result<(), String> {
        let present = self.present(device);
        if present.is_empty() {
            return Ok(());
        }
        let path = device.data_path().expect("a device of a store");
        let wrong = disk.look_at(path, |content| {
            present.iter().copied().find(|&unit| {
                let range = self.range(unit);
                let cut = usize::try_from(range.start()).expect("small")..usize::try_from(range.end()).expect("small");
                content.get(cut.clone()) != Some(&self.plain[cut])
            })
        });
        match wrong {
            Ok(None) => Ok(()),
            Ok(Some(unit)) => {
                let (name, path) = (self.name, path.display());
                Err(format!("image {name} calls unit {unit} present, and its bytes in {path} are wrong"))
            }
            Err(error) => Err(format!("image {} has present units and no file: {error}", self.name)),
        }
    }
}

/// A blob in memory.
struct Plain(Bytes);

impl BlobSource for Plain {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Ok(self.0.len() as u64) })
    }

    fn read<'a>(&'a self, _: &'a BlobId, stored: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        let cut = usize::try_from(stored.start()).expect("small")..usize::try_from(stored.end()).expect("small");
        Box::pin(async move { Ok(self.0.slice(cut)) })
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

/// One thread for each thing, and nothing that happens by itself.
pub(crate) fn options() -> StoreOptions {
    StoreOptions {
        decode_threads: 1,
        readahead_first: 0,
        flush_every: Duration::from_secs(3600),
        ..StoreOptions::default()
    }
}

/// The runtime of all stores of this process.
pub(crate) fn runtime() -> Handle {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let start =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().expect("threads");
    RUNTIME.get_or_init(start).handle().clone()
}
