use super::{Check, Recipe, Unit};
use crate::base::Digest;
use crate::codec::{self, CodecError};

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
    /// The image does not say how to check this unit, so it cannot be trusted.
    #[error("the image names no digest for it")]
    Unverifiable,
}

/// Turns the stored bytes of `unit` into checked plain bytes.
///
/// `out` is the room for the unit's whole blocks and is filled completely: the plain bytes, then
/// zeros up to the block boundary. On error its contents mean nothing. The work is bounded by the
/// unit's decoded size whatever `stored` holds.
///
/// # Panics
/// If `out` is not exactly as long as [`Unit::blocks`].
pub fn decode(unit: &Unit, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    assert_eq!(out.len() as u64, unit.blocks().len(), "the caller makes room for whole blocks");
    if stored.len() as u64 != unit.stored.len() {
        return Err(DecodeError::StoredLength { got: stored.len(), want: unit.stored.len() });
    }
    if unit.check == Check::Unknown {
        return Err(DecodeError::Unverifiable);
    }
    let plain_len = usize::try_from(unit.decoded.len()).expect("a unit has at most 16 MiB");
    let (plain, padding) = out.split_at_mut(plain_len);
    padding.fill(0);
    match unit.recipe {
        Recipe::Plain if stored.len() == plain_len => plain.copy_from_slice(stored),
        Recipe::Plain => return Err(DecodeError::StoredLength { got: stored.len(), want: unit.decoded.len() }),
        Recipe::Lz4Block => codec::lz4_block_decode(stored, plain)?,
        Recipe::Zstd => codec::zstd_decode(stored, plain)?,
        Recipe::Gzip => codec::gzip_decode(stored, plain)?,
    }
    verify(&unit.check, plain)
}

fn verify(check: &Check, plain: &[u8]) -> Result<(), DecodeError> {
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
    use super::*;
    use crate::base::ByteRange;

    fn unit(recipe: Recipe, stored: &[u8], plain: &[u8]) -> Unit {
        Unit {
            decoded: ByteRange::at(4096, plain.len() as u64).unwrap(),
            stored: ByteRange::at(7, stored.len() as u64).unwrap(),
            recipe,
            check: Check::Blake3(codec::blake3(plain).0),
        }
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
            decode(&unit(recipe, &stored, &plain), &stored, &mut out).unwrap_or_else(|e| panic!("{recipe:?}: {e}"));
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
                if decode(&unit, &bad, &mut out).is_ok() {
                    assert_eq!(out[..plain.len()], plain, "{recipe:?} bit {bit}");
                }
            }
            assert!(decode(&unit, &stored[1..], &mut [0; 4096]).is_err(), "{recipe:?} cut");
        }
    }

    #[test]
    fn a_unit_without_a_promise_is_never_decoded() {
        let mut unit = unit(Recipe::Plain, b"x", b"x");
        unit.check = Check::Unknown;
        assert_eq!(decode(&unit, b"x", &mut [0; 4096]), Err(DecodeError::Unverifiable));
    }
}
