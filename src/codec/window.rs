use flate2::{Decompress, FlushDecompress, Status};

use super::{CodecError, damaged, exact};

/// A place in the middle of a gzip file where inflation can start (`blob.md` section 11.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window<'a> {
    /// Bits of `byte` that belong to what follows: 0 to 7, its highest.
    pub bits: u8,
    /// The byte before the stored ones.
    pub byte: u8,
    /// Plain bytes before the place, at most 32 KiB of them.
    pub dictionary: &'a [u8],
}

const NAME: &str = "gzip window";

/// Inflates `stored`, which starts at `window`, until `plain` is full. Goes on through further
/// members of the file. Checksums of members are not checked: the window may start behind their
/// beginning, so the caller has to have a digest.
///
/// # Errors
/// If the stream is damaged, or ends before `plain` is full.
pub fn gzip_window_decode(window: Window<'_>, stored: &[u8], plain: &mut [u8]) -> Result<(), CodecError> {
    if window.bits > 7 {
        return Err(damaged(NAME)(format!("{} bits before the first byte", window.bits)));
    }
    let mut inflate = Decompress::new(false);
    if !window.dictionary.is_empty() {
        inflate.set_dictionary(window.dictionary).map_err(|e| damaged(NAME)(e.to_string()))?;
    }
    let input = [&lead_in(window), stored].concat();
    let mut member = Member { inflate, filled: 0 };
    let Some(consumed) = member.run(&input, plain)? else { return Ok(()) };
    let mut rest = trailer(&input, consumed)?;
    loop {
        let body = gzip_body(rest)?;
        let mut next = Member { inflate: Decompress::new(false), filled: member.filled };
        let Some(consumed) = next.run(body, plain)? else { return Ok(()) };
        rest = trailer(body, consumed)?;
        member = next;
    }
}

/// One deflate stream on its way into the output.
struct Member {
    inflate: Decompress,
    filled: usize,
}

impl Member {
    /// Inflates until the output is full (`None`) or the stream ends: then after how many bytes.
    fn run(&mut self, input: &[u8], plain: &mut [u8]) -> Result<Option<usize>, CodecError> {
        let want = plain.len();
        loop {
            if self.filled == want {
                return Ok(None);
            }
            let consumed = |inflate: &Decompress| usize::try_from(inflate.total_in()).unwrap_or(usize::MAX);
            let (read_before, written_before) = (consumed(&self.inflate), self.inflate.total_out());
            let input = input.get(read_before..).unwrap_or_default();
            let status = self
                .inflate
                .decompress(input, &mut plain[self.filled..], FlushDecompress::None)
                .map_err(|e| damaged(NAME)(e.to_string()))?;
            let written = self.inflate.total_out() - written_before;
            self.filled += usize::try_from(written).expect("no more than the room");
            match status {
                _ if self.filled == want => return Ok(None),
                Status::StreamEnd => return Ok(Some(consumed(&self.inflate))),
                _ if written == 0 && consumed(&self.inflate) == read_before => exact(NAME, self.filled, want)?,
                _ => {}
            }
        }
    }
}

/// Bytes to inflate first where the window starts within a byte: blocks that give nothing and end where
/// the leftover bits begin, then these. The stored bytes cannot be moved instead, because blocks that
/// are not compressed start on a byte.
fn lead_in(window: Window<'_>) -> Vec<u8> {
    if window.bits == 0 {
        return Vec::new();
    }
    let mut lead = Bits::default();
    // One block has 91 bits, the other 10: together they end anywhere in a byte.
    if window.bits % 2 == 1 {
        lead.empty_block_of_91_bits();
    }
    while lead.count % 8 != u32::from(8 - window.bits) {
        lead.empty_block_of_10_bits();
    }
    lead.push((window.byte >> (8 - window.bits)).into(), window.bits.into());
    lead.bits.to_le_bytes()[..lead.count as usize / 8].to_vec()
}

