//! Pure transforms of bytes: compression, encryption, digests, checksums.
//!
//! Every decoder takes the exact length of the plain bytes and gives an error for anything else,
//! so a hostile stream can neither overrun nor make memory grow.

mod window;
pub mod xts;

pub use window::{Window, gzip_window_decode};

use std::io::Read;

use crate::base::Digest;

/// A compressed stream that does not decode to the promised length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The stream is damaged.
    #[error("damaged {codec} stream: {detail}")]
    Damaged { codec: &'static str, detail: String },
    /// The stream is sound but holds another number of bytes.
    #[error("{codec} stream holds {got} bytes instead of {want}")]
    Length { codec: &'static str, got: usize, want: usize },
}

fn damaged(codec: &'static str) -> impl Fn(String) -> CodecError {
    move |detail| CodecError::Damaged { codec, detail }
}

fn exact(codec: &'static str, got: usize, want: usize) -> Result<(), CodecError> {
    if got == want { Ok(()) } else { Err(CodecError::Length { codec, got, want }) }
}

/// Decodes one raw LZ4 block (no frame, no size prefix) that must fill `plain`.
pub fn lz4_block_decode(stored: &[u8], plain: &mut [u8]) -> Result<(), CodecError> {
    let got = lz4_flex::block::decompress_into(stored, plain).map_err(|e| damaged("lz4")(e.to_string()))?;
    exact("lz4", got, plain.len())
}

/// Decodes one or more Zstandard frames that must fill `plain`.
pub fn zstd_decode(stored: &[u8], plain: &mut [u8]) -> Result<(), CodecError> {
    let want = plain.len();
    let got = zstd::bulk::decompress_to_buffer(stored, plain).map_err(|e| damaged("zstd")(e.to_string()))?;
    exact("zstd", got, want)
}

/// Decodes one or more Zstandard frames that hold exactly `want` bytes. Unlike [`zstd_decode`] it
/// takes no room before there are bytes to fill it, for lengths that nobody has vouched for.
pub fn zstd_decode_growing(stored: &[u8], want: u64) -> Result<Vec<u8>, CodecError> {
    let io = |e: std::io::Error| damaged("zstd")(e.to_string());
    let mut plain = Vec::new();
    let reader = zstd::stream::read::Decoder::with_buffer(stored).map_err(io)?;
    reader.take(want.saturating_add(1)).read_to_end(&mut plain).map_err(io)?;
    exact("zstd", plain.len(), usize::try_from(want).unwrap_or(usize::MAX))?;
    Ok(plain)
}

/// Decodes one gzip member that must fill `plain` exactly and end there.
pub fn gzip_decode(stored: &[u8], plain: &mut [u8]) -> Result<(), CodecError> {
    let io = |e: std::io::Error| damaged("gzip")(e.to_string());
    let mut reader = flate2::read::GzDecoder::new(stored);
    let mut filled = 0;
    while filled < plain.len() {
        match reader.read(&mut plain[filled..]).map_err(io)? {
            0 => return exact("gzip", filled, plain.len()),
            n => filled += n,
        }
    }
    // One more read makes the decoder check the trailer, and tells of surplus bytes.
    let surplus = reader.read(&mut [0; 1]).map_err(io)?;
    exact("gzip", filled + surplus, plain.len())
}

/// BLAKE3, default mode.
pub fn blake3(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> Digest {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    Digest(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

/// SHA-256 of bytes that come piece by piece.
#[derive(Clone)]
pub struct Sha256(ring::digest::Context);

impl Sha256 {
    /// The state before the first byte.
    pub fn new() -> Self {
        Self(ring::digest::Context::new(&ring::digest::SHA256))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(self) -> Digest {
        Digest(self.0.finish().as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sha256").finish_non_exhaustive()
    }
}

/// CRC-32C (Castagnoli), as RAFS and iSCSI use it (`blob.md` section 3.3).
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// Compresses units, reusing its tables and buffer from one to the next. One per thread.
pub struct Compressor {
    engine: Engine,
    buffer: Vec<u8>,
}

enum Engine {
    Store,
    Lz4(Box<lz4_flex::block::CompressTable>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

impl Compressor {
    /// Leaves bytes as they are.
    pub fn store() -> Self {
        Self { engine: Engine::Store, buffer: Vec::new() }
    }

    /// Raw LZ4 blocks.
    pub fn lz4() -> Self {
        // The small table is replaced by a large one at the first long input and then stays: output
        // would depend on what the thread compressed before.
        let table = Box::new(lz4_flex::block::CompressTable::large());
        Self { engine: Engine::Lz4(table), buffer: Vec::new() }
    }

    /// Zstandard frames with the content size in the header and no checksum.
    ///
    /// # Errors
    /// If `level` is outside what the library knows.
    pub fn zstd(level: i32) -> std::io::Result<Self> {
        Ok(Self { engine: Engine::Zstd(zstd::bulk::Compressor::new(level)?), buffer: Vec::new() })
    }

    /// The compressed form of `plain`, or `None` if it would not be strictly smaller, in which
    /// case the plain bytes are what must be stored (`blob.md` section 3).
    pub fn compress(&mut self, plain: &[u8]) -> Option<&[u8]> {
        // A destination one byte shorter than the input makes the engines give up by themselves.
        let room = plain.len().checked_sub(1)?;
        let len = match &mut self.engine {
            Engine::Store => return None,
            Engine::Lz4(table) => {
                // The block encoder wants its worst case as room before it starts.
                self.buffer.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
                lz4_flex::block::compress_into_with_table(plain, &mut self.buffer, table).ok()?
            }
            Engine::Zstd(engine) => {
                self.buffer.resize(room, 0);
                engine.compress_to_buffer(plain, &mut self.buffer[..]).ok()?
            }
        };
        (len <= room).then(|| &self.buffer[..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_parameters_are_those_of_the_format() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn incompressible_bytes_are_left_alone() {
        let noise: Vec<u8> = (0..4096u32).flat_map(|i| blake3(&i.to_le_bytes()).0).collect();
        assert_eq!(Compressor::zstd(3).unwrap().compress(&noise), None);
        assert_eq!(Compressor::lz4().compress(&noise), None);
        assert_eq!(Compressor::store().compress(b"aaaaaaaaaaaa"), None);
        assert_eq!(Compressor::lz4().compress(b""), None);
    }

    #[test]
    fn surplus_and_missing_bytes_are_errors() {
        let plain = vec![7; 1000];
        let packed = Compressor::zstd(3).unwrap().compress(&plain).unwrap().to_vec();
        assert!(zstd_decode(&packed, &mut [0; 999]).is_err());
        assert!(zstd_decode(&packed, &mut [0; 1001]).is_err());
        let packed = Compressor::lz4().compress(&plain).unwrap().to_vec();
        assert!(lz4_block_decode(&packed, &mut [0; 999]).is_err());
        assert!(lz4_block_decode(&packed, &mut [0; 1001]).is_err());
    }
}
