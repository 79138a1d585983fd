//! Stored bytes to plain bytes. An input is: one byte, the codec; two bytes, the plain length;
//! the stored bytes.

use rafsd::codec::{self, CodecError};

use super::take;

/// The input for stored bytes that decode to `len` bytes; `codec` as in [`decode`].
pub fn pack(codec: u8, len: u16, stored: &[u8]) -> Vec<u8> {
    [[codec].as_slice(), &len.to_le_bytes(), stored].concat()
}

pub fn run(input: &[u8]) {
    let _ = decode(input);
}

pub fn decode(mut input: &[u8]) -> Result<(), CodecError> {
    let head = take(&mut input, 3);
    let len = usize::from(u16::from_le_bytes([head[1], head[2]]));
    // One byte more, to see that it is left alone.
    let mut out = vec![0xa5; len + 1];
    let plain = &mut out[..len];
    let decoded = match head[0] % 3 {
        0 => codec::lz4_block_decode(input, plain),
        1 => codec::gzip_decode(input, plain),
        _ => codec::zstd_decode(input, plain),
    };
    assert_eq!(out[len], 0xa5);
    decoded
}
