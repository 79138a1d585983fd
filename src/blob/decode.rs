use std::sync::Arc;

use super::zran::Contexts;
use super::{BlobKey, Check, Part, Recipe, Unit};
use crate::base::{ByteRange, Digest};
use crate::codec::{self, CodecError, Window};

/// Why stored bytes did not become the unit that the image promised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A different number of stored bytes than the unit has.
    #[error("{got} stored bytes instead of {want}")]
    StoredLength { got: usize, want: u64 },
    /// The compressed form is damaged.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The plain bytes are not the promised ones.
    #[error("digest is {got}, the image says {want}")]
    Digest { got: Digest, want: Digest },
    /// The plain bytes do not have the promised checksum.
    #[error("CRC-32C is {got:08x}, the image says {want:08x}")]
    Crc { got: u32, want: u32 },
    /// The unit is encrypted and nobody said with which key.
    #[error("it is encrypted, and there is no key")]
    NoKey,
    /// The unit claims bytes behind the end of what its stored range holds.
    #[error("its {len} bytes from {} do not lie in the {} of its batch", part.at, part.whole)]
    OutsideOfWhole { part: Part, len: usize },
    /// The unit lies in the middle of a gzip file, and nobody gave the place to enter it there.
    #[error("it lies in the middle of a gzip file, and there is no index that says how to enter it")]
    NeedsWindow,
    /// The image does not say how to check this unit, so it cannot be trusted.
    #[error("the image names no digest for it")]
    Unverifiable,
}

/// Turns the stored bytes of `unit` into checked plain bytes: [`Decoder::decode`] for a single unit.
///
/// # Panics
/// If `out` is not exactly as long as [`Unit::blocks`].
pub fn decode(unit: &Unit, key: Option<&BlobKey>, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    Decoder::new().decode(key, unit, stored, out)
}

/// Decodes the units of one blob, and remembers the plain bytes of the last stored range that
/// several of them share: the members of a batch, one behind the other, cost one decompression.
///
/// It trusts the caller in one thing: as long as the stored range is the same, so are the bytes.
/// Whoever fetches a range again takes a new decoder.
#[derive(Default)]
pub struct Decoder {
    /// What is in `plain`: a stored range, and how decoding it went.
    shared: Option<(Shared, Result<(), DecodeError>)>,
    plain: Vec<u8>,
    /// Decrypted bytes that are still compressed.
    clear: Vec<u8>,
    /// Places where a gzip file can be entered.
    windows: Option<Arc<Contexts>>,
}

/// Everything that decides what a shared stored range decodes to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shared {
    stored: ByteRange,
    recipe: Recipe,
    encrypted: bool,
    whole: u32,
}

impl Decoder {
    /// A decoder that remembers nothing yet, for a blob in a file of RAFS's own.
    pub fn new() -> Self {
        Self::default()
    }

    /// A decoder for a blob that is an index into a gzip file, with the contexts of this blob: units of
    /// [`Recipe::GzipWindow`] are decoded as well.
    pub fn with_windows(windows: Arc<Contexts>) -> Self {
        Self { windows: Some(windows), ..Self::default() }
    }

    /// Turns the stored bytes of `unit` into checked plain bytes. `key` is that of the blob's map.
    ///
    /// `out` is the room for the unit's whole blocks and is filled completely: the plain bytes,
    /// then zeros up to the block boundary. On error its contents mean nothing. The work and the
    /// memory are bounded by the decoded size of the unit, or of the batch it is part of, whatever
    /// `stored` holds.
    ///
    /// # Panics
    /// If `out` is not exactly as long as [`Unit::blocks`].
    pub fn decode(
        &mut self,
        key: Option<&BlobKey>,
        unit: &Unit,
        stored: &[u8],
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        assert_eq!(out.len() as u64, unit.blocks().len(), "the caller makes room for whole blocks");
        if stored.len() as u64 != unit.stored.len() {
            return Err(DecodeError::StoredLength { got: stored.len(), want: unit.stored.len() });
        }
        if !unit.is_checkable() {
            return Err(DecodeError::Unverifiable);
        }
        let plain_len = usize::try_from(unit.decoded.len()).expect("a unit has at most 16 MiB");
        let (plain, padding) = out.split_at_mut(plain_len);
        padding.fill(0);
        match unit.part {
            None => {
                let text = clear_text(key, unit, stored, &mut self.clear)?;
                unpack(unit, text, self.windows.as_deref(), plain)?;
            }
            Some(part) => {
                self.whole(key, unit, part, stored)?;
                let from = part.at as usize;
                let member = self.plain.get(from..from + plain_len);
                plain.copy_from_slice(member.ok_or(DecodeError::OutsideOfWhole { part, len: plain_len })?);
            }
        }
        verify(&unit.check, plain)
    }

