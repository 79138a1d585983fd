//! The registry in a box does what it says: right answers to a plain client, each fault as a client sees it, and
//! no secret in the wrong place without somebody noticing.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::header::AUTHORIZATION;
use reqwest::{Client, Response, redirect};
use support::clock::{Bustle, Driver, VirtualClock};
use support::registry::{Access, Content, Door, Fault, Registry, Setup, USER, When};
use support::secrets;

const REPOSITORY: &str = "library/thing";
const SECOND: Duration = Duration::from_secs(1);

/// Time moves this fast when server and client share one thread.
const SOON: Duration = Duration::from_millis(4);

struct Bench {
    time: VirtualClock,
    registry: Registry,
    client: Client,
    blob: Vec<u8>,
    digest: String,
}

impl Bench {
    async fn new(setup: Setup) -> Self {
        let mut content = Content::default();
        let blob: Vec<u8> = (0..70_000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        let digest = content.blob(REPOSITORY, blob.clone());
        content.blob(REPOSITORY, "another blob, of another length");
        content.manifest(REPOSITORY, "latest", &[("application/vnd.oci.image.layer.v1.tar", &digest)]);
        let time = VirtualClock::new();
        let registry = Registry::start(Setup { content, ..setup }, &time).await;
        rafsd::net::install_tls();
        let mut client = Client::builder().redirect(redirect::Policy::none()).no_proxy();
        for (name, address) in registry.resolve() {
            client = client.resolve(&name, address);
        }
        client = match registry.authority() {
            None => client.tls_certs_only([]),
            Some(pem) => client.tls_certs_only([reqwest::Certificate::from_pem(&std::fs::read(pem).unwrap()).unwrap()]),
        };
        Self { time, registry, client: client.build().unwrap(), blob, digest }
    }

    fn drive(&self) -> Driver {
        Driver::start(&self.time, Arc::clone(self.registry.record()) as Arc<dyn Bustle>, SOON)
    }

    fn url(&self) -> String {
        format!("{}/v2/{REPOSITORY}/blobs/{}", self.registry.url(Door::Registry), self.digest)
    }

    /// Bytes 1000 to 5999 of the blob.
    async fn ask(&self) -> reqwest::Result<Response> {
        self.client.get(self.url()).header("range", "bytes=1000-5999").send().await
    }

    async fn get(&self, url: &str, authorization: &str) -> Response {
        self.client.get(url).header(AUTHORIZATION, authorization).send().await.unwrap()
    }

    /// What comes of asking, in a word: an error, or the status and what became of the body.
    async fn outcome(&self) -> String {
        let response = match self.ask().await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return "no connection".to_owned(),
            Err(_) => return "no head".to_owned(),
        };
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.bytes().await;
        let kind = match &body {
            Err(_) => "broken",
            Ok(bytes) if bytes.is_empty() => "empty",
            Ok(bytes) if *bytes == self.blob[1000..6000] => "exact",
            Ok(bytes) if *bytes == self.blob => "whole",
            Ok(bytes) if bytes.starts_with(&self.blob[1000..6000]) => "more",
            Ok(bytes) if self.blob[1000..6000].starts_with(bytes) => "less",
            Ok(_) => "other",
        };
        let place = headers.get("content-range").map_or("", |value| value.to_str().unwrap());
        format!("{status} {kind} {place}").trim_end().to_owned()
    }
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

#[tokio::test]
async fn what_it_has_is_served_as_by_a_registry() {
    let bench = Bench::new(Setup::default()).await;
    let base = bench.registry.url(Door::Registry);
    let get = |path: String| bench.client.get(format!("{base}{path}")).send();

    assert_eq!(get("/v2/".into()).await.unwrap().status(), 200);
    let manifest = get(format!("/v2/{REPOSITORY}/manifests/latest")).await.unwrap();
    let digest = manifest.headers()["docker-content-digest"].to_str().unwrap().to_owned();
    let text = manifest.text().await.unwrap();
    assert_eq!(support::registry::content::digest(text.as_bytes()), digest);
    assert_eq!(get(format!("/v2/{REPOSITORY}/manifests/{digest}")).await.unwrap().text().await.unwrap(), text);
    assert!(text.contains(&bench.digest), "{text}");

    assert_eq!(bench.outcome().await, "206 exact bytes 1000-5999/70000");
    let head = bench.client.head(bench.url()).send().await.unwrap();
    assert_eq!((head.status().as_u16(), head.headers()["content-length"].as_bytes()), (200, &b"70000"[..]));
    for (path, status) in
        [("/v2/x/manifests/y", 404), ("/v2/other/blobs/sha256:0", 404), ("/x", 404), ("/v2/x/manifests/latest", 404)]
    {
        assert_eq!(get(path.into()).await.unwrap().status(), status, "{path}");
    }
    let behind = bench.client.get(bench.url()).header("range", "bytes=70000-").send().await.unwrap();
    assert_eq!((behind.status().as_u16(), behind.headers()["content-range"].as_bytes()), (416, &b"bytes */70000"[..]));

    let seen = bench.registry.served(Door::Registry);
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].range.as_deref(), seen[0].sent), (Some("bytes=1000-5999"), 5000));
}