/// At most 128 bits in the order of deflate (RFC 1951 section 3.1.1): the lowest of a byte first.
#[derive(Default)]
struct Bits {
    bits: u128,
    count: u32,
}

impl Bits {
    fn push(&mut self, value: u128, count: u32) {
        self.bits |= value << self.count;
        self.count += count;
    }

    /// Of the fixed code: not the last block, kind 1, end of block.
    fn empty_block_of_10_bits(&mut self) {
        self.push(0b010, 3);
        self.push(0, 7);
    }

    /// Of a code of its own, by which 255 and the end of the block have one bit, and one distance has.
    fn empty_block_of_91_bits(&mut self) {
        self.push(0b100, 3);
        // 257 lengths of literals, 1 of distances, 18 of the code for these.
        self.push(14 << 10, 14);
        // In their odd order: 18, a run of zeros, is the third, and 1 the last; both have one bit.
        self.push(1 << 6 | 1 << 51, 54);
        for run in [138, 117] {
            self.push(1, 1);
            self.push(run - 11, 7);
        }
        // 255, the end of the block, the distance: one bit each.
        self.push(0, 3);
        self.push(1, 1);
    }
}

const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

/// Steps over the checksum and length at `at`.
fn trailer(bytes: &[u8], at: usize) -> Result<&[u8], CodecError> {
    at.checked_add(8).and_then(|end| bytes.get(end..)).ok_or_else(|| damaged(NAME)("a member has no trailer".into()))
}

