//! One range, brought by several attempts.

use std::sync::Mutex;

use bytes::Bytes;

use crate::base::ByteRange;

/// The bytes of one range on their way from several attempts to one taker, who gets each once and in order.
pub(super) struct Relay<'a> {
    end: u64,
    state: Mutex<Handed<'a>>,
}

struct Handed<'a> {
    /// All before this has been.
    at: u64,
    take: &'a mut (dyn FnMut(Bytes) + Send),
}

impl<'a> Relay<'a> {
    pub(super) fn new(stored: ByteRange, take: &'a mut (dyn FnMut(Bytes) + Send)) -> Self {
        Self { end: stored.end(), state: Mutex::new(Handed { at: stored.start(), take }) }
    }

    /// What has not come.
    pub(super) fn rest(&self) -> ByteRange {
        ByteRange::new(self.state.lock().unwrap().at, self.end).unwrap_or_default()
    }

    /// Hands on what is new of a piece that begins at `at`, and says where the piece ends. Nothing behind the end is handed on.
    /// `brought` is told before which bytes were new.
    pub(super) fn hand_on(&self, at: u64, mut piece: Bytes, brought: &mut dyn FnMut(ByteRange)) -> u64 {
        let mut handed = self.state.lock().unwrap();
        let end = at.saturating_add(piece.len() as u64);
        let within = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        piece.truncate(within(self.end.saturating_sub(at)));
        let known = within(handed.at.saturating_sub(at));
        if known < piece.len() {
            let new = piece.split_off(known);
            let from = std::mem::replace(&mut handed.at, end.min(self.end));
            brought(ByteRange::new(from, handed.at).unwrap_or_default());
            (handed.take)(new);
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_beside_each_other_bring_each_byte_once_and_nothing_behind_the_end() {
        let mut came = Vec::new();
        let mut take = |piece: Bytes| came.push(piece);
        let relay = Relay::new(ByteRange::new(100, 110).unwrap(), &mut take);

        assert_eq!(relay.hand_on(100, Bytes::from_static(b"abc"), &mut |_| ()), 103);
        assert_eq!(relay.hand_on(100, Bytes::from_static(b"ab"), &mut |_| ()), 102);
        assert_eq!(relay.hand_on(102, Bytes::from_static(b"cdef"), &mut |_| ()), 106);
        assert_eq!(relay.rest(), ByteRange::new(106, 110).unwrap());
        assert_eq!(relay.hand_on(103, Bytes::from_static(b"defghijkl"), &mut |_| ()), 112);
        assert_eq!(relay.hand_on(112, Bytes::from_static(b"m"), &mut |_| ()), 113);
        assert!(relay.rest().is_empty());

        assert_eq!(came, ["abc", "def", "ghij"]);
    }
}
