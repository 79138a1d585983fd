//! AES-128-XTS as blobs use it (`blob.md` section 9): one call per unit, and a form of its own for
//! units shorter than a cipher block.

use aes::Aes128;
use aes::cipher::KeyInit;
use xts_mode::Xts128;

use super::CodecError;

/// Bytes of a key: two AES-128 keys, the first for data, the second for the tweak.
pub const KEY_LEN: usize = 32;
/// Bytes of an initialization vector.
pub const IV_LEN: usize = 16;

/// Shortest text that XTS can encrypt: one cipher block.
const CIPHER_BLOCK: usize = 16;
/// What every shorter text becomes before it is encrypted: a padded block and [`MARK`].
const PADDED: usize = CIPHER_BLOCK + MARK.len();
const MARK: [u8; 2] = [0x78, 0x90];

/// Both halves of a key are equal, which would make XTS weak; such keys are refused everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("both halves of the key are equal")]
pub struct EqualHalves;

/// The key and initialization vector of one blob: every unit of it is encrypted with the same pair.
///
/// Both lie in clear in the bootstrap, so whoever has an image can read it. `Debug` hides them all
/// the same: logs travel further than images.
#[derive(Clone, PartialEq, Eq)]
pub struct BlobKey {
    key: [u8; KEY_LEN],
    iv: [u8; IV_LEN],
}

impl BlobKey {
    /// Checks a key.
    pub fn new(key: [u8; KEY_LEN], iv: [u8; IV_LEN]) -> Result<Self, EqualHalves> {
        let (data, tweak) = key.split_at(KEY_LEN / 2);
        if data == tweak { Err(EqualHalves) } else { Ok(Self { key, iv }) }
    }

    /// The key as the blob table has it.
    pub fn key(&self) -> &[u8; KEY_LEN] {
        &self.key
    }

    /// The initialization vector as the blob table has it.
    pub fn iv(&self) -> &[u8; IV_LEN] {
        &self.iv
    }

    /// How many bytes a text of `plain` bytes becomes.
    pub fn encrypted_len(plain: u64) -> u64 {
        if plain < CIPHER_BLOCK as u64 { PADDED as u64 } else { plain }
    }

    /// Whether readers take `plain` for a padded short text once it is encrypted. A writer stores
    /// such a unit in another form.
    pub fn is_ambiguous(plain: &[u8]) -> bool {
        plain.len() == PADDED && plain.ends_with(&MARK)
    }

    /// Encrypts one unit: as many bytes as `plain` has, or 18 if it has fewer than 16.
    pub fn encrypt(&self, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(plain.len().max(PADDED));
        out.extend_from_slice(plain);
        if let Some(missing @ 1..) = CIPHER_BLOCK.checked_sub(plain.len()) {
            out.resize(CIPHER_BLOCK, u8::try_from(missing).expect("at most 16"));
            out.extend_from_slice(&MARK);
        }
        self.cipher().encrypt_sector(&mut out, self.iv.into());
        out
    }

    /// Decrypts one unit in place, and takes a short text out of its padding.
    ///
    /// # Errors
    /// If there are fewer bytes than a cipher block has. Damage is not noticed here: XTS has no
    /// checksum.
    pub fn decrypt(&self, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
        if bytes.len() < CIPHER_BLOCK {
            let detail = format!("{} bytes are less than a cipher block", bytes.len());
            return Err(CodecError::Damaged { codec: "aes-128-xts", detail });
        }
        self.cipher().decrypt_sector(bytes, self.iv.into());
        bytes.truncate(text_len(bytes));
        Ok(())
    }

    fn cipher(&self) -> Xts128<Aes128> {
        let (data, tweak) = self.key.split_at(KEY_LEN / 2);
        let aes = |key: &[u8]| Aes128::new_from_slice(key).expect("half a key has 16 bytes");
        Xts128::new(aes(data), aes(tweak))
    }
}

impl std::fmt::Debug for BlobKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobKey").finish_non_exhaustive()
    }
}

/// How many of the decrypted bytes are text. An 18-byte text that merely ends in the mark is told
/// from a padded one by the padding, which is the same byte throughout and counts itself.
fn text_len(bytes: &[u8]) -> usize {
    let Some(block) = bytes.strip_suffix(&MARK).filter(|block| block.len() == CIPHER_BLOCK) else {
        return bytes.len();
    };
    let missing = block[CIPHER_BLOCK - 1];
    let is_padding = (1..=CIPHER_BLOCK).contains(&usize::from(missing));
    let text = CIPHER_BLOCK.saturating_sub(missing.into());
    if is_padding && block[text..].iter().all(|&byte| byte == missing) { text } else { bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> BlobKey {
        let bytes = std::array::from_fn(|at| u8::try_from(at).unwrap());
        BlobKey::new(bytes, [7; IV_LEN]).unwrap()
    }

    #[test]
    fn the_cipher_is_the_one_of_the_standard() {
        // IEEE 1619, vector 2: keys of 0x11 and 0x22, data unit 0x3333333333, 32 bytes of 0x44.
        let mut bytes = [0x11; KEY_LEN];
        bytes[16..].fill(0x22);
        let mut iv = [0; IV_LEN];
        iv[..5].fill(0x33);

        let encrypted = BlobKey::new(bytes, iv).unwrap().encrypt(&[0x44; 32]);

        let want = [
            0xc4, 0x54, 0x18, 0x5e, 0x6a, 0x16, 0x93, 0x6e, 0x39, 0x33, 0x40, 0x38, 0xac, 0xef, 0x83, 0x8b, 0xfb, 0x18,
            0x6f, 0xff, 0x74, 0x80, 0xad, 0xc4, 0x28, 0x93, 0x82, 0xec, 0xd6, 0xd3, 0x94, 0xf0,
        ];
        assert_eq!(encrypted, want);
    }

    #[test]
    fn texts_of_every_length_come_back() {
        for len in 0..100u8 {
            let plain: Vec<u8> = (0..len).collect();
            let mut bytes = key().encrypt(&plain);
            assert_eq!(bytes.len() as u64, BlobKey::encrypted_len(len.into()));
            assert_ne!(bytes, plain);
            key().decrypt(&mut bytes).unwrap();
            assert_eq!(bytes, plain);
        }
    }

    #[test]
    fn a_text_that_only_ends_like_a_padded_one_is_kept() {
        let plain = *b"0123456789abcdef\x78\x90";
        assert!(BlobKey::is_ambiguous(&plain));
        let mut bytes = key().encrypt(&plain);
        key().decrypt(&mut bytes).unwrap();
        assert_eq!(bytes, plain);
    }

    #[test]
    fn weak_keys_and_cut_units_are_refused_and_keys_are_not_printed() {
        assert_eq!(BlobKey::new([9; KEY_LEN], [0; IV_LEN]), Err(EqualHalves));
        assert!(key().decrypt(&mut vec![0; 15]).is_err());
        assert_eq!(format!("{:?}", key()), "BlobKey { .. }");
    }
}
