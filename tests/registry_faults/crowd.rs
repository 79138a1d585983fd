//! Many at once, and faults one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rafsd::base::{ByteRange, Class, Secret};
use rafsd::cache::Fill;
use rafsd::net::ClientOptions;
use rafsd::net::auth::Login;
use rafsd::source::{BlobSource, Network, NetworkOptions, ReadCtx};
use rafsd::telemetry::Telemetry;
use tokio::sync::oneshot;

use crate::cell::{Bench, Known, REPOSITORY};
use crate::image::{BLOB, UNITS};
use crate::row::{Event, Form, Row};
use crate::support::clock::{Bustle, Driver, QUIET, VirtualClock};
use crate::support::registry::{Access, Content, Door, Fault, Registry, Setup, USER, When};
use crate::support::secrets;

fn patient() -> ReadCtx {
    ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60))
}

fn whole() -> ByteRange {
    ByteRange::new(0, BLOB.stored.len() as u64).unwrap()
}

#[tokio::test]
async fn a_stream_that_is_reset_at_each_kib_brings_each_byte_once() {
    let _watch = secrets::watch();
    let bench = Bench::new(&Row::after("", Event::None)).await;
    let kibs = BLOB.stored.len() as u64 / 1024;
    for kib in 0..=kibs {
        let (sent, asked) = (bench.struck.sent(), bench.struck.plan().counted(Door::Registry));
        bench.struck.strike(Door::Registry, 1, Fault::Reset { after: kib * 1024 }).await;

        let mut came = Vec::new();
        let outcome =
            bench.source.stream(&BLOB.id, whole(), patient(), &mut |piece| came.extend_from_slice(&piece)).await;

        outcome.unwrap();
        assert!(came == BLOB.stored, "reset after {kib} KiB");
        // What was sent just before a reset may be lost on the way.
        let more = bench.struck.sent() - sent - BLOB.stored.len() as u64;
        assert!(more <= kib * 1024, "reset after {kib} KiB: {more} bytes too many");
        assert_eq!(bench.struck.plan().counted(Door::Registry) - asked, 2, "reset after {kib} KiB");
    }
    // Each is left alone for a pause.
    assert_eq!(bench.place.retries.get(), kibs + 1);
}

#[tokio::test]
async fn a_redirect_is_asked_for_once_until_it_ends() {
    let _watch = secrets::watch();
    let bench = Bench::new(&Row::after("", Event::None).form(Form::Stored, Door::Storage)).await;
    let read = |unit| bench.source.read(&BLOB.id, BLOB.stored_unit(unit), patient());

    for (seconds, redirects) in [(0, 1), (900, 1), (100, 2), (0, 2)] {
        bench.time.advance(Duration::from_secs(seconds));
        for unit in 0..UNITS {
            read(unit).await.unwrap();
        }
        assert_eq!(bench.struck.seen(Door::Registry).len(), redirects, "{seconds} s later");
    }
    assert_eq!(bench.struck.served(Door::Storage).len(), 4 * UNITS);
}

