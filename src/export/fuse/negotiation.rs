//! What is agreed upon with the kernel at the start of a connection: pure arithmetic.
//!
//! The kernel offers flags in the first request and takes those that come back with the answer. This is never
//! repeated while the connection lives, so whoever goes on with it must know the outcome: [`Negotiated`].

use serde::{Deserialize, Serialize};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::wire::InitIn;

/// The protocol that is spoken. The kernel knows only this major version.
pub const MAJOR: u32 = 7;
/// The newest minor version whose meaning is known here: Linux 6.18.
pub const MINOR: u32 = 45;
/// The oldest that is served: of Linux 5.4.
pub const OLDEST_MINOR: u32 = 31;

/// Most bytes of one read.
pub const MAX_READ: u32 = 1 << 20;
/// Nothing is ever written; more would only make the buffers for requests larger. The least that the kernel
/// takes.
pub const MAX_WRITE: u32 = 4096;
/// Most pages of one request: those of [`MAX_READ`], and what the kernel allows without a sysctl.
const MAX_PAGES: u16 = 256;
/// Read-ahead requests on their way at once. The kernel's 12 would let one slow fetch stall the next file.
const MAX_BACKGROUND: u16 = 128;
/// From so many on, the kernel calls the file system congested.
const CONGESTED: u16 = MAX_BACKGROUND / 4 * 3;

/// Flags of the handshake.
pub mod flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_RESEND: u64 = 1 << 39;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
    pub const OVER_IO_URING: u64 = 1 << 41;

    /// Flags by the names that people find in the kernel's header.
    pub const NAMES: [(u64, &str); 18] = [
        (ASYNC_READ, "ASYNC_READ"),
        (EXPORT_SUPPORT, "EXPORT_SUPPORT"),
        (AUTO_INVAL_DATA, "AUTO_INVAL_DATA"),
        (DO_READDIRPLUS, "DO_READDIRPLUS"),
        (READDIRPLUS_AUTO, "READDIRPLUS_AUTO"),
        (ASYNC_DIO, "ASYNC_DIO"),
        (NO_OPEN_SUPPORT, "NO_OPEN_SUPPORT"),
        (PARALLEL_DIROPS, "PARALLEL_DIROPS"),
        (POSIX_ACL, "POSIX_ACL"),
        (ABORT_ERROR, "ABORT_ERROR"),
        (MAX_PAGES, "MAX_PAGES"),
        (CACHE_SYMLINKS, "CACHE_SYMLINKS"),
        (NO_OPENDIR_SUPPORT, "NO_OPENDIR_SUPPORT"),
        (EXPLICIT_INVAL_DATA, "EXPLICIT_INVAL_DATA"),
        (INIT_EXT, "INIT_EXT"),
        (HAS_RESEND, "HAS_RESEND"),
        (ALLOW_IDMAP, "ALLOW_IDMAP"),
        (OVER_IO_URING, "OVER_IO_URING"),
    ];
}

/// What is wanted where it is offered.
const WANTED: u64 = flag::ASYNC_READ
    | flag::DO_READDIRPLUS
    | flag::READDIRPLUS_AUTO
    | flag::ASYNC_DIO
    | flag::NO_OPEN_SUPPORT
    | flag::PARALLEL_DIROPS
    | flag::ABORT_ERROR
    | flag::MAX_PAGES
    | flag::CACHE_SYMLINKS
    | flag::NO_OPENDIR_SUPPORT
    | flag::EXPLICIT_INVAL_DATA
    | flag::INIT_EXT
    | flag::HAS_RESEND;

/// What is not wanted for a tree that changes: that opens are not asked for, that links are remembered, that
/// listings tell of nodes, each of which would have to be remembered here whether anybody wants it or not.
const ONLY_UNCHANGING: u64 = flag::NO_OPEN_SUPPORT
    | flag::NO_OPENDIR_SUPPORT
    | flag::CACHE_SYMLINKS
    | flag::EXPLICIT_INVAL_DATA
    | flag::DO_READDIRPLUS
    | flag::READDIRPLUS_AUTO;

