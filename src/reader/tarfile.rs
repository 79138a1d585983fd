//! Digests for a plain tar layer, for which no image has any.
//!
//! The name of such a blob is the SHA-256 of the whole file. So the file is read once from front to
//! back; if it is what its name says, so was every unit of it on the way. Their digests are kept, and
//! whoever reads a unit later, perhaps from a file that has changed meanwhile, checks it like any other.

use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::base::{BlobId, ByteRange, Class, Digest};
use crate::blob::{Check, UnitMap};
use crate::codec::{self, Sha256};
use crate::source::{BlobSource, ReadCtx, SourceError};

/// How long one read may take, retries included.
const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes read at once, unless a unit is longer.
const PIECE: u64 = 8 << 20;

/// Why the data of a tar layer cannot be trusted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TarFileError {
    /// Anybody could have called anything by this name.
    #[error("the data of blob {blob} cannot be verified: it is a plain tar layer, and its name is no SHA-256")]
    Unnamed { blob: BlobId },
    /// The file is another one than its name says.
    #[error("the data of blob {blob} cannot be verified: it is a plain tar layer with the SHA-256 {got}")]
    Differs { blob: BlobId, got: Digest },
    /// The file did not come.
    #[error("cannot read blob {blob}")]
    Read {
        blob: BlobId,
        #[source]
        cause: SourceError,
    },
}

/// The map of a tar layer with a digest for each unit: reads the whole blob, and tells `watch` after
/// each piece how many bytes it had. Blocks; runs its reads on `runtime`.
pub fn digested(
    map: &UnitMap,
    source: &dyn BlobSource,
    runtime: &Handle,
    watch: &dyn Fn(u64),
) -> Result<UnitMap, TarFileError> {
    let blob = map.blob();
    let want = Digest::from_hex(blob.as_str()).ok_or_else(|| TarFileError::Unnamed { blob: blob.clone() })?;
    let failed = |cause| TarFileError::Read { blob: blob.clone(), cause };
    let ctx = || ReadCtx::new(Class::OnDemand, Instant::now() + DEADLINE);
    let len = runtime.block_on(source.len(blob, ctx())).map_err(failed)?;
    let mut whole = Sha256::new();
    let mut read = |range: ByteRange| {
        let bytes = runtime.block_on(source.read(blob, range, ctx())).map_err(failed)?;
        whole.update(&bytes);
        watch(range.len());
        Ok(bytes)
    };

    let mut units = map.units().to_vec();
    let mut end = 0;
    let together = units.first().map_or(1, |unit| (PIECE / unit.stored.len()).max(1));
    for group in units.chunks_mut(usize::try_from(together).expect("at most 8 Mi")) {
        let range = ByteRange::new(end, group[group.len() - 1].stored.end()).expect("units are sorted");
        let bytes = read(range)?;
        for unit in group {
            assert_eq!(unit.stored.start(), end, "a tar layer is cut into units without gaps");
            let within = |at: u64| usize::try_from(at - range.start()).expect("a piece is in memory");
            unit.check = Check::Blake3(codec::blake3(&bytes[within(end)..within(unit.stored.end())]).0);
            end = unit.stored.end();
        }
    }
    // What the image does not know of is part of the file all the same.
    while end < len {
        let range = ByteRange::at(end, PIECE).unwrap_or_default().clamp_end(len);
        read(range)?;
        end = range.end();
    }
    let got = whole.finish();
    if got != want {
        return Err(TarFileError::Differs { blob: blob.clone(), got });
    }
    Ok(UnitMap::new(blob.clone(), map.decoded_len(), units).expect("only checks have changed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::BLOCK;
    use crate::blob::{Recipe, Unit};
    use crate::source::LocalSource;

    /// The map of a file of `len` bytes that is called `name`, in units of `piece` bytes.
    fn map(name: &str, len: u64, piece: u64) -> UnitMap {
        let unit = |number| {
            let range = ByteRange::at(number * piece, piece).unwrap().clamp_end(len);
            Unit {
                decoded: range,
                stored: range,
                recipe: Recipe::Plain,
                check: Check::Unknown,
                part: None,
                encrypted: false,
            }
        };
        let units = (0..len.div_ceil(piece)).map(unit).collect();
        UnitMap::new(name.parse().unwrap(), len.next_multiple_of(BLOCK), units).unwrap()
    }

    /// What comes of a file `content` called `name` if the image knows its first `len` bytes.
    fn outcome(name: &str, content: &[u8], len: u64) -> Result<UnitMap, TarFileError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), content).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let source = LocalSource::new(dir.path()).unwrap();
        digested(&map(name, len, 3 << 20), &source, runtime.handle(), &|_| ())
    }

    fn content() -> Vec<u8> {
        (0..5_000_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 16).to_le_bytes()).collect()
    }

    #[test]
    fn each_unit_of_a_file_that_is_what_its_name_says_gets_its_digest() {
        let content = content();
        let name = codec::sha256(&content).to_string();
        let len = content.len() as u64;
        for known in [len, len - 512 * 3001] {
            let map = outcome(&name, &content, known).unwrap();

            assert!(map.units().len() > 5);
            for unit in map.units() {
                let (from, to) = (unit.stored.start(), unit.stored.end());
                let bytes = &content[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()];
                assert_eq!(unit.check, Check::Blake3(codec::blake3(bytes).0), "{}", unit.stored);
            }
        }
    }

    #[test]
    fn a_file_that_is_not_what_its_name_says_cannot_be_verified() {
        let mut content = content();
        let (name, len) = (codec::sha256(&content).to_string(), content.len() as u64);
        *content.last_mut().unwrap() ^= 1;

        for known in [len, 4096, 0] {
            let error = outcome(&name, &content, known).unwrap_err();
            assert!(matches!(&error, TarFileError::Differs { got, .. } if *got == codec::sha256(&content)), "{error}");
        }
        assert!(matches!(outcome("layer", &content, len), Err(TarFileError::Unnamed { .. })));
        let cut = outcome(&name, &content[..content.len() - 1], len);
        assert!(matches!(cut, Err(TarFileError::Read { cause: SourceError::OutOfRange { .. }, .. })), "{cut:?}");
    }
}
