//! One cell of the matrix: a kind of fault, which read suffers it, and how many readers there are.
//!
//! A cell has a registry, a mirror and a cache of its own, all on one thread but for the cache's decoding, and a
//! time that moves only when nothing else can happen.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange, Class, Secret};
use rafsd::cache::{Device, Fill, FillError, Store, StoreOptions};
use rafsd::net::auth::{Keychain, Login, LoginFuture, TokenOptions, Tokens};
use rafsd::net::{ClientOptions, Endpoint, EndpointOptions, Lookup, Names, Proxy, RetryPolicy};
use rafsd::source::{BlobSource, BoxFuture, HttpUpstream, ReadCtx, SourceError, Tier, Tiers, Verdict};
use rafsd::telemetry::Place;
use reqwest::Url;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::image::{BLOB, Blob, OTHER, UNITS};
use crate::row::{Event, Form, Outcome, Row};
use crate::support::clock::{Bustle, Driver, VirtualClock};
use crate::support::registry::{Access, Content, Door, Registry, Setup, USER};
use crate::support::secrets;

/// How long nothing must happen before the time moves. The cache decodes on threads of its own, but nobody
/// waits for the time to pass meanwhile.
const QUIET: Duration = Duration::from_millis(3);

pub(crate) const REPOSITORY: &str = "library/image";

/// Several boxes, as one place where somebody may work.
struct All(Vec<Arc<dyn Bustle>>);

impl Bustle for All {
    fn busy(&self) -> bool {
        self.0.iter().any(|one| one.busy())
    }

    fn steps(&self) -> u64 {
        self.0.iter().map(|one| one.steps()).sum()
    }
}

/// The cache lives in real time and the source in a test's: deadlines are moved by what lies between.
pub(crate) struct Shifted {
    source: Tiers,
    time: VirtualClock,
}

impl Shifted {
    fn ctx(&self, ctx: ReadCtx) -> ReadCtx {
        ReadCtx { deadline: ctx.deadline + self.time.elapsed(), ..ctx }
    }
}

impl BlobSource for Shifted {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        self.source.len(blob, self.ctx(ctx))
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        self.source.stream(blob, stored, self.ctx(ctx), take)
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.source.read(blob, stored, self.ctx(ctx))
    }

    fn judged(&self, blob: &BlobId, stored: ByteRange, verdict: Verdict) {
        self.source.judged(blob, stored, verdict);
    }

    fn places(&self) -> usize {
        self.source.places()
    }

    fn describe(&self) -> String {
        self.source.describe()
    }
}

/// Knows the doors of the boxes, some names of places where nobody should be sent, and can forget.
#[derive(Debug, Default)]
pub(crate) struct NameServer {
    doors: Vec<(String, SocketAddr)>,
    lost: Arc<AtomicBool>,
}

impl Names for NameServer {
    fn lookup(&self, host: &str) -> Lookup {
        let at = |address: &str| Some(SocketAddr::new(address.parse().expect("an address"), 0));
        let door = || self.doors.iter().find(|(name, _)| name == host).map(|(_, address)| *address);
        let found = match host {
            // Port 0 is that of the URL, which is the door of somebody else.
            "rebound.test" => at("127.0.0.1"),
            "private.test" => at("192.168.0.1"),
            "metadata.test" => at("169.254.169.254"),
            _ => door(),
        };
        let found = found.filter(|_| !self.lost.load(Ordering::SeqCst));
        Box::pin(std::future::ready(found.map(|address| vec![address]).ok_or_else(|| io::ErrorKind::NotFound.into())))
    }
}

/// Everything that one cell needs.
pub(crate) struct Bench {
    pub(crate) time: VirtualClock,
    pub(crate) blob: &'static Blob,
    /// Has the fault.
    pub(crate) struck: Registry,
    /// Has none; asked only where there is a mirror.
    origin: Option<Registry>,
    pub(crate) place: Arc<Place>,
    pub(crate) source: Arc<Shifted>,
    pub(crate) device: Arc<Device>,
    names: Arc<NameServer>,
    store: Arc<Store>,
    driver: Option<Driver>,
    _root: tempfile::TempDir,
}

