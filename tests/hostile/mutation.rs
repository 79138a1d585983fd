//! Small ways to spoil bytes, and a way to run very many of them.

use std::fmt;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use super::support::tree::Random;

/// One change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    Flip {
        at: usize,
        bit: u8,
    },
    /// Overwrites the bytes from `at` on, little-endian as the format is.
    Write {
        at: usize,
        bytes: Vec<u8>,
    },
    Cut {
        len: usize,
    },
    /// Two at once: some checks only compare fields with each other.
    Both(Box<Self>, Box<Self>),
}

impl Mutation {
    pub(super) fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Flip { at, bit } => bytes[*at] ^= 1 << bit,
            Self::Write { at, bytes: new } => {
                let end = (at + new.len()).min(bytes.len());
                let at = (*at).min(end);
                bytes[at..end].copy_from_slice(&new[..end - at]);
            }
            Self::Cut { len } => bytes.truncate(*len),
            Self::Both(first, second) => {
                first.apply(bytes);
                second.apply(bytes);
            }
        }
    }

    pub(super) fn of(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = bytes.to_vec();
        self.apply(&mut out);
        out
    }
}

/// Every bit of `range`.
pub(super) fn flips(range: std::ops::Range<usize>) -> impl Iterator<Item = Mutation> {
    range.flat_map(|at| (0..8).map(move |bit| Mutation::Flip { at, bit }))
}

/// A field of 1, 2, 4 or 8 bytes in `range` with a value that is right for nothing, or almost
/// right.
pub(super) fn odd_value(random: &mut Random, range: std::ops::Range<usize>, bytes: &[u8]) -> Mutation {
    let width = 1usize << random.below(4);
    let slots = (range.len() / width).max(1) as u64;
    let at = range.start + usize::try_from(random.below(slots)).unwrap() * width;
    let mut old = [0; 8];
    for (to, from) in old.iter_mut().zip(&bytes[at.min(bytes.len())..(at + width).min(bytes.len())]) {
        *to = *from;
    }
    let old = u64::from_le_bytes(old);
    let len = bytes.len() as u64;
    let values = [
        0,
        1,
        u64::MAX,
        u64::MAX - 1,
        u64::MAX >> 1,
        1 << 63,
        1 << 31,
        0x7fff_ffff,
        0x8000,
        old.wrapping_add(1),
        old.wrapping_sub(1),
        old.wrapping_mul(2),
        old ^ 0x1000,
        old.wrapping_add(4096),
        len,
        len - 1,
        len + 1,
        len / 4096,
        len / 32,
        random.next(),
    ];
    let value = values[usize::try_from(random.below(values.len() as u64)).unwrap()];
    Mutation::Write { at, bytes: value.to_le_bytes()[..width].to_vec() }
}

/// Longest that one case may take: two thousand times what most take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs `check` on each case on a thread of its own; fails, naming the case, if `check` panics or
/// does not come back.
pub(super) fn for_each_case<C: fmt::Debug + Send + 'static>(
    what: &str,
    cases: Vec<C>,
    check: impl Fn(&C) + Send + 'static,
) {
    let at = Arc::new(Mutex::new((0, String::new())));
    let (done, finished) = mpsc::channel();
    let running = Arc::clone(&at);
    let worker = std::thread::spawn(move || {
        for (number, case) in cases.iter().enumerate() {
            *running.lock().unwrap() = (number, format!("{case:?}"));
            let clock = Instant::now();
            check(case);
            assert!(clock.elapsed() < PATIENCE, "took {:?}", clock.elapsed());
        }
        done.send(()).unwrap();
    });
    let mut last = usize::MAX;
    loop {
        match finished.recv_timeout(PATIENCE) {
            Ok(()) => return worker.join().unwrap(),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                panic!("{what}: case {:?} failed: {:?}", at.lock().unwrap(), worker.join().err());
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let now = at.lock().unwrap().clone();
                assert!(now.0 != last, "{what}: case {now:?} does not end");
                last = now.0;
            }
        }
    }
}
