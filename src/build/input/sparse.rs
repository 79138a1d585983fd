//! Sparse members of tar archives: their maps, and the bodies that put the holes back.

use std::io::{self, Read};

use super::pax::decimal;
use super::tarheader::{BLOCK, number};
use crate::build::chunk::Body;

/// Bytes of a sparse file that the archive holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Position in the file.
    pub offset: u64,
    pub len: u64,
}

/// Most segments of one file; compressed archives could otherwise ask for any amount of memory.
pub(super) const MAX_SEGMENTS: usize = 1 << 20;

/// Checks that segments are in order, inside a file of `real_size` bytes, and `stored` bytes long
/// together.
pub(super) fn check(map: &[Segment], real_size: u64, stored: u64) -> Result<(), String> {
    let (mut at, mut total) = (0u64, 0u64);
    for segment in map {
        let end = segment.offset.checked_add(segment.len).filter(|end| *end <= real_size);
        if segment.offset < at || end.is_none() {
            return Err("segments of a sparse file are out of order or out of bounds".into());
        }
        at = segment.offset + segment.len;
        total += segment.len;
    }
    if total != stored {
        return Err(format!("a sparse file stores {stored} bytes, but its map has {total}"));
    }
    Ok(())
}

/// Entries of an old GNU map: offset and length in 12 bytes each, empty ones at the end.
pub(super) fn gnu_entries(bytes: &[u8], map: &mut Vec<Segment>) -> Result<(), String> {
    for entry in bytes.chunks_exact(24).filter(|entry| entry[0] != 0) {
        let field = |field| number(field).and_then(|n| u64::try_from(n).ok()).ok_or("damaged sparse map");
        map.push(Segment { offset: field(&entry[..12])?, len: field(&entry[12..])? });
    }
    Ok(())
}

/// Reads the map in front of a version 1.0 sparse member: decimal numbers, one on a line, how
/// many segments first, padded to a block. `stored` is reduced by what was read.
pub(super) fn read_map(stream: &mut impl Read, stored: &mut u64) -> Result<Vec<Segment>, ReadMapError> {
    let mut lines = Lines { stream, stored, block: [0; BLOCK], at: BLOCK };
    let count = lines.number()?;
    if count > MAX_SEGMENTS as u64 {
        return Err(ReadMapError::Damaged);
    }
    let mut map = Vec::new();
    for _ in 0..count {
        map.push(Segment { offset: lines.number()?, len: lines.number()? });
    }
    Ok(map)
}

/// Why a map could not be read.
#[derive(Debug)]
pub(super) enum ReadMapError {
    Io(io::Error),
    Damaged,
}

struct Lines<'a, R> {
    stream: &'a mut R,
    stored: &'a mut u64,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64, ReadMapError> {
        let mut line = Vec::new();
        loop {
            if self.at == BLOCK {
                *self.stored = self.stored.checked_sub(BLOCK as u64).ok_or(ReadMapError::Damaged)?;
                self.stream.read_exact(&mut self.block).map_err(ReadMapError::Io)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => return decimal(&line).ok_or(ReadMapError::Damaged),
                _ if line.len() >= 20 => return Err(ReadMapError::Damaged),
                _ => line.push(byte),
            }
        }
    }
}

/// A sparse member with its holes.
pub(super) struct SparseBody<'a, R> {
    pub stream: &'a mut R,
    pub map: &'a [Segment],
    pub at: u64,
}

impl<R: Read> Body for SparseBody<'_, R> {
    fn fill(&mut self, plain: &mut [u8]) -> io::Result<()> {
        let mut rest = plain;
        while !rest.is_empty() {
            let (is_data, until) = self.here();
            let len = usize::try_from(until - self.at).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            if is_data {
                self.stream.read_exact(now)?
            } else {
                now.fill(0)
            }
            self.at += len as u64;
            rest = later;
        }
        Ok(())
    }

    fn skip_zeros(&mut self, len: u64) -> io::Result<bool> {
        let (is_data, until) = self.here();
        let skip = !is_data && until - self.at >= len;
        if skip {
            self.at += len;
        }
        Ok(skip)
    }
}

impl<R> SparseBody<'_, R> {
    /// Whether the next byte is in a segment, and where that changes.
    fn here(&mut self) -> (bool, u64) {
        while let Some((first, rest)) = self.map.split_first() {
            if self.at < first.offset {
                return (false, first.offset);
            }
            let end = first.offset + first.len;
            if self.at < end {
                return (true, end);
            }
            self.map = rest;
        }
        (false, u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_put_back_where_they_were() {
        let map = [Segment { offset: 2, len: 3 }, Segment { offset: 5, len: 0 }, Segment { offset: 8, len: 1 }];
        check(&map, 12, 4).unwrap();
        let mut body = SparseBody { stream: &mut b"abcd".as_slice(), map: &map, at: 0 };
        assert!(!body.skip_zeros(3).unwrap());
        let mut plain = [9; 10];
        body.fill(&mut plain).unwrap();
        assert_eq!(plain, *b"\0\0abc\0\0\0d\0");
        assert!(body.skip_zeros(2).unwrap());
    }

    #[test]
    fn maps_that_lie_are_refused() {
        let segment = |offset, len| Segment { offset, len };
        assert!(check(&[segment(4, 4), segment(0, 4)], 100, 8).is_err());
        assert!(check(&[segment(0, 4), segment(3, 4)], 100, 8).is_err());
        assert!(check(&[segment(u64::MAX, 2)], u64::MAX, 2).is_err());
        assert!(check(&[segment(96, 5)], 100, 5).is_err());
        assert!(check(&[segment(0, 5)], 100, 6).is_err());
    }
}
