//! A registry in a box: registry, storage behind signed addresses, token server, a stranger and a proxy, each on a
//! port of loopback, all with faults on request.
//!
//! The box answers as real ones do until its [`Plan`] says otherwise. It writes down each request with all its
//! headers and knows each secret it was given or handed out together with the doors where that may be said, so
//! that [`Registry::leaks`] finds whatever got to the wrong place. All its time is that of a [`VirtualClock`], and it
//! tells a [`super::clock::Driver`] when it works, so that nothing needs to sleep.
//!
//! The doors have names, because loopback is a place redirects must not lead to: clients have to be told where
//! `registry.test` and the others are ([`Registry::resolve`]).

mod access;
mod body;
pub mod content;
mod dates;
mod fault;
mod rafs;
mod record;
mod reply;
mod serve;
mod tls;
mod wire;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use rafsd::net::Clock;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use self::access::{Access, Keys, USER, basic, fresh};
pub use self::content::Content;
pub use self::fault::{Door, Fault, Plan, When};
pub use self::record::{Record, Seen};
use self::serve::Doorstep;
pub use self::tls::Authority;
use self::wire::{Doorway, Line, Mood};
use super::clock::VirtualClock;

/// How a box is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    pub content: Content,
    pub access: Access,
    /// Whether blobs are redirected to the storage.
    pub storage: bool,
    /// Whether registry, storage and token server speak TLS. The others never do.
    pub tls: bool,
    pub token_life: Duration,
    pub signature_life: Duration,
    /// Whether the doors go by the number of this host instead of names, for programs that cannot be told where
    /// those are.
    pub numeric: bool,
    /// How many seconds the box's time of day is ahead of the clock's.
    pub skew: i64,
}

impl Default for Setup {
    /// An empty registry that is open to everybody.
    fn default() -> Self {
        Self {
            content: Content::default(),
            access: Access::Open,
            storage: false,
            tls: false,
            token_life: Duration::from_secs(300),
            signature_life: Duration::from_secs(1200),
            numeric: false,
            skew: 0,
        }
    }
}

struct Inner {
    content: Content,
    access: Access,
    storage: bool,
    tls: bool,
    token_life: Duration,
    signature_life: Duration,
    numeric: bool,
    skew: i64,
    clock: Clock,
    keys: Keys,
    plan: Plan,
    record: Arc<Record>,
    addresses: Vec<SocketAddr>,
    moods: Vec<watch::Sender<Mood>>,
}

impl Inner {
    fn address(&self, door: Door) -> SocketAddr {
        self.addresses[door as usize]
    }

    fn host(&self, door: Door) -> String {
        let name = if self.numeric { "127.0.0.1" } else { name(door) };
        format!("{name}:{}", self.address(door).port())
    }

    fn url(&self, door: Door) -> String {
        let scheme = if self.tls && speaks_tls(door) { "https" } else { "http" };
        format!("{scheme}://{}", self.host(door))
    }

    /// The time of day as the box believes it to be.
    fn wall(&self) -> SystemTime {
        dates::skewed(self.clock.wall(), self.skew)
    }
}

/// A running box. It stops when dropped.
pub struct Registry {
    inner: Arc<Inner>,
    authority: Option<Authority>,
    serving: Vec<JoinHandle<()>>,
}

impl Registry {
    /// Opens all doors, on this runtime.
    pub async fn start(setup: Setup, time: &VirtualClock) -> Self {
        let authority = setup.tls.then(Authority::new);
        let record = Arc::new(Record::default());
        let (mut doorways, mut moods) = (Vec::new(), Vec::new());
        for door in Door::ALL {
            let (mood, told) = watch::channel(Mood::Open);
            let tls = authority
                .as_ref()
                .filter(|_| speaks_tls(door))
                .map(|it| it.acceptor(if setup.numeric { "127.0.0.1" } else { name(door) }));
            let mut doorway = Doorway::new(told, tls, Arc::clone(&record));
            doorway.obey().await;
            doorways.push(doorway);
            moods.push(mood);
        }
        let clock = time.clock();
        let inner = Arc::new(Inner {
            keys: Keys::new(setup.access, clock.clone(), Arc::clone(&record)),
            content: setup.content,
            access: setup.access,
            storage: setup.storage,
            tls: setup.tls,
            token_life: setup.token_life,
            signature_life: setup.signature_life,
            numeric: setup.numeric,
            skew: setup.skew,
            clock,
            plan: Plan::default(),
            record,
            addresses: doorways.iter().map(Doorway::address).collect(),
            moods,
        });
        let open = |(door, doorway)| {
            let state = Arc::new(Doorstep { door, inner: Arc::clone(&inner) });
            let service = Router::new().fallback(serve::answer).with_state(state);
            let serving = axum::serve(doorway, service.into_make_service_with_connect_info::<Line>());
            tokio::spawn(async move { drop(serving.await) })
        };
        let serving = Door::ALL.into_iter().zip(doorways).map(open).collect();
        Self { inner, authority, serving }
    }