impl Bench {
    pub(crate) async fn new(row: &Row) -> Self {
        let (time, blob) = (VirtualClock::new(), &*BLOB);
        let content = || {
            let mut content = Content::default();
            content.blob(REPOSITORY, blob.stored.clone());
            content.blob(REPOSITORY, OTHER.stored.clone());
            content
        };
        let setup = || Setup {
            content: content(),
            access: row.form.access(),
            storage: matches!(row.form, Form::Stored | Form::Guarded),
            tls: matches!(row.form, Form::Secure | Form::SecureToken),
            ..Setup::default()
        };
        let struck = Registry::start(setup(), &time).await;
        let origin = match row.form {
            Form::Mirrored => Some(Registry::start(setup(), &time).await),
            _ => None,
        };
        let mut boxes = vec![Arc::clone(struck.record()) as Arc<dyn Bustle>];
        boxes.extend(origin.as_ref().map(|origin| Arc::clone(origin.record()) as Arc<dyn Bustle>));
        let driver = Driver::start(&time, Arc::new(All(boxes)), QUIET);

        let names = Arc::new(NameServer { doors: struck.resolve(), lost: Arc::default() });
        let tier = |registry: &Registry, proxy| tier(registry, proxy, row.form, &names, &time);
        let through = Proxy::Through(Secret::new(format!("http://{}", struck.address(Door::Proxy))));
        let mut tiers = match row.form {
            Form::Proxied => vec![tier(&struck, through)],
            Form::ProxyFirst => {
                vec![tier(&struck, through), tier(&struck, Proxy::Direct)]
            }
            _ => vec![tier(&struck, Proxy::Direct)],
        };
        tiers.extend(origin.as_ref().map(|origin| tier(origin, Proxy::Direct)));
        let place = Arc::new(Place::default());
        let source = Tiers::new(tiers, RetryPolicy::default(), time.clock()).counting(Arc::clone(&place));
        let source = Arc::new(Shifted { source, time: time.clone() });
        let root = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            late: Duration::ZERO,
            decode_threads: 1,
            readahead_first: 0,
            scrub_rate: 0,
            deadline: row.patience,
            flush_every: Duration::from_secs(3600),
            ..StoreOptions::default()
        };
        let store = Store::open(root.path(), options, Handle::current()).unwrap();
        let device = store.device(blob.map(), Arc::clone(&source) as Arc<dyn BlobSource>).unwrap();
        Self { time, blob, struck, origin, place, source, device, names, store, driver: Some(driver), _root: root }
    }

    /// The time stands still from now on. With several threads nobody can know after so short a while whether all is
    /// quiet, and what hangs shall hang.
    pub(crate) fn stand_still(&mut self) {
        self.driver = None;
    }

    /// What becomes of each of so many readers of one unit.
    async fn read(&self, unit: usize, readers: usize) -> Vec<Result<(), FillError>> {
        let started: Vec<_> = (0..readers)
            .map(|number| {
                let (tell, told) = oneshot::channel();
                let done = Box::new(move |outcome| drop(tell.send(outcome)));
                self.device.fill(self.blob.wanted(unit, number), Class::OnDemand, done);
                told
            })
            .collect();
        let mut outcomes = Vec::new();
        for told in started {
            let outcome = tokio::time::timeout(Duration::from_secs(50), told).await;
            let outcome = outcome.expect("an end").expect("an outcome");
            if let Err(error) = &outcome {
                secrets::failed(error);
            }
            outcomes.push(outcome);
        }
        outcomes
    }

    async fn prepare(&self, event: Event) {
        match event {
            Event::None => {}
            Event::Pass(seconds) => self.time.advance(Duration::from_secs(seconds)),
            Event::RevokeSignatures => self.struck.keys().revoke_signatures(),
            Event::RevokeTokens => self.struck.keys().revoke_tokens(),
            Event::Forget(milliseconds) => {
                self.names.lost.store(true, Ordering::SeqCst);
                self.struck.disconnect(Door::Registry).await;
                let (clock, lost) = (self.time.clock(), Arc::clone(&self.names.lost));
                tokio::spawn(async move {
                    clock.sleep(Duration::from_millis(milliseconds)).await;
                    lost.store(false, Ordering::SeqCst);
                });
            }
            Event::LockOut => self.struck.keys().lock(true),
            Event::SkewWall(seconds) => self.time.skew_wall(seconds),
        }
    }
}

/// One login for everything.
#[derive(Debug)]
pub(crate) struct Known(pub(crate) Option<Login>);

impl Keychain for Known {
    fn login<'a>(&'a self, _: &'a str, _: &'a str) -> LoginFuture<'a> {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
}

/// One way to a registry.
fn tier(registry: &Registry, proxy: Proxy, form: Form, names: &Arc<NameServer>, time: &VirtualClock) -> Tier {
    let mut resolve = registry.resolve();
    resolve.retain(|(name, _)| form != Form::Named || name != "registry.test");
    let client = ClientOptions {
        proxy,
        resolve,
        names: Some(Arc::clone(names) as Arc<dyn Names>),
        extra_ca_pem: registry.authority().map(ToOwned::to_owned).into_iter().collect(),
        ..ClientOptions::default()
    };
    let base = Url::parse(&registry.url(Door::Registry)).unwrap();
    let keys = registry.keys();
    let password = Secret::new(&*keys.password);
    let login = match form {
        Form::Refresh => Some(Login::Identity(Secret::new(&*keys.refresh))),
        Form::Public => None,
        _ => Some(Login::Basic { user: USER.to_owned(), password }),
    };
    let options = TokenOptions { client: client.clone(), server: Some(base.clone()), ..TokenOptions::default() };
    let tokens = Tokens::new(registry.host(Door::Registry), Arc::new(Known(login)), options, time.clock());
    let options = EndpointOptions { client, authorize: Some(Arc::new(tokens)), ..EndpointOptions::default() };
    let endpoint = Arc::new(Endpoint::new(&base, options, time.clock()).unwrap());
    secrets::said(&format!("{endpoint:?}"));
    Tier::new(HttpUpstream::repository(endpoint, base.join(&format!("v2/{REPOSITORY}")).unwrap(), REPOSITORY))
}

