//! One kind of fault: what goes wrong, and what has to come of it.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::support::registry::{Access, Door, Fault};

/// How the source is put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The registry sends blobs itself.
    Plain,
    /// The same, and its name is looked up each time.
    Named,
    /// The registry sends blobs itself, over TLS.
    Secure,
    /// The registry redirects to the storage.
    Stored,
    /// The registry wants name and password.
    Basic,
    /// It wants tokens, which are for name and password.
    Token,
    /// The same over TLS.
    SecureToken,
    /// It wants tokens, which are for a refresh token.
    Refresh,
    /// It wants tokens, which everybody gets.
    Public,
    /// It wants tokens and redirects to the storage.
    Guarded,
    /// All through a proxy, and in no other way.
    Proxied,
    /// Through a proxy first, else directly.
    ProxyFirst,
    /// A mirror first, which has the fault, then the registry.
    Mirrored,
}

/// What is done just before the read that is to suffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    None,
    /// So many seconds pass.
    Pass(u64),
    /// No signed address is good any more.
    RevokeSignatures,
    /// No token is good any more.
    RevokeTokens,
    /// Nobody knows the registry's name, for so many milliseconds.
    Forget(u64),
    /// No login is good any more, until it is mended.
    LockOut,
    /// The client's time of day jumps ahead by so many seconds.
    SkewWall(i64),
}

/// What becomes of the read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Served,
    NotFound,
    Refused,
    OutOfRange,
    NoRanges,
    Untrusted,
    Unauthorized,
    Unavailable,
    Deadline,
    Corrupt,
}

/// A row of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) form: Form,
    pub(crate) door: Door,
    pub(crate) fault: Option<Fault>,
    /// Requests that it strikes.
    pub(crate) times: u64,
    pub(crate) event: Event,
    pub(crate) outcome: Outcome,
    /// Requests that arrive at the door of the fault for this one read.
    pub(crate) asks: RangeInclusive<u64>,
    /// Repetitions by policy, as they are counted for the source.
    pub(crate) retries: RangeInclusive<u64>,
    /// The least time that the read takes.
    pub(crate) takes: Duration,
    /// What a reader waits at most.
    pub(crate) patience: Duration,
    /// Whether the same bytes may be sent twice, because what came first was no good.
    pub(crate) wasteful: bool,
}

impl Form {
    /// What the registry wants to know.
    pub(crate) fn access(self) -> Access {
        match self {
            Self::Basic => Access::Basic,
            Self::Token | Self::SecureToken | Self::Refresh | Self::Guarded => Access::Bearer,
            Self::Public => Access::Anonymous,
            Self::Plain
            | Self::Named
            | Self::Secure
            | Self::Stored
            | Self::Proxied
            | Self::ProxyFirst
            | Self::Mirrored => Access::Open,
        }
    }
}

impl Row {
    /// Strikes one request at the registry's own door, and the next one is right.
    pub(crate) fn once(name: &'static str, fault: Fault) -> Self {
        Self {
            name,
            form: Form::Plain,
            door: Door::Registry,
            fault: Some(fault),
            times: 1,
            event: Event::None,
            outcome: Outcome::Served,
            asks: 2..=2,
            retries: 1..=1,
            takes: Duration::ZERO,
            patience: Duration::from_secs(60),
            wasteful: false,
        }
    }

    /// Strikes until somebody mends it.
    pub(crate) fn always(name: &'static str, fault: Fault) -> Self {
        Self { times: u64::MAX, ..Self::once(name, fault) }
    }

    /// Nothing is wrong but what happens before.
    pub(crate) fn after(name: &'static str, event: Event) -> Self {
        Self { fault: None, event, ..Self::once(name, Fault::StallHead).asks(1..=1, 0..=0) }
    }

    pub(crate) fn form(self, form: Form, door: Door) -> Self {
        Self { form, door, ..self }
    }

    pub(crate) fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    pub(crate) fn then(self, event: Event) -> Self {
        Self { event, ..self }
    }

    pub(crate) fn fails(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }

    /// So many requests arrive, of which so many are repetitions by policy.
    pub(crate) fn asks(self, asks: RangeInclusive<u64>, retries: RangeInclusive<u64>) -> Self {
        Self { asks, retries, ..self }
    }

    /// The first answer is believed to be for good.
    pub(crate) fn at_once(self, outcome: Outcome) -> Self {
        self.asks(1..=1, 0..=0).fails(outcome)
    }

    pub(crate) fn takes(self, seconds: u64) -> Self {
        Self { takes: Duration::from_secs(seconds), ..self }
    }

    pub(crate) fn patience(self, seconds: u64) -> Self {
        Self { patience: Duration::from_secs(seconds), ..self }
    }

    pub(crate) fn wasteful(self) -> Self {
        Self { wasteful: true, ..self }
    }
}
