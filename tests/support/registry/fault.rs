//! What a server may do wrong, and when: both are data.

use std::sync::Mutex;
use std::time::Duration;

/// The servers of a box. Each listens on a port of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Door {
    /// The registry itself.
    Registry,
    /// Where it redirects blobs to, with signed addresses.
    Storage,
    /// Where tokens come from.
    Tokens,
    /// Somebody else, who answers everybody with blobs and should get nobody's credentials.
    Elsewhere,
    /// A forward proxy to all the others.
    Proxy,
}

impl Door {
    pub const ALL: [Self; 5] = [Self::Registry, Self::Storage, Self::Tokens, Self::Elsewhere, Self::Proxy];
}

/// Which of the requests that count at a door: those for ranges of blobs, at the door of tokens all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    First,
    /// The one in the middle of as many as the test said there would be.
    Middle,
    /// The last of as many as the test said there would be.
    Last,
    Always,
    /// That one, counted from 0.
    Nth(u64),
    /// That one and all behind it.
    From(u64),
    /// That one and so many altogether.
    Some(u64, u64),
}

impl When {
    /// The numbers that are meant among `total` expected requests: the first, and how many.
    pub fn numbers(self, total: u64) -> (u64, u64) {
        match self {
            Self::First => (0, 1),
            Self::Middle => (total / 2, 1),
            Self::Last => (total.saturating_sub(1), 1),
            Self::Always => (0, u64::MAX),
            Self::Nth(number) => (number, 1),
            Self::From(number) => (number, u64::MAX),
            Self::Some(number, count) => (number, count),
        }
    }
}

/// What is wrong. Lengths of time are of the box's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    // ---- connections
    /// Nobody listens, for so long; the door shuts when the request before has been answered.
    Refuse(Duration),
    /// Connections are never accepted, for so long, as behind a firewall that drops.
    Deaf(Duration),
    /// The connection is closed instead of an answer.
    HangUp,
    /// The connection is reset instead of an answer.
    ResetHead,
    /// The connection is reset when so many bytes of the body have been sent.
    Reset { after: u64 },
    /// The connection is closed when so many bytes of the body have been sent.
    Cut { after: u64 },

    // ---- statuses
    /// This status and nothing else.
    Status(u16),
    /// This status, and the client is asked to stay away for so many seconds.
    RetryAfter(u16, u64),
    /// The same, said as a date of the box's time of day.
    RetryAfterDate(u16, u64),
    /// 401 without a word about how to log in.
    NoChallenge,
    /// 401 with a scheme that nobody speaks.
    StrangeChallenge,
    /// 401 with a token server that is somebody else's, without TLS.
    ForeignRealm,
    /// 401 with a token server there, as `SCHEME://HOST`.
    Realm(String),
    /// 401 as if the token were no good, whatever it is.
    TokenRefused,

    // ---- heads of ranged answers
    /// 200 and the whole blob.
    WholeFor206,
    /// Another range of the same length, truthfully announced.
    OtherRange,
    /// The right bytes under a head that says another place.
    WrongContentRange,
    /// The right bytes under a head that says another length of the blob.
    WrongTotal,
    /// 206 without `Content-Range`.
    NoContentRange,
    /// 206 with parts in a body of its own form.
    Multipart,
    /// A shorter range than asked for, truthfully announced.
    ShorterRange,
    /// 200 and a page in HTML, as from a captive portal.
    Page,

    // ---- bodies
    /// So many bytes more than asked for.
    Surplus(u64),
    /// So many bytes fewer, at the proper end of an answer of unknown length.
    Missing(u64),
    /// One bit is wrong.
    Flip,
    /// All zeros.
    Zeros,
    /// The body of another blob.
    OtherBlob,
    /// Said to be compressed by a middlebox, and it is.
    Gzip,
    /// One byte per second.
    Trickle,
    /// Nothing, for ever.
    StallHead,
    /// The head and so many bytes, then nothing.
    Stall { after: u64 },
    /// The right answer, later.
    Late(Duration),

    // ---- redirects
    /// To the same address.
    RedirectLoop,
    /// To itself so many times, then the blob.
    RedirectChain(u32),
    /// There.
    RedirectTo(String),
    /// To the host that is somebody else's, which has the blob.
    RedirectElsewhere,
    /// To somebody else by the number of this host.
    RedirectToLoopback,
    /// To somebody else on this host, by this name.
    RedirectToName(&'static str),
    /// From TLS to plain HTTP.
    RedirectToPlain,
    /// To nowhere in particular: no `Location`.
    RedirectNowhere,

    // ---- signatures and tokens
    /// A signed address that has expired already.
    ExpiredSignature,
    /// An answer of the token server that is no token.
    NoToken,
    /// A token that ends in so many seconds.
    ShortToken(u64),
    /// A token without a word about its end, as old servers give.
    EndlessToken,
    /// The token is valid; its date of issue is off by so many seconds.
    SkewedToken(i64),
}

/// One fault and when it strikes.
#[derive(Clone, Debug)]
struct Rule {
    door: Door,
    first: u64,
    count: u64,
    fault: Fault,
}

/// The faults of a box, and how many requests each door has had that count.
#[derive(Debug, Default)]
pub struct Plan {
    rules: Mutex<Vec<Rule>>,
    counted: Mutex<[u64; Door::ALL.len()]>,
}

impl Plan {
    pub fn add(&self, door: Door, numbers: (u64, u64), fault: Fault) {
        let (first, count) = numbers;
        self.rules.lock().unwrap().push(Rule { door, first, count, fault });
    }

    pub fn clear(&self) {
        self.rules.lock().unwrap().clear();
    }

    /// Counts a request and gives its number and its fault.
    pub fn count(&self, door: Door) -> (u64, Option<Fault>) {
        let mut counted = self.counted.lock().unwrap();
        let number = counted[door as usize];
        counted[door as usize] += 1;
        (number, self.at(door, number))
    }

    /// Counts a request that will not come, because nobody could have taken it.
    pub fn pass_over(&self, door: Door) {
        self.counted.lock().unwrap()[door as usize] += 1;
    }

    /// Requests that counted so far.
    pub fn counted(&self, door: Door) -> u64 {
        self.counted.lock().unwrap()[door as usize]
    }

    /// What befalls the request with this number.
    pub fn at(&self, door: Door, number: u64) -> Option<Fault> {
        let rules = self.rules.lock().unwrap();
        let strikes = |rule: &&Rule| rule.door == door && number >= rule.first && number - rule.first < rule.count;
        rules.iter().find(strikes).map(|rule| rule.fault.clone())
    }
}
