use super::parcel::Packed;
use crate::codec::Compressor;
use crate::codec::xts::BlobKey;

/// Turns plain bytes into stored ones: compressed where it pays, then encrypted if the blob is.
/// One per thread.
#[derive(Debug)]
pub(in crate::build) struct Packer {
    compressor: Compressor,
    key: Option<BlobKey>,
}

/// Texts below it are padded by the cipher, in a way that the table of batches cannot tell from
/// compression (`blob.md` section 11.3).
const LEAST_BATCH: usize = 16;
/// What a text is padded to that readers would misunderstand: longer than everything they take for
/// padded by the cipher.
const SAFE: usize = 32;

impl Packer {
    pub(in crate::build) fn new(compressor: Compressor, key: Option<BlobKey>) -> Self {
        Self { compressor, key }
    }

    /// Packs one chunk, behind what `out` holds.
    pub(in crate::build) fn chunk(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Packed {
        self.pack(plain, 0, out)
    }

    /// Packs a batch, behind what `out` holds.
    pub(in crate::build) fn batch(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Packed {
        self.pack(plain, LEAST_BATCH, out)
    }

    fn pack(&mut self, plain: &[u8], least: usize, out: &mut Vec<u8>) -> Packed {
        let from = out.len();
        let compressed = self.compressor.compress(plain);
        let Some(key) = &self.key else {
            return match compressed {
                None => Packed::Plain,
                Some(text) => {
                    out.extend_from_slice(text);
                    Packed::Bytes { from, len: text.len(), compressed: true }
                }
            };
        };
        let is_safe = |text: &&[u8]| text.len() >= least && !BlobKey::is_ambiguous(text);
        let compressed = compressed.filter(is_safe);
        if let Some(text) = compressed.or(Some(plain).filter(is_safe)) {
            out.extend_from_slice(&key.encrypt(text));
            return Packed::Bytes { from, len: out.len() - from, compressed: compressed.is_some() };
        }
        let mut padded = plain.to_vec();
        padded.resize(SAFE, 0);
        out.extend_from_slice(&key.encrypt(&padded));
        Packed::Padded { from, len: out.len() - from, whole: SAFE }
    }

    /// Packs a table of the blob: its stored bytes, and whether they are compressed.
    pub(in crate::build) fn table(&mut self, plain: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        match self.batch(plain, &mut out) {
            Packed::Plain => (plain.to_vec(), false),
            Packed::Bytes { compressed, .. } => (out, compressed),
            Packed::Padded { .. } => unreachable!("rows of tables are longer, and multiples of 8"),
        }
    }

    /// Encrypts what is never compressed.
    pub(in crate::build) fn bare(&self, plain: &[u8]) -> Vec<u8> {
        self.key.as_ref().map_or_else(|| plain.to_vec(), |key| key.encrypt(plain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> BlobKey {
        BlobKey::new(std::array::from_fn(|at| u8::try_from(at).unwrap()), [9; 16]).unwrap()
    }

    fn open(stored: &[u8]) -> Vec<u8> {
        let mut text = stored.to_vec();
        key().decrypt(&mut text).unwrap();
        text
    }

    #[test]
    fn texts_that_readers_would_misunderstand_are_never_encrypted() {
        let ambiguous = b"0123456789abcdef\x78\x90";
        let mut packer = Packer::new(Compressor::store(), Some(key()));
        let mut out = b"before".to_vec();

        let packed = packer.chunk(ambiguous, &mut out);

        assert_eq!(packed, Packed::Padded { from: 6, len: 32, whole: 32 });
        assert_eq!(open(&out[6..]), [ambiguous.as_slice(), &[0; 14]].concat());
        // A chunk says whether it is compressed, a batch does not.
        assert_eq!(packer.chunk(b"short", &mut Vec::new()), Packed::Bytes { from: 0, len: 18, compressed: false });
        assert_eq!(packer.batch(b"short", &mut Vec::new()), Packed::Padded { from: 0, len: 32, whole: 32 });
        assert_eq!(packer.batch(&[1; 16], &mut Vec::new()), Packed::Bytes { from: 0, len: 16, compressed: false });
    }

    #[test]
    fn batches_that_compress_too_well_stay_plain_when_encrypted() {
        let zeros = [0; 18];
        let mut lz4 = Packer::new(Compressor::lz4(), Some(key()));
        assert_eq!(lz4.chunk(&zeros, &mut Vec::new()), Packed::Bytes { from: 0, len: 18, compressed: true });
        let mut out = Vec::new();
        assert_eq!(lz4.batch(&zeros, &mut out), Packed::Bytes { from: 0, len: 18, compressed: false });
        assert_eq!(open(&out), zeros);
    }

    #[test]
    fn without_a_key_only_what_shrinks_is_packed() {
        let mut packer = Packer::new(Compressor::zstd(3).unwrap(), None);
        assert_eq!(packer.chunk(b"short", &mut Vec::new()), Packed::Plain);
        let mut out = Vec::new();
        let Packed::Bytes { from: 0, len, compressed: true } = packer.batch(&[7; 5000], &mut out) else {
            panic!("not compressed")
        };
        assert!(len == out.len() && len < 100);
        assert_eq!(packer.bare(b"header"), b"header");
    }
}