fn kind(outcome: &Result<(), FillError>) -> Outcome {
    match outcome {
        Ok(()) => Outcome::Served,
        Err(FillError::Source { cause, .. }) => match &**cause {
            SourceError::NotFound { .. } => Outcome::NotFound,
            SourceError::Refused { .. } => Outcome::Refused,
            SourceError::OutOfRange { .. } => Outcome::OutOfRange,
            SourceError::NoRanges { .. } => Outcome::NoRanges,
            SourceError::Untrusted { .. } => Outcome::Untrusted,
            SourceError::Unauthorized { .. } => Outcome::Unauthorized,
            SourceError::Unavailable { .. } => Outcome::Unavailable,
            SourceError::Deadline { .. } => Outcome::Deadline,
            other => panic!("not expected of any cell: {other:?}"),
        },
        Err(FillError::Corrupt { .. }) => Outcome::Corrupt,
        Err(other) => panic!("not expected of any cell: {other:?}"),
    }
}

/// Runs one cell.
///
/// # Errors
/// What was not as the row says.
pub(crate) async fn run(row: &Row, struck_unit: usize, readers: usize) -> Result<(), String> {
    let bench = Bench::new(row).await;
    let mut wrong = Vec::new();
    for unit in 0..UNITS {
        if unit == struck_unit {
            strike(&bench, row, unit, readers, &mut wrong).await;
        }
        for outcome in bench.read(unit, readers).await {
            if let Err(error) = outcome {
                wrong.push(format!("unit {unit}: {error}"));
            }
        }
    }
    check_whole(&bench, row, &mut wrong);
    bench.store.close().unwrap();
    wrong.dedup();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}

/// The read that suffers.
async fn strike(bench: &Bench, row: &Row, unit: usize, readers: usize, wrong: &mut Vec<String>) {
    bench.prepare(row.event).await;
    let (asked, retried) = (bench.struck.plan().counted(row.door), bench.place.retries.get());
    if let Some(fault) = &row.fault {
        bench.struck.strike(row.door, row.times, fault.clone()).await;
    }
    let began = bench.time.elapsed();
    let outcomes = bench.read(unit, readers).await;
    let took = bench.time.elapsed() - began;

    for outcome in &outcomes {
        let kind = kind(outcome);
        if kind != row.outcome {
            let text = outcome.as_ref().err().map(|error| rafsd::base::Chain(error).to_string());
            wrong.push(format!("{kind:?} instead of {:?}: {}", row.outcome, text.unwrap_or_default()));
        }
        if outcome.as_ref().err().is_some_and(|error| error.errno() != libc::EIO) {
            wrong.push("another errno than EIO".to_owned());
        }
    }
    let asks = bench.struck.plan().counted(row.door) - asked;
    let retries = bench.place.retries.get() - retried;
    if !row.asks.contains(&asks) {
        wrong.push(format!("{asks} requests instead of {:?}", row.asks));
    }
    if !row.retries.contains(&retries) {
        wrong.push(format!("{retries} retries instead of {:?}", row.retries));
    }
    if took < row.takes || took > row.patience + Duration::from_secs(1) {
        wrong.push(format!("it took {took:?}"));
    }
    if row.outcome != Outcome::Served {
        if unit > 0 && bench.read(0, readers).await.iter().any(Result::is_err) {
            wrong.push("what was present is not served".to_owned());
        }
        bench.struck.mend();
        bench.names.lost.store(false, Ordering::SeqCst);
        bench.struck.settle().await;
        if row.form.access() != Access::Open {
            // A token server that failed is left alone for so long, and a login that was refused.
            bench.time.advance(Duration::from_secs(10));
        }
    }
}

/// What holds for every cell in the end, whatever has happened.
fn check_whole(bench: &Bench, row: &Row, wrong: &mut Vec<String>) {
    let data = std::fs::read(bench.device.data_path().expect("a file")).unwrap();
    if data[..bench.blob.plain.len()] != bench.blob.plain {
        wrong.push("wrong bytes".to_owned());
    }
    for registry in [Some(&bench.struck), bench.origin.as_ref()].into_iter().flatten() {
        wrong.extend(registry.leaks().into_iter().map(|leak| format!("leaked: {leak}")));
    }
    let sent: u64 = bench.struck.sent() + bench.origin.as_ref().map_or(0, Registry::sent);
    if !row.wasteful && sent != bench.blob.stored.len() as u64 {
        wrong.push(format!("{sent} bytes were sent for {}", bench.blob.stored.len()));
    }
    if row.form == Form::Proxied && bench.struck.seen(Door::Registry).iter().any(|seen| !seen.proxied) {
        wrong.push("somebody went past the proxy".to_owned());
    }
}