    /// Plans a fault for some of `total` requests that are expected at a door.
    pub async fn fault(&self, door: Door, when: When, total: u64, fault: Fault) {
        let shuts = matches!(fault, Fault::Refuse(_) | Fault::Deaf(_));
        self.inner.plan.add(door, when.numbers(total), fault);
        if shuts && self.inner.shut_out(door) {
            self.settle().await;
        }
    }

    /// A fault for the next so many requests at a door.
    pub async fn strike(&self, door: Door, times: u64, fault: Fault) {
        let next = self.inner.plan.counted(door);
        self.fault(door, When::Some(next, times), 0, fault).await;
    }

    /// Ends all connections of a door, which stays open.
    pub async fn disconnect(&self, door: Door) {
        for mood in [Mood::Shut, Mood::Open] {
            self.inner.moods[door as usize].send_replace(mood);
            self.settle().await;
        }
    }

    /// Lets the doors learn of what was changed.
    pub async fn settle(&self) {
        for _ in 0..16 {
            tokio::task::yield_now().await;
        }
    }

    /// Everything works from now on.
    pub fn mend(&self) {
        self.inner.plan.clear();
        if self.inner.keys.is_locked() {
            self.inner.keys.lock(false);
        }
        for mood in &self.inner.moods {
            mood.send_replace(Mood::Open);
        }
    }

    /// `SCHEME://NAME:PORT` of a door.
    pub fn url(&self, door: Door) -> String {
        self.inner.url(door)
    }

    /// `NAME:PORT` of a door.
    pub fn host(&self, door: Door) -> String {
        self.inner.host(door)
    }

    pub fn address(&self, door: Door) -> SocketAddr {
        self.inner.address(door)
    }

    /// Where the names of all doors lead.
    pub fn resolve(&self) -> Vec<(String, SocketAddr)> {
        Door::ALL.into_iter().map(|door| (name(door).to_owned(), self.address(door))).collect()
    }

    /// The file with the certificate that clients have to trust, if there is TLS.
    pub fn authority(&self) -> Option<&Path> {
        self.authority.as_ref().map(Authority::pem)
    }

    pub fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    pub fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// What it has seen; also whom a driver of the clock has to ask.
    pub fn record(&self) -> &Arc<Record> {
        &self.inner.record
    }

    /// All requests at a door, in the order of their coming.
    pub fn seen(&self, door: Door) -> Vec<Seen> {
        self.inner.record.seen().into_iter().filter(|seen| seen.door == door).collect()
    }

    /// Requests for parts of blobs at a door that were answered with 200 or 206.
    pub fn served(&self, door: Door) -> Vec<Seen> {
        let served = |seen: &Seen| seen.is_blob_read() && matches!(seen.status, 200 | 206);
        self.seen(door).into_iter().filter(served).collect()
    }

    /// Bytes of blobs that were sent at all doors.
    pub fn sent(&self) -> u64 {
        let seen = self.inner.record.seen();
        seen.iter().filter(|seen| seen.is_blob_read() && matches!(seen.status, 200 | 206)).map(|seen| seen.sent).sum()
    }

    /// Secrets that got to where they must not be, without saying them again.
    pub fn leaks(&self) -> Vec<String> {
        self.inner.record.leaks()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.serving.iter().for_each(JoinHandle::abort);
    }
}

/// Names that no resolver knows.
fn name(door: Door) -> &'static str {
    match door {
        Door::Registry => "registry.test",
        Door::Storage => "storage.test",
        Door::Tokens => "tokens.test",
        Door::Elsewhere => "elsewhere.test",
        Door::Proxy => "proxy.test",
    }
}

fn speaks_tls(door: Door) -> bool {
    match door {
        Door::Registry | Door::Storage | Door::Tokens => true,
        Door::Elsewhere | Door::Proxy => false,
    }
}