/// What one connection wants beyond what all want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The kernel is to check access by the access control lists that it finds in extended attributes.
    pub posix_acl: bool,
    /// Mounts of it may have their owners mapped: the kernel checks permissions, and we never look at who asks.
    pub idmap: bool,
    /// Nodes are found by number alone, with `.` for the node and `..` for the directory above one: a handle
    /// of a file is good for ever, also when the kernel has forgotten the file.
    pub handles: bool,
    /// Somebody else may change what is shown: the kernel is to ask at each open, and to drop what it knows of a
    /// file whose length or time it finds changed.
    pub changing: bool,
    /// Requests are to come over io_uring, of at most so many pages.
    pub io_uring: Option<u16>,
}

impl Negotiated {
    /// Whether requests come over io_uring.
    pub fn over_io_uring(&self) -> bool {
        self.flags & flag::OVER_IO_URING != 0
    }
}

/// What was agreed upon. A successor goes on by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    pub minor: u32,
    /// [`flag`]s in force.
    pub flags: u64,
    /// Most bytes of one read.
    pub max_read: u32,
    /// All that the kernel offered, for people.
    pub offered: u64,
}

/// What is said to an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// The answer, and what is in force once it is given.
    Agree(InitOut, Negotiated),
    /// The kernel speaks a later major version: it is told ours and asks again.
    AskAgain(InitOut),
    /// It is too old.
    Refuse,
}

/// `struct fuse_init_out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_gran: u32,
    pub max_pages: u16,
    pub map_alignment: u16,
    pub flags2: u32,
    pub max_stack_depth: u32,
    pub request_timeout: u16,
    pub unused: [u16; 11],
}

const _: () = assert!(size_of::<InitOut>() == 64);

/// Decides what to answer to `offered`.
pub fn negotiate(offered: &InitIn, wishes: Wishes) -> Reaction {
    let has_second = offered.flags & low(flag::INIT_EXT) != 0;
    let all = u64::from(offered.flags) | if has_second { u64::from(offered.flags2) << 32 } else { 0 };
    let mut wanted = WANTED;
    if wishes.changing {
        wanted = wanted & !ONLY_UNCHANGING | flag::AUTO_INVAL_DATA;
    }
    for (wished, flags) in [
        (wishes.posix_acl, flag::POSIX_ACL),
        (wishes.idmap, flag::ALLOW_IDMAP),
        (wishes.handles, flag::EXPORT_SUPPORT),
        (wishes.io_uring.is_some(), flag::OVER_IO_URING),
    ] {
        wanted |= if wished { flags } else { 0 };
    }
    let flags = all & wanted;
    // Each slot of a ring has memory for the longest request.
    let ring_pages = wishes.io_uring.filter(|_| flags & flag::OVER_IO_URING != 0);
    let max_pages = ring_pages.map_or(MAX_PAGES, |pages| pages.min(MAX_PAGES));
    let minor = offered.minor.min(MINOR);
    let out = InitOut {
        major: MAJOR,
        minor,
        // It can only be lowered here; the mount's own setting is what counts.
        max_readahead: offered.max_readahead,
        flags: low(flags),
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTED,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages: if flags & flag::MAX_PAGES != 0 { max_pages } else { 0 },
        map_alignment: 0,
        flags2: low(flags >> 32),
        max_stack_depth: 0,
        request_timeout: 0,
        unused: [0; 11],
    };
    match offered.major {
        MAJOR if offered.minor >= OLDEST_MINOR => {
            Reaction::Agree(out, Negotiated { minor, flags, max_read: MAX_READ, offered: all })
        }
        major if major > MAJOR => Reaction::AskAgain(InitOut { minor: MINOR, flags: 0, flags2: 0, ..out }),
        _ => Reaction::Refuse,
    }
}

