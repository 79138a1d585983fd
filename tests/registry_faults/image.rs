//! A blob of five units, in all its forms.

use std::sync::LazyLock;

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange};
use rafsd::blob::{Check, Recipe, Unit, UnitMap};
use rafsd::codec::{Compressor, blake3, sha256};

/// Units of the blob. Each is read by a request of its own.
pub(crate) const UNITS: usize = 5;

/// Bytes of one unit before compression.
const UNIT: usize = 32 << 10;

/// The blob that is read.
pub(crate) static BLOB: LazyLock<Blob> = LazyLock::new(|| Blob::new(1));

/// One that should never be taken for it.
pub(crate) static OTHER: LazyLock<Blob> = LazyLock::new(|| Blob::new(2));

pub(crate) struct Blob {
    pub(crate) id: BlobId,
    pub(crate) stored: Bytes,
    pub(crate) plain: Vec<u8>,
    units: Vec<Unit>,
}

impl Blob {
    /// `seed` makes blobs differ.
    fn new(seed: u64) -> Self {
        let (mut plain, mut stored, mut units) = (Vec::new(), Vec::new(), Vec::new());
        let mut zstd = Compressor::zstd(1).unwrap();
        let mut random = seed;
        for _ in 0..UNITS {
            let bytes: Vec<u8> = (0..UNIT).map(|_| half_random(&mut random)).collect();
            let packed = zstd.compress(&bytes).expect("compressible");
            units.push(Unit {
                decoded: ByteRange::at(plain.len() as u64, UNIT as u64).unwrap(),
                stored: ByteRange::at(stored.len() as u64, packed.len() as u64).unwrap(),
                recipe: Recipe::Zstd,
                check: Check::Blake3(blake3(&bytes).0),
                part: None,
                encrypted: false,
            });
            stored.extend_from_slice(packed);
            plain.extend_from_slice(&bytes);
        }
        Self { id: sha256(&stored).to_string().parse().unwrap(), stored: stored.into(), plain, units }
    }

    pub(crate) fn map(&self) -> UnitMap {
        UnitMap::new(self.id.clone(), self.plain.len() as u64, self.units.clone()).unwrap()
    }

    /// Where a unit lies on the server.
    pub(crate) fn stored_unit(&self, unit: usize) -> ByteRange {
        self.units[unit].stored
    }

    /// What reader `number` wants of a unit: some block of it.
    pub(crate) fn wanted(&self, unit: usize, number: usize) -> ByteRange {
        let block = number % (UNIT / 4096);
        ByteRange::at((unit * UNIT + block * 4096) as u64, 4096).unwrap()
    }
}

/// Compresses to about half.
fn half_random(state: &mut u64) -> u8 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    state.to_le_bytes()[7] & 0x0f
}
