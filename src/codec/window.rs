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
    let shifted = shift(window, stored);
    let mut member = Member { inflate, filled: 0 };
    let Some(consumed) = member.run(&shifted, plain)? else { return Ok(()) };
    let mut rest = after_first_member(stored, consumed, window.bits)?;
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

/// The bits of `stored` behind the leftover ones of the byte before, so that inflation can start
/// on a byte.
fn shift(window: Window<'_>, stored: &[u8]) -> Vec<u8> {
    if window.bits == 0 {
        return stored.to_vec();
    }
    let mut shifted = Vec::with_capacity(stored.len() + 1);
    let mut carry = window.byte >> (8 - window.bits);
    for byte in stored {
        shifted.push(carry | byte << window.bits);
        carry = byte >> (8 - window.bits);
    }
    shifted.push(carry);
    shifted
}

/// What follows the trailer of a member that ended after `consumed` bytes of the shifted stream.
/// Its last byte of deflate may be the last but one of these, when only shifted bits reached
/// into the last; then a member header, or nothing, tells which it is.
fn after_first_member(stored: &[u8], consumed: usize, bits: u8) -> Result<&[u8], CodecError> {
    let early = consumed.checked_sub(usize::from(bits != 0)).and_then(|at| trailer(stored, at).ok());
    match early {
        Some(rest) if rest.starts_with(&MAGIC) || rest.is_empty() => Ok(rest),
        _ => trailer(stored, consumed),
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

    /// A raw stream with block borders at whole bytes, at each third of the plain bytes.
    fn in_thirds(plain: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        for part in plain.chunks(plain.len() / 3) {
            out.write_all(part).unwrap();
            out.flush().unwrap();
        }
        out.finish().unwrap()
    }

    #[test]
    fn inflation_starts_in_the_middle_of_a_byte_with_a_dictionary() {
        let plain = text(90_000, 7);
        let raw = in_thirds(&plain);
        // A sync flush ends with an empty stored block: 00 00 ff ff, after which a block starts.
        let border = raw.windows(4).position(|four| four == [0, 0, 0xff, 0xff]).unwrap() + 4;
        let (before, after) = plain.split_at(30_000);
        let dictionary = &before[before.len() - 30_000..];
        for bits in 0..8u8 {
            // The same stream, moved so that its first bits lie in the byte before.
            let mut moved = Vec::new();
            let tail = &raw[border..];
            let byte = if bits == 0 { 0 } else { tail[0] << (8 - bits) };
            for (i, &low) in tail.iter().enumerate() {
                let high = tail.get(i + 1).copied().unwrap_or(0);
                moved.push(if bits == 0 { low } else { low >> bits | high << (8 - bits) });
            }
            let mut out = vec![0; after.len()];
            gzip_window_decode(Window { bits, byte, dictionary }, &moved, &mut out)
                .unwrap_or_else(|e| panic!("{bits} bits: {e}"));
            assert!(out == after, "{bits} bits");
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