/// The deflate stream of the member that `bytes` start with (RFC 1952).
fn gzip_body(bytes: &[u8]) -> Result<&[u8], CodecError> {
    const HEADER_CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME_FIELD: u8 = 8;
    const COMMENT: u8 = 16;
    let cut = || damaged(NAME)("the stream ends before the plain bytes do".into());
    let (head, mut rest) = bytes.split_first_chunk::<10>().ok_or_else(cut)?;
    if head[..3] != MAGIC {
        return Err(damaged(NAME)("what follows a member is no member".into()));
    }
    let flags = head[3];
    if flags & EXTRA != 0 {
        let (len, behind) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
        rest = behind.get(usize::from(u16::from_le_bytes(*len))..).ok_or_else(cut)?;
    }
    for field in [NAME_FIELD, COMMENT] {
        if flags & field != 0 {
            let end = rest.iter().position(|&byte| byte == 0).ok_or_else(cut)?;
            rest = &rest[end + 1..];
        }
    }
    if flags & HEADER_CRC == 0 { Ok(rest) } else { rest.get(2..).ok_or_else(cut) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn text(len: u32, seed: u32) -> Vec<u8> {
        let mut state = seed | 1;
        (0..len)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if i % 7 == 0 { (state >> 24).to_le_bytes()[0] } else { b"the quick brown fox"[(i % 19) as usize] }
            })
            .collect()
    }

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut out = flate2::GzBuilder::new().filename("n").write(Vec::new(), flate2::Compression::default());
        out.write_all(plain).unwrap();
        out.finish().unwrap()
    }

    /// Deflate as it would be written bit by bit.
    #[derive(Default)]
    struct Stream(Vec<bool>);

    impl Stream {
        fn push(&mut self, value: u32, count: u32) {
            self.0.extend((0..count).map(|bit| value >> bit & 1 == 1));
        }

        /// The fixed code has its highest bit first.
        fn code(&mut self, code: u32, count: u32) {
            self.0.extend((0..count).rev().map(|bit| code >> bit & 1 == 1));
        }

        /// Repeats the last byte three times, then gives these of ASCII.
        fn fixed_block(&mut self, text: &[u8]) {
            self.push(0b010, 3);
            self.code(1, 7);
            self.code(0, 5);
            text.iter().for_each(|byte| self.code(0x30 + u32::from(*byte), 8));
            self.code(0, 7);
        }

        fn stored_block(&mut self, bytes: &[u8]) {
            self.push(0, 3);
            self.0.resize(self.0.len().next_multiple_of(8), false);
            let len = u32::try_from(bytes.len()).unwrap();
            self.push(len | (!len << 16), 32);
            bytes.iter().for_each(|byte| self.push((*byte).into(), 8));
        }

        fn bytes(&self) -> Vec<u8> {
            let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
            self.0.chunks(8).map(byte).collect()
        }
    }

    #[test]
    fn inflation_starts_in_the_middle_of_a_byte_with_a_dictionary() {
        for bits in 0..8u8 {
            let mut stream = Stream::default();
            // What came before: bits that must not matter.
            stream.push(0x55, (8 - u32::from(bits)) % 8);
            stream.fixed_block(b"text");
            stream.stored_block(b"as it is");
            stream.fixed_block(b"more");
            let file = stream.bytes();
            let (byte, stored) = if bits == 0 { (0, &file[..]) } else { (file[0], &file[1..]) };
            let mut out = [0; 22];

            gzip_window_decode(Window { bits, byte, dictionary: b"before-" }, stored, &mut out)
                .unwrap_or_else(|e| panic!("{bits} bits: {e}"));

            assert_eq!(out.escape_ascii().to_string(), "---textas it issssmore", "{bits} bits");
        }
    }

    #[test]
    fn the_trailer_is_found_behind_a_stream_that_began_in_the_middle_of_a_byte() {
        for bits in 0..8u8 {
            let mut stream = Stream::default();
            stream.push(0, (8 - u32::from(bits)) % 8);
            stream.fixed_block(b"one");
            // The last block: empty, of the fixed code.
            stream.push(0b011, 3);
            stream.code(0, 7);
            let file = [stream.bytes(), vec![9; 8], gzip(b"two")].concat();
            let (byte, stored) = if bits == 0 { (0, &file[..]) } else { (file[0], &file[1..]) };
            let mut out = [0; 9];

            gzip_window_decode(Window { bits, byte, dictionary: b"." }, stored, &mut out)
                .unwrap_or_else(|e| panic!("{bits} bits: {e}"));

            assert_eq!(&out, b"...onetwo", "{bits} bits");
        }
    }

    #[test]
    fn members_that_follow_are_read_through() {
        let (first, second) = (text(5000, 1), text(7000, 2));
        let file = [gzip(&first), gzip(&second)].concat();
        let body = &file[file.len() - gzip_body(&file).unwrap().len()..];

        let mut out = vec![0; 12_000];
        gzip_window_decode(Window { bits: 0, byte: 0, dictionary: &[] }, body, &mut out).unwrap();

        assert!(out == [first, second].concat());
        assert!(gzip_window_decode(Window { bits: 0, byte: 0, dictionary: &[] }, body, &mut [0; 12_001]).is_err());
    }

    #[test]
    fn any_flipped_bit_or_cut_gives_an_error_or_a_full_output() {
        let plain = text(3000, 3);
        let file = gzip(&plain);
        let body = gzip_body(&file).unwrap().to_vec();
        for bit in 0..body.len() * 8 {
            let mut bad = body.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let _ = gzip_window_decode(Window { bits: 3, byte: 0xff, dictionary: &plain }, &bad, &mut [0; 3000]);
            let _ = gzip_window_decode(Window { bits: 0, byte: 0, dictionary: &[] }, &bad, &mut [0; 3000]);
        }
        for cut in 0..body.len() - 8 {
            let cut = &body[..cut];
            assert!(gzip_window_decode(Window { bits: 0, byte: 0, dictionary: &[] }, cut, &mut [0; 3001]).is_err());
        }
        let eight = Window { bits: 8, byte: 0, dictionary: &[] };
        assert!(gzip_window_decode(eight, &body, &mut [0; 3000]).is_err());
    }
}
