//! The body of an answer that is as long as what was asked for, or not an answer to it.

use bytes::Bytes;

use crate::base::ByteRange;

/// Hands on the pieces of a body as they come, the last one when it is known to be the last: whether a server
/// that sends too much is found out must not hang on how its bytes were cut into packets.
pub(super) struct Body {
    asked: u64,
    left: u64,
    /// The piece that made it complete.
    last: Bytes,
}

/// It went on behind what was asked for.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("it sent more than the {asked} bytes asked for")]
pub(super) struct TooLong {
    asked: u64,
}

/// It ended before.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("it sent {came} of {asked} bytes")]
pub(super) struct TooShort {
    came: u64,
    asked: u64,
}

impl Body {
    /// Nothing has come yet of `stored`, which is not empty.
    pub(super) fn of(stored: ByteRange) -> Self {
        Self { asked: stored.len(), left: stored.len(), last: Bytes::new() }
    }

    /// The next piece came.
    pub(super) fn piece(&mut self, piece: Bytes, take: &mut (dyn FnMut(Bytes) + Send)) -> Result<(), TooLong> {
        let left = self.left.checked_sub(piece.len() as u64).ok_or(TooLong { asked: self.asked })?;
        match (piece.is_empty(), left) {
            (true, _) => {}
            (false, 0) => self.last = piece,
            (false, _) => take(piece),
        }
        self.left = left;
        Ok(())
    }

    /// Nothing more comes.
    pub(super) fn end(self, take: &mut (dyn FnMut(Bytes) + Send)) -> Result<(), TooShort> {
        if self.left > 0 {
            return Err(TooShort { came: self.asked - self.left, asked: self.asked });
        }
        take(self.last);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is handed on of a body of six bytes that comes as `pieces`, and what is said of it.
    fn pour(pieces: &[&'static str]) -> (Vec<Bytes>, String) {
        let mut came = Vec::new();
        let mut body = Body::of(ByteRange::at(100, 6).unwrap());
        let mut take = |piece: Bytes| came.push(piece);
        for piece in pieces {
            if let Err(error) = body.piece(Bytes::from_static(piece.as_bytes()), &mut take) {
                return (came, error.to_string());
            }
        }
        let said = body.end(&mut take).map_or_else(|error| error.to_string(), |()| "whole".into());
        (came, said)
    }

    #[test]
    fn pieces_are_handed_on_in_order() {
        for pieces in [&["abcdef"][..], &["ab", "cdef"], &["a", "", "bcde", "f", ""]] {
            let (came, said) = pour(pieces);
            assert_eq!((came.concat(), said.as_str()), (b"abcdef".to_vec(), "whole"), "{pieces:?}");
            assert!(came.iter().all(|piece| !piece.is_empty()), "{pieces:?}");
        }
    }

    #[test]
    fn a_body_that_is_too_long_never_becomes_whole_however_it_is_cut() {
        for pieces in [&["abcdefg"][..], &["ab", "cdefg"], &["ab", "cdef", "g"], &["abcdef", "", "g"]] {
            let (came, said) = pour(pieces);
            assert_eq!(said, "it sent more than the 6 bytes asked for", "{pieces:?}");
            assert!(came.concat().len() < 6, "{pieces:?}");
        }
    }

    #[test]
    fn a_body_that_is_too_short_is_told_with_what_came() {
        for (pieces, said) in [(&[][..], "it sent 0 of 6 bytes"), (&["ab", "cd"], "it sent 4 of 6 bytes")] {
            assert_eq!(pour(pieces), (pieces.iter().map(|piece| Bytes::from(*piece)).collect(), said.to_owned()));
        }
    }
}