#[tokio::test]
async fn tokens_are_for_a_scope_and_end() {
    let bench = Bench::new(Setup { access: Access::Bearer, ..Setup::default() }).await;
    let keys = bench.registry.keys();
    let refused = bench.ask().await.unwrap();
    let challenge = refused.headers()["www-authenticate"].to_str().unwrap();
    let realm = format!("{}/token", bench.registry.url(Door::Tokens));
    let scope = format!("repository:{REPOSITORY}:pull");
    assert_eq!(challenge, format!("Bearer realm=\"{realm}\",service=\"box\",scope=\"{scope}\""));

    let by_whom = format!("Basic {}", support::registry::basic(USER, &keys.password));
    assert_eq!(bench.get(&realm, "Basic bm9ib2R5Og==").await.status(), 401);
    let fetch = |scope: String| {
        let (url, by_whom) = (format!("{realm}?service=box&scope={scope}"), by_whom.clone());
        let (bench, registry) = (&bench, &bench.registry);
        async move {
            let text = bench.get(&url, &by_whom).await.text().await.unwrap();
            let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!((answer["expires_in"].as_u64(), registry.record().crowd(&scope).0), (Some(300), 1));
            answer["token"].as_str().unwrap().to_owned()
        }
    };
    let (good, other) = (fetch(scope.clone()).await, fetch("repository:other:pull".into()).await);

    let url = bench.url();
    assert_eq!(bench.get(&url, &bearer(&good)).await.status(), 200);
    assert_eq!(bench.get(&url, &bearer(&other)).await.status(), 401);
    bench.time.advance(300 * SECOND);
    let late = bench.get(&url, &bearer(&good)).await;
    assert!(late.headers()["www-authenticate"].to_str().unwrap().ends_with("error=\"invalid_token\""));
    assert_eq!(bench.registry.leaks(), Vec::<String>::new());
}

#[tokio::test]
async fn refresh_tokens_and_passwords_can_be_posted() {
    let bench = Bench::new(Setup { access: Access::Bearer, ..Setup::default() }).await;
    let keys = bench.registry.keys();
    let realm = format!("{}/token", bench.registry.url(Door::Tokens));

    for (form, status) in [
        (format!("grant_type=refresh_token&refresh_token={}&scope=x", keys.refresh), 200),
        (format!("grant_type=password&username={USER}&password={}&scope=x", keys.password), 200),
        ("grant_type=refresh_token&refresh_token=wrong&scope=x".to_owned(), 401),
    ] {
        assert_eq!(bench.client.post(&realm).body(form).send().await.unwrap().status(), status);
    }
}

#[tokio::test]
async fn signed_addresses_end() {
    let bench = Bench::new(Setup { storage: true, ..Setup::default() }).await;
    let redirect = bench.ask().await.unwrap();
    assert_eq!(redirect.status(), 307);
    let location = redirect.headers()["location"].to_str().unwrap();
    assert!(location.starts_with(&bench.registry.url(Door::Storage)) && location.contains("X-Amz-Expires=1200"));

    assert_eq!(bench.client.get(location).send().await.unwrap().bytes().await.unwrap(), bench.blob);
    assert_eq!(bench.client.get(location.split('?').next().unwrap()).send().await.unwrap().status(), 403);
    bench.time.advance(1200 * SECOND);
    assert_eq!(bench.client.get(location).send().await.unwrap().status(), 403);
}

