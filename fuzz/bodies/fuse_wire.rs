//! What comes through `/dev/fuse`. An input is any number of requests, each behind its length in two bytes; the
//! name of one that looks something up becomes an entry of a listing.

use rafsd::export::fuse::negotiation::{MAJOR, MINOR, OLDEST_MINOR, Reaction, Wishes, negotiate};
use rafsd::export::fuse::reply::{Listed, Listing, Node, Times, Trust};
use rafsd::export::fuse::wire::{Question, Request, WireError};

/// The input for requests.
pub fn pack(requests: &[Vec<u8>]) -> Vec<u8> {
    let framed = requests.iter().map(|request| {
        let len = u16::try_from(request.len()).expect("requests are short");
        [&len.to_le_bytes()[..], request].concat()
    });
    framed.collect::<Vec<_>>().concat()
}

/// Whether all requests mean something.
pub fn run(mut input: &[u8]) -> bool {
    let mut all = true;
    while let [low, high, rest @ ..] = input {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (request, rest) = rest.split_at(len);
        input = rest;
        all &= read(request);
        // As the kernel would have it, whatever was changed behind its head.
        let mut whole = request.to_vec();
        if let Some(claimed) = whole.get_mut(..4) {
            claimed.copy_from_slice(&u32::try_from(len).expect("of two bytes").to_ne_bytes());
            read(&whole);
        }
    }
    all
}

/// Whether the request means something.
pub fn read(bytes: &[u8]) -> bool {
    let unique = bytes.get(8..16).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")));
    let request = match Request::parse(bytes) {
        Ok(request) => request,
        Err(error) => {
            assert!(error.owed_to().is_none_or(|owed| Some(owed) == unique), "somebody else is owed: {error}");
            assert!(!matches!(error, WireError::Short { .. }) || error.owed_to().is_none(), "nobody is known");
            return false;
        }
    };
    assert_eq!(Some(request.unique), unique);
    match request.question {
        Question::Init(offered) => {
            let every = Wishes { posix_acl: true, idmap: true, handles: true, changing: true, io_uring: Some(64) };
            for wishes in [Wishes::default(), every] {
                if let Reaction::Agree(out, agreed) = negotiate(&offered, wishes) {
                    assert_eq!((out.major, out.minor), (MAJOR, agreed.minor));
                    assert!((OLDEST_MINOR..=MINOR).contains(&agreed.minor), "{agreed:?}");
                    assert_eq!(agreed.flags & !agreed.offered, 0, "more than was offered");
                }
            }
        }
        Question::Lookup(name) => {
            assert!(!name.is_empty() && !name.contains(&0) && !name.contains(&b'/'));
            list(name, usize::try_from(request.node % 4096).expect("small"));
        }
        Question::Forget(forgotten) => {
            assert!(!request.question.wants_answer());
            let mut nodes = 0;
            forgotten.each(request.node, |_, _| nodes += 1);
            assert!(nodes * 16 <= bytes.len().max(16), "{nodes} nodes in {} bytes", bytes.len());
        }
        Question::Interrupt { .. } => assert!(!request.question.wants_answer()),
        _ => {}
    }
    true
}

/// Fills a listing of `size` bytes with entries of this name.
fn list(name: &[u8], size: usize) {
    let node = Node {
        id: 9,
        ino: 8,
        mode: 0o100_644,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: 5,
        blocks: 8,
        block_size: 4096,
        times: Times::all((1, 2)),
        trust: Trust::SHORT,
    };
    let entry = Listed { name, ino: 8, kind: 8, next: 1 };
    for with_nodes in [false, true] {
        let mut room = vec![0; size];
        let mut listing = Listing::new(&mut room);
        let mut added = 0_usize;
        while if with_nodes { listing.add_node(Some(&node), &entry) } else { listing.add(&entry) } {
            added += 1;
        }
        let one = (24 + name.len()).next_multiple_of(8) + if with_nodes { 128 } else { 0 };
        assert_eq!(listing.len(), added * one, "no part of an entry is left");
        assert!(added * one <= size && (added + 1) * one > size, "{added} of {one} bytes in {size}");
    }
}