    /// Makes `plain` the plain bytes of the stored range that `unit` is a part of.
    fn whole(&mut self, key: Option<&BlobKey>, unit: &Unit, part: Part, stored: &[u8]) -> Result<(), DecodeError> {
        let Unit { stored: range, recipe, encrypted, .. } = *unit;
        let shared = Shared { stored: range, recipe, encrypted, whole: part.whole };
        if let Some((known, outcome)) = &self.shared
            && *known == shared
        {
            return outcome.clone();
        }
        self.plain.clear();
        self.plain.resize(part.whole as usize, 0);
        let windows = self.windows.as_deref();
        let outcome = clear_text(key, unit, stored, &mut self.clear)
            .and_then(|text| unpack(unit, text, windows, &mut self.plain));
        self.shared = Some((shared, outcome.clone()));
        outcome
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

/// The stored bytes of `unit` without their encryption; `room` holds them if they had one.
fn clear_text<'a>(
    key: Option<&BlobKey>,
    unit: &Unit,
    stored: &'a [u8],
    room: &'a mut Vec<u8>,
) -> Result<&'a [u8], DecodeError> {
    if !unit.encrypted {
        return Ok(stored);
    }
    room.clear();
    room.extend_from_slice(stored);
    key.ok_or(DecodeError::NoKey)?.decrypt(room)?;
    Ok(room)
}

fn unpack(unit: &Unit, text: &[u8], windows: Option<&Contexts>, plain: &mut [u8]) -> Result<(), DecodeError> {
    // The sizes in a batch context are those of the padded text, so they cannot tell whether a short
    // encrypted batch is compressed (`blob.md` section 11.3). Its own length does: what is
    // compressed is always shorter.
    let is_plain = unit.part.is_some() && unit.encrypted && text.len() == plain.len();
    match if is_plain { Recipe::Plain } else { unit.recipe } {
        Recipe::Plain if text.len() == plain.len() => plain.copy_from_slice(text),
        Recipe::Plain => return Err(DecodeError::StoredLength { got: text.len(), want: plain.len() as u64 }),
        Recipe::Lz4Block => codec::lz4_block_decode(text, plain)?,
        Recipe::Zstd => codec::zstd_decode(text, plain)?,
        Recipe::Gzip => codec::gzip_decode(text, plain)?,
        Recipe::GzipWindow => codec::gzip_window_decode(window(unit, windows)?, text, plain)?,
    }
    Ok(())
}

/// Where the gzip file is entered for the stored range of `unit`.
fn window<'a>(unit: &Unit, windows: Option<&'a Contexts>) -> Result<Window<'a>, DecodeError> {
    let whole = u32::try_from(unit.whole_len()).expect("at most 16 MiB");
    let found = windows.and_then(|windows| Some((windows, windows.find(unit.stored, whole)?)));
    let (windows, context) = found.ok_or(DecodeError::NeedsWindow)?;
    Ok(Window { bits: context.bits, byte: context.byte, dictionary: windows.dictionary(context) })
}