#[tokio::test]
async fn readers_among_random_faults_get_their_bytes() {
    const READERS: u64 = 64;
    const READS: u64 = 8;
    let _watch = secrets::watch();
    let bench = Arc::new(Bench::new(&Row::after("", Event::None)).await);
    let faults = [
        Fault::HangUp,
        Fault::ResetHead,
        Fault::Reset { after: 700 },
        Fault::Cut { after: 10 },
        Fault::Status(503),
        Fault::RetryAfter(429, 2),
        Fault::StallHead,
        Fault::Stall { after: 100 },
        Fault::Late(Duration::from_secs(3)),
    ];
    for (number, fault) in faults.iter().cycle().take(60).enumerate() {
        bench.struck.fault(Door::Registry, When::Nth(number as u64 * 9), 0, fault.clone()).await;
    }

    let readers: Vec<_> = (0..READERS)
        .map(|reader| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move {
                for read in 0..READS {
                    let start = (reader * 977 + read * 7919) % (whole().end() - 1);
                    let range = ByteRange::new(start, (start + 6000).min(whole().end())).unwrap();
                    let bytes = bench.source.read(&BLOB.id, range, patient()).await.unwrap();
                    let expected = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
                    assert!(bytes == BLOB.stored[expected], "{range}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }

    assert!(bench.struck.plan().counted(Door::Registry) > READERS * READS + 40, "the faults were met");
    assert_eq!(bench.struck.leaks(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn starters_of_a_cold_image_cost_the_origin_each_byte_once() {
    const STARTERS: usize = 64;
    let _watch = secrets::watch();
    let mut bench = Bench::new(&Row::after("", Event::None).form(Form::Guarded, Door::Storage)).await;
    bench.stand_still();
    let bench = Arc::new(bench);

    let starters: Vec<_> = (0..STARTERS)
        .map(|starter| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move {
                for step in 0..UNITS {
                    // Each begins somewhere else.
                    let unit = (starter + step) % UNITS;
                    let (tell, told) = oneshot::channel();
                    let done = Box::new(move |outcome| drop(tell.send(outcome)));
                    bench.device.fill(bench.blob.wanted(unit, starter), Class::OnDemand, done);
                    told.await.unwrap().unwrap();
                }
            })
        })
        .collect();
    for starter in starters {
        starter.await.unwrap();
    }

    assert_eq!(bench.struck.sent(), BLOB.stored.len() as u64);
    let (crowd, tokens) = bench.struck.record().crowd(&format!("repository:{REPOSITORY}:pull"));
    assert_eq!((crowd, tokens), (1, 1));
    assert_eq!(bench.struck.leaks(), Vec::<String>::new());
}

/// A registry with ten repositories, which all have the blob, and a slow token server.
async fn ten_repositories(time: &VirtualClock) -> (Registry, Vec<String>) {
    let mut content = Content::default();
    let names: Vec<_> = (0..10).map(|number| format!("library/image{number}")).collect();
    for name in &names {
        content.blob(name, BLOB.stored.clone());
    }
    let registry = Registry::start(Setup { content, access: Access::Bearer, ..Setup::default() }, time).await;
    registry.fault(Door::Tokens, When::Always, 0, Fault::Late(Duration::from_secs(1))).await;
    (registry, names)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_mounts_ask_for_one_token_per_scope_at_a_time() {
    const MOUNTS: usize = 500;
    let _watch = secrets::watch();
    let time = VirtualClock::new();
    let (registry, names) = ten_repositories(&time).await;
    let _driver = Driver::start(&time, Arc::clone(registry.record()) as Arc<dyn Bustle>, QUIET);
    let (host, url) = (registry.host(Door::Registry), registry.url(Door::Registry));
    let hosts = tempfile::tempdir().unwrap();
    std::fs::create_dir(hosts.path().join(&host)).unwrap();
    std::fs::write(hosts.path().join(&host).join("hosts.toml"), format!("server = \"{url}\"\n")).unwrap();
    let login = Login::Basic { user: USER.to_owned(), password: Secret::new(&*registry.keys().password) };
    let telemetry = Telemetry::default();
    let options = NetworkOptions {
        client: ClientOptions { resolve: registry.resolve(), ..ClientOptions::default() },
        hosts_dir: hosts.path().to_owned(),
        keychain: Arc::new(Known(Some(login))),
        clock: time.clock(),
        ..NetworkOptions::default()
    };
    let network = Network::new(options, telemetry.clone());
    let open = |number: usize| network.open(&[format!("docker://{host}/{}", names[number % 10])], None).unwrap();
    let mounts: Vec<_> = (0..MOUNTS).map(open).collect();

    // Cold; then shortly before the end of the tokens; then all are refused.
    for (round, tokens) in [(0, 1), (1, 2), (2, 3)] {
        match round {
            1 => time.advance(Duration::from_secs(270)),
            2 => registry.keys().revoke_tokens(),
            _ => {}
        }
        let deadline = Instant::now() + Duration::from_secs(60) + time.elapsed();
        let reads: Vec<_> = mounts
            .iter()
            .map(|mount| {
                let mount = Arc::clone(mount);
                let range = BLOB.stored_unit(0);
                tokio::spawn(async move { mount.read(&BLOB.id, range, ReadCtx::new(Class::OnDemand, deadline)).await })
            })
            .collect();
        for read in reads {
            let bytes = read.await.unwrap().unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(bytes == BLOB.stored[..bytes.len()]);
        }
        // A renewal in the background may still be under way.
        time.clock().sleep(Duration::from_secs(2)).await;
        for name in &names {
            let crowd = registry.record().crowd(&format!("repository:{name}:pull"));
            assert_eq!(crowd, (1, tokens), "{name} in round {round}");
        }
    }
    assert_eq!(registry.record().scopes().len(), names.len());
    assert_eq!(registry.leaks(), Vec::<String>::new());
    secrets::said(&telemetry.exposition());
    secrets::said(&format!("{network:?} {:?}", network.registry(&host, None).unwrap()));
}