fn low(flags: u64) -> u32 {
    u32::try_from(flags & u64::from(u32::MAX)).expect("masked to 32 bits")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::export::fuse) fn offer(minor: u32, flags: u64) -> InitIn {
        let [flags, flags2] = [low(flags), low(flags >> 32)];
        InitIn { major: MAJOR, minor, max_readahead: 131_072, flags, flags2, unused: [0; 11] }
    }

    fn agreed(offered: &InitIn, wishes: Wishes) -> (InitOut, Negotiated) {
        match negotiate(offered, wishes) {
            Reaction::Agree(out, negotiated) => (out, negotiated),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_answered_that_was_not_offered() {
        for flags in [0, u64::MAX, 0x73ff_fffb, flag::MAX_PAGES | flag::POSIX_ACL] {
            let wishes = Wishes { posix_acl: true, idmap: true, handles: true, changing: false, io_uring: Some(64) };
            let (out, negotiated) = agreed(&offer(45, flags), wishes);
            assert_eq!(negotiated.flags & !flags, 0);
            assert_eq!(u64::from(out.flags) | u64::from(out.flags2) << 32, negotiated.flags);
            assert_eq!(out.max_pages > 0, flags & flag::MAX_PAGES != 0);
        }
    }

    #[test]
    fn the_second_word_counts_only_if_the_first_says_so() {
        let both = flag::HAS_RESEND | flag::INIT_EXT;
        assert_eq!(agreed(&offer(40, both), Wishes::default()).1.flags, both);
        assert_eq!(agreed(&offer(40, flag::HAS_RESEND), Wishes::default()).1.flags, 0);
    }

    #[test]
    fn what_not_all_connections_want_is_taken_only_on_wish() {
        let wished = flag::POSIX_ACL | flag::ALLOW_IDMAP | flag::EXPORT_SUPPORT;
        let flags = |wishes| agreed(&offer(45, u64::MAX), wishes).1.flags & wished;
        assert_eq!(flags(Wishes::default()), 0);
        let none = Wishes::default();
        assert_eq!(flags(Wishes { posix_acl: true, ..none }), flag::POSIX_ACL);
        assert_eq!(flags(Wishes { idmap: true, ..none }), flag::ALLOW_IDMAP);
        assert_eq!(flags(Wishes { handles: true, ..none }), flag::EXPORT_SUPPORT);
        assert_eq!(flags(Wishes { posix_acl: true, idmap: true, handles: true, ..none }), wished);
    }

    #[test]
    fn of_what_changes_the_kernel_keeps_nothing_unasked() {
        let flags = |changing| agreed(&offer(45, u64::MAX), Wishes { changing, ..Wishes::default() }).1.flags;
        assert_eq!(flags(true) & ONLY_UNCHANGING, 0);
        assert_eq!(flags(false) & ONLY_UNCHANGING, ONLY_UNCHANGING);
        assert_eq!(flags(false) ^ flags(true), ONLY_UNCHANGING | flag::AUTO_INVAL_DATA);
    }

    #[test]
    fn requests_over_a_ring_are_agreed_upon_only_on_wish_and_are_no_longer_than_its_slots() {
        let wishes = Wishes { io_uring: Some(64), ..Wishes::default() };
        for (offered, wishes, expected) in [
            (u64::MAX, wishes, (true, 64)),
            (u64::MAX, Wishes::default(), (false, MAX_PAGES)),
            (!flag::OVER_IO_URING, wishes, (false, MAX_PAGES)),
            (!flag::INIT_EXT, wishes, (false, MAX_PAGES)),
        ] {
            let (out, negotiated) = agreed(&offer(45, offered), wishes);
            assert_eq!((negotiated.flags & flag::OVER_IO_URING != 0, out.max_pages), expected);
        }
    }

    #[test]
    fn versions_meet_at_the_older_one() {
        assert_eq!(agreed(&offer(99, 0), Wishes::default()).0.minor, MINOR);
        assert_eq!(agreed(&offer(31, 0), Wishes::default()).0.minor, 31);
        assert_eq!(negotiate(&offer(30, 0), Wishes::default()), Reaction::Refuse);
        let later = InitIn { major: 8, ..offer(0, 1) };
        assert!(matches!(negotiate(&later, Wishes::default()), Reaction::AskAgain(out) if out.major == MAJOR));
        assert_eq!(negotiate(&InitIn { major: 6, ..offer(45, 0) }, Wishes::default()), Reaction::Refuse);
    }
}