/// Whether `plain` are the bytes that `check` promises.
pub fn verify(check: &Check, plain: &[u8]) -> Result<(), DecodeError> {
    let (got, want) = match check {
        Check::Blake3(want) => (codec::blake3(plain), Digest(*want)),
        Check::Sha256(want) => (codec::sha256(plain), Digest(*want)),
        Check::Crc32c(want) => {
            let got = codec::crc32c(plain);
            return if got == *want { Ok(()) } else { Err(DecodeError::Crc { got, want: *want }) };
        }
        Check::Unknown => return Err(DecodeError::Unverifiable),
    };
    if got == want { Ok(()) } else { Err(DecodeError::Digest { got, want }) }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;
    use crate::format::blobfile::ZranContext;

    fn unit(recipe: Recipe, stored: &[u8], plain: &[u8]) -> Unit {
        Unit {
            decoded: ByteRange::at(4096, plain.len() as u64).unwrap(),
            stored: ByteRange::at(7, stored.len() as u64).unwrap(),
            recipe,
            check: Check::Blake3(codec::blake3(plain).0),
            part: None,
            encrypted: false,
        }
    }

    fn key() -> BlobKey {
        BlobKey::new(std::array::from_fn(|at| u8::try_from(at).unwrap()), [5; 16]).unwrap()
    }

    /// The members `cuts` of one batch that holds `plain`.
    fn members(recipe: Recipe, stored: &[u8], plain: &[u8], cuts: &[std::ops::Range<usize>]) -> Vec<Unit> {
        let member = |cut: &std::ops::Range<usize>| {
            let part = Part { at: u32::try_from(cut.start).unwrap(), whole: u32::try_from(plain.len()).unwrap() };
            Unit {
                part: Some(part),
                stored: unit(recipe, stored, plain).stored,
                ..unit(recipe, stored, &plain[cut.clone()])
            }
        };
        cuts.iter().map(member).collect()
    }

    fn every_recipe(plain: &[u8]) -> Vec<(Recipe, Vec<u8>)> {
        let zstd = codec::Compressor::zstd(3).unwrap().compress(plain).unwrap().to_vec();
        let lz4 = lz4_flex::block::compress(plain);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut gzip, plain).unwrap();
        vec![
            (Recipe::Plain, plain.to_vec()),
            (Recipe::Zstd, zstd),
            (Recipe::Lz4Block, lz4),
            (Recipe::Gzip, gzip.finish().unwrap()),
        ]
    }

    #[test]
    fn every_recipe_gives_the_plain_bytes_padded_with_zeros() {
        let plain: Vec<u8> = (0..5000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        for (recipe, stored) in every_recipe(&plain) {
            let mut out = vec![0xff; 20480];
            decode(&unit(recipe, &stored, &plain), None, &stored, &mut out)
                .unwrap_or_else(|e| panic!("{recipe:?}: {e}"));
            assert_eq!(out[..plain.len()], plain, "{recipe:?}");
            assert!(out[plain.len()..].iter().all(|&b| b == 0), "{recipe:?}");
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_never_accepted_with_wrong_bytes() {
        let plain: Vec<u8> = (0..300u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        for (recipe, stored) in every_recipe(&plain) {
            let unit = unit(recipe, &stored, &plain);
            for bit in 0..stored.len() * 8 {
                let mut bad = stored.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let mut out = [0; 4096];
                if decode(&unit, None, &bad, &mut out).is_ok() {
                    assert_eq!(out[..plain.len()], plain, "{recipe:?} bit {bit}");
                }
            }
            assert!(decode(&unit, None, &stored[1..], &mut [0; 4096]).is_err(), "{recipe:?} cut");
        }
    }

    #[test]
    fn a_unit_without_a_promise_is_never_decoded() {
        let mut unit = unit(Recipe::Plain, b"x", b"x");
        unit.check = Check::Unknown;
        assert_eq!(decode(&unit, None, b"x", &mut [0; 4096]), Err(DecodeError::Unverifiable));
    }

    #[test]
    fn members_of_a_batch_are_cut_out_of_it_and_decompressed_once() {
        let plain: Vec<u8> = (0..5000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        for (recipe, stored) in every_recipe(&plain) {
            let cuts = [0..1, 1..5000, 5000..20000, 19999..20000];
            let mut decoder = Decoder::new();
            // Only the first member sees the bytes: the others come from what is remembered.
            let nothing = vec![0; stored.len()];
            for (number, (member, cut)) in members(recipe, &stored, &plain, &cuts).iter().zip(&cuts).enumerate() {
                let mut out = vec![0xff; usize::try_from(member.blocks().len()).unwrap()];
                let stored = if number == 0 { &stored } else { &nothing };
                decoder.decode(None, member, stored, &mut out).unwrap_or_else(|e| panic!("{recipe:?}: {e}"));
                assert_eq!(out[..cut.len()], plain[cut.clone()], "{recipe:?}");
                assert!(out[cut.len()..].iter().all(|&b| b == 0), "{recipe:?}");
            }
        }
    }

    #[test]
    fn a_damaged_batch_fails_every_member_and_the_next_one_is_read() {
        let plain = [7; 6000];
        let (recipe, stored) = every_recipe(&plain).remove(1);
        let pair = members(recipe, &stored, &plain, &[0..3000, 3000..6000]);
        let mut decoder = Decoder::new();
        let nothing = vec![0; stored.len()];
        for member in &pair {
            assert!(decoder.decode(None, member, &nothing, &mut [0; 4096]).is_err());
        }
        let moved = Unit { stored: ByteRange::at(900, stored.len() as u64).unwrap(), ..pair[0] };
        assert_eq!(decoder.decode(None, &moved, &stored, &mut [0; 4096]), Ok(()));
    }

    #[test]
    fn encrypted_units_need_their_key() {
        let plain: Vec<u8> = (0..5000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        for (recipe, stored) in every_recipe(&plain) {
            let stored = key().encrypt(&stored);
            let unit = Unit { encrypted: true, ..unit(recipe, &stored, &plain) };
            let mut out = vec![0; 20480];
            assert_eq!(decode(&unit, Some(&key()), &stored, &mut out), Ok(()), "{recipe:?}");
            assert_eq!(out[..plain.len()], plain, "{recipe:?}");
            assert_eq!(decode(&unit, None, &stored, &mut out), Err(DecodeError::NoKey), "{recipe:?}");
            let other = BlobKey::new(*key().key(), [6; 16]).unwrap();
            assert!(decode(&unit, Some(&other), &stored, &mut out).is_err(), "{recipe:?}");
        }
    }

    #[test]
    fn a_short_encrypted_batch_that_looks_compressed_is_read_as_it_was_written() {
        // 6 plain bytes are stored as 18: other sizes, so the tables call them compressed.
        let stored = key().encrypt(b"short!");
        let member = Unit {
            encrypted: true,
            ..members(Recipe::Zstd, &stored, b"short!", std::slice::from_ref(&(2..6))).remove(0)
        };
        let mut out = [0; 4096];
        assert_eq!(decode(&member, Some(&key()), &stored, &mut out), Ok(()));
        assert_eq!(out[..5], *b"ort!\0");
    }

    /// A raw deflate stream as an index with one context sees it: the context, and the middle chunk.
    fn window(plain: &[u8]) -> (Arc<Contexts>, Unit, Vec<u8>) {
        let mut stored = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut stored, plain).unwrap();
        let stored = stored.finish().unwrap();
        let mut row = ZranContext::new_zeroed();
        row.in_offset = 7.into();
        row.in_len = u32::try_from(stored.len()).unwrap().into();
        row.out_len = u32::try_from(plain.len()).unwrap().into();
        let contexts = Contexts::new(&[row], &[], 1 << 20).unwrap();
        let chunk =
            members(Recipe::GzipWindow, &stored, plain, std::slice::from_ref(&(100..plain.len() - 100))).remove(0);
        (Arc::new(contexts), chunk, stored)
    }

    #[test]
    fn chunks_of_a_gzip_file_are_decoded_by_who_knows_its_index() {
        let plain: Vec<u8> = (0..5000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        let (contexts, chunk, stored) = window(&plain);
        let mut out = vec![0xff; 20480];

        assert_eq!(decode(&chunk, None, &stored, &mut out), Err(DecodeError::NeedsWindow));
        assert_eq!(Decoder::with_windows(contexts.clone()).decode(None, &chunk, &stored, &mut out), Ok(()));

        assert_eq!(out[..plain.len() - 200], plain[100..plain.len() - 100]);
        let elsewhere = Unit { stored: ByteRange::at(8, chunk.stored.len()).unwrap(), ..chunk };
        let missing = Decoder::with_windows(contexts).decode(None, &elsewhere, &stored, &mut out);
        assert_eq!(missing, Err(DecodeError::NeedsWindow));
    }

    #[test]
    fn a_flipped_bit_in_a_gzip_file_is_never_accepted_with_wrong_bytes() {
        let plain: Vec<u8> = (0..300u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        let (contexts, chunk, stored) = window(&plain);
        let mut refused = 0;
        for bit in 0..stored.len() * 8 {
            let mut bad = stored.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut out = [0; 4096];
            match Decoder::with_windows(contexts.clone()).decode(None, &chunk, &bad, &mut out) {
                Ok(()) => assert_eq!(out[..plain.len() - 200], plain[100..plain.len() - 100], "bit {bit}"),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > stored.len(), "{refused}");
    }
}