#[tokio::test]
async fn each_fault_is_seen_as_what_it_is_and_the_next_answer_is_right() {
    const RIGHT: &str = "206 exact bytes 1000-5999/70000";
    let short = Duration::from_millis(30);
    let table = [
        (Fault::Refuse(short), "no connection"),
        (Fault::HangUp, "no head"),
        (Fault::ResetHead, "no head"),
        (Fault::Reset { after: 0 }, "206 broken bytes 1000-5999/70000"),
        (Fault::Reset { after: 1024 }, "206 broken bytes 1000-5999/70000"),
        (Fault::Cut { after: 4999 }, "206 broken bytes 1000-5999/70000"),
        (Fault::Status(404), "404 other"),
        (Fault::RetryAfter(429, 7), "429 empty"),
        (Fault::RetryAfterDate(503, 7), "503 empty"),
        (Fault::NoChallenge, "401 empty"),
        (Fault::StrangeChallenge, "401 empty"),
        (Fault::ForeignRealm, "401 empty"),
        (Fault::TokenRefused, "401 other"),
        (Fault::WholeFor206, "200 whole"),
        (Fault::OtherRange, "206 other bytes 999-5998/70000"),
        (Fault::WrongContentRange, "206 exact bytes 1001-6000/70001"),
        (Fault::WrongTotal, "206 exact bytes 1000-5999/5999"),
        (Fault::NoContentRange, "206 exact"),
        (Fault::Multipart, "206 other"),
        (Fault::ShorterRange, "206 less bytes 1000-3499/70000"),
        (Fault::Page, "200 other"),
        (Fault::Surplus(1), "206 more bytes 1000-5999/70000"),
        (Fault::Missing(1), "206 less bytes 1000-5999/70000"),
        (Fault::Flip, "206 other bytes 1000-5999/70000"),
        (Fault::Zeros, "206 other bytes 1000-5999/70000"),
        (Fault::Gzip, "206 other bytes 1000-5999/70000"),
        (Fault::OtherBlob, "416 empty bytes */31"),
        (Fault::Late(SECOND), RIGHT),
        (Fault::RedirectLoop, "307 empty"),
        (Fault::RedirectTo("http://10.0.0.1/".into()), "307 empty"),
        (Fault::RedirectElsewhere, "307 empty"),
        (Fault::RedirectToLoopback, "307 empty"),
        (Fault::RedirectNowhere, "307 empty"),
    ];
    for (fault, seen) in table {
        let bench = Bench::new(Setup::default()).await;
        let _driver = bench.drive();
        bench.registry.fault(Door::Registry, When::Nth(1), 0, fault.clone()).await;

        let mut outcomes = Vec::new();
        for _ in 0..3 {
            outcomes.push(bench.outcome().await);
            if outcomes.len() == 2 {
                bench.time.advance(short);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }

        assert_eq!(outcomes, [RIGHT, seen, RIGHT], "{fault:?}");
    }
}

#[tokio::test]
async fn doors_can_be_shut_from_the_start_and_open_again() {
    let bench = Bench::new(Setup::default()).await;
    bench.registry.fault(Door::Registry, When::Always, 1, Fault::Refuse(Duration::MAX)).await;
    assert_eq!(bench.outcome().await, "no connection");
    bench.time.advance(3600 * SECOND);
    assert_eq!(bench.outcome().await, "no connection");

    bench.registry.mend();
    tokio::time::sleep(Duration::from_millis(2)).await;
    assert_eq!(bench.outcome().await, "206 exact bytes 1000-5999/70000");
}

#[tokio::test]
async fn a_deaf_door_and_a_silent_server_take_no_real_time() {
    for fault in [Fault::Deaf(Duration::MAX), Fault::StallHead, Fault::Stall { after: 100 }, Fault::Trickle] {
        let bench = Bench::new(Setup::default()).await;
        let _driver = bench.drive();
        bench.registry.fault(Door::Registry, When::First, 1, fault.clone()).await;
        let (clock, began) = (bench.time.clock(), Instant::now());
        let slow = async { bench.ask().await?.bytes().await };

        let outcome = clock.timeout_at(clock.now() + 20 * SECOND, slow).await;

        assert!(outcome.is_err(), "{fault:?}");
        assert_eq!(bench.time.elapsed(), 20 * SECOND, "{fault:?}");
        assert!(began.elapsed() < 10 * SECOND, "{fault:?}");
        let sent: u64 = bench.registry.seen(Door::Registry).iter().map(|seen| seen.sent).sum();
        let expected = match fault {
            Fault::Stall { .. } => 100..101,
            Fault::Trickle => 19..22,
            _ => 0..1,
        };
        assert!(expected.contains(&sent), "{fault:?}: {sent}");
    }
}

#[tokio::test]
async fn a_slow_answer_takes_as_long_as_it_says() {
    let bench = Bench::new(Setup::default()).await;
    let _driver = bench.drive();
    bench.registry.fault(Door::Registry, When::First, 1, Fault::Late(40 * SECOND)).await;

    assert_eq!(bench.outcome().await, "206 exact bytes 1000-5999/70000");

    assert_eq!(bench.time.elapsed(), 40 * SECOND);
}

#[tokio::test]
async fn tls_is_spoken_where_it_should_be() {
    let bench = Bench::new(Setup { tls: true, storage: true, ..Setup::default() }).await;
    bench.registry.fault(Door::Registry, When::Nth(1), 0, Fault::RedirectToPlain).await;

    let location = |response: Response| response.headers()["location"].to_str().unwrap().to_owned();
    let (storage, plain) = (location(bench.ask().await.unwrap()), location(bench.ask().await.unwrap()));

    assert!(storage.starts_with("https://storage.test:") && plain.starts_with("http://elsewhere.test:"));
    for url in [storage, plain] {
        assert_eq!(bench.client.get(url).send().await.unwrap().bytes().await.unwrap(), bench.blob);
    }
}

#[tokio::test]
async fn a_proxy_leads_to_all_doors() {
    let bench = Bench::new(Setup::default()).await;
    let proxy = reqwest::Proxy::http(format!("http://{}", bench.registry.address(Door::Proxy))).unwrap();
    let client = Client::builder().proxy(proxy).tls_certs_only([]).build().unwrap();
    bench.registry.fault(Door::Proxy, When::Nth(1), 0, Fault::Status(502)).await;

    let get = || async { client.get(bench.url()).send().await.unwrap() };
    assert_eq!(get().await.bytes().await.unwrap(), bench.blob);
    assert_eq!(get().await.status(), 502);

    let seen = bench.registry.seen(Door::Registry);
    assert!(seen.iter().all(|seen| seen.proxied && seen.host == bench.registry.host(Door::Registry)));
    assert_eq!(seen.len(), 2);
}

#[tokio::test]
async fn secrets_in_the_wrong_place_are_noticed() {
    let bench = Bench::new(Setup { access: Access::Bearer, storage: true, ..Setup::default() }).await;
    let keys = bench.registry.keys();
    let by_whom = format!("Basic {}", support::registry::basic(USER, &keys.password));
    let realm = format!("{}/token?scope=x", bench.registry.url(Door::Tokens));
    let elsewhere = bench.registry.url(Door::Elsewhere);
    let text = bench.get(&realm, &by_whom).await.text().await.unwrap();
    let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(bench.registry.leaks(), Vec::<String>::new());

    bench.get(&elsewhere, &by_whom).await;
    bench.get(&bench.registry.url(Door::Storage), &bearer(answer["token"].as_str().unwrap())).await;
    bench.client.get(format!("{elsewhere}/r?{}", keys.refresh)).send().await.unwrap();

    let leaks = bench.registry.leaks();
    assert_eq!(
        leaks,
        [
            "a token at Storage: GET /",
            "name and password at Elsewhere: GET /",
            "the refresh token at Elsewhere: GET /r",
        ]
    );
}

#[test]
fn what_was_said_is_searched_for_secrets() {
    let watch = secrets::watch();
    let (kept, told) = (support::registry::fresh("kept"), support::registry::fresh("told"));
    secrets::keep(&kept);
    tracing::trace!(kept = "not this one", "a line nobody minds");
    assert_eq!(watch.told(), Vec::<String>::new());
    assert!(watch.heard() > 0);

    // It becomes a secret only after it was told: nothing may be forgotten.
    tracing::trace!("and {told} in the middle");
    secrets::said("harmless");
    secrets::keep(&told);

    let found = watch.told();
    assert!(found.len() == 1 && found[0].ends_with(&format!("and {told} in the middle")), "{found:?}");
    assert!(std::panic::catch_unwind(move || drop(watch)).is_err(), "nobody can fail to notice");
}
