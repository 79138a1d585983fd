use std::fmt;
use std::str::FromStr;

/// A 32-byte digest; which algorithm made it is said where it is kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Parses 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        if text.len() != 64 {
            return None;
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            let nibble = |c: u8| (c as char).to_digit(16);
            *byte = u8::try_from(nibble(pair[0])? * 16 + nibble(pair[1])?).ok()?;
        }
        Some(Self(out))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The name of a blob: 1 to 64 bytes of letters, digits, `.`, `_` and `-`, not starting with a dot.
///
/// Normally 64 hexadecimal digits of a SHA-256 (`blob.md` section 8), but merged images may carry
/// shorter names taken from file names. The alphabet makes every id safe as a file name, as an
/// URL path segment and as a cachefiles cookie key.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId(String);

/// A blob name that could escape its directory or confuse a kernel key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("blob id {0:?} is not 1 to 64 letters, digits, '.', '_' or '-'")]
pub struct InvalidBlobId(String);

impl BlobId {
    /// Longest id, in bytes: the tag field of a device slot (`rafs-v6.md` section 4).
    pub const MAX_LEN: usize = 64;

    /// Reads an id from a field padded with NUL, as images keep it.
    pub fn from_padded(field: &[u8; Self::MAX_LEN]) -> Result<Self, InvalidBlobId> {
        let len = field.iter().position(|&b| b == 0).unwrap_or(field.len());
        String::from_utf8_lossy(&field[..len]).parse()
    }

    /// The id padded with NUL, as images keep it.
    pub fn to_padded(&self) -> [u8; Self::MAX_LEN] {
        let mut field = [0; Self::MAX_LEN];
        field[..self.0.len()].copy_from_slice(self.0.as_bytes());
        field
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BlobId {
    type Err = InvalidBlobId;

    fn from_str(text: &str) -> Result<Self, InvalidBlobId> {
        let fits = (1..=Self::MAX_LEN).contains(&text.len()) && !text.starts_with('.');
        let clean = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if fits && clean { Ok(Self(text.to_owned())) } else { Err(InvalidBlobId(text.to_owned())) }
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "a b", ".hidden", "a\0", &"f".repeat(65)] {
            assert!(bad.parse::<BlobId>().is_err(), "{bad:?}");
        }
        assert!("1".parse::<BlobId>().is_ok());
        assert!("f".repeat(64).parse::<BlobId>().is_ok());
    }

    #[test]
    fn digests_survive_a_round_trip_through_text() {
        let digest = Digest(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        assert_eq!(Digest::from_hex(&digest.to_string()), Some(digest));
        assert_eq!(Digest::from_hex("zz"), None);
        assert_eq!(Digest::from_hex(&"+".repeat(64)), None);
    }
}
