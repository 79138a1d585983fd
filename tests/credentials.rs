//! Logins and tokens against token servers on loopback. Time stands still until a test moves it.

#[path = "support/clock.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with other tests")]
mod clock;
#[path = "credentials/tokenserver.rs"]
#[allow(unreachable_pub, reason = "a module of this test")]
mod tokenserver;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rafsd::base::{Fault, Secret};
use rafsd::net::Authorize;
use rafsd::net::auth::{AuthError, Keychain, Login, LoginFuture, TokenOptions, Tokens};
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};

use clock::VirtualClock;
use tokenserver::{Answer, TokenServer};

const SECOND: Duration = Duration::from_secs(1);

/// Logins in the order in which they are given; the last one stays.
#[derive(Debug, Default)]
struct Scripted {
    logins: Mutex<Vec<Login>>,
    refused: Mutex<Vec<Login>>,
    generation: AtomicU64,
}

impl Scripted {
    fn new(logins: Vec<Login>) -> Arc<Self> {
        Arc::new(Self { logins: Mutex::new(logins), ..Self::default() })
    }
}

impl Keychain for Scripted {
    fn login<'a>(&'a self, _: &'a str, _: &'a str) -> LoginFuture<'a> {
        Box::pin(std::future::ready(Ok(self.logins.lock().unwrap().first().cloned())))
    }

    fn refused(&self, _: &str, _: &str, login: &Login) {
        self.refused.lock().unwrap().push(login.clone());
        let mut logins = self.logins.lock().unwrap();
        if logins.len() > 1 && logins.first() == Some(login) {
            logins.remove(0);
        }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn origin(&self, _: &str, _: &str) -> Option<String> {
        Some("a script".to_owned())
    }
}

fn password(password: &str) -> Login {
    Login::Basic { user: "me".to_owned(), password: Secret::new(password) }
}

/// `Authorization` for [`password`].
fn basic(password: &str) -> String {
    use base64::Engine;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("me:{password}")))
}

struct Bench {
    server: TokenServer,
    clock: VirtualClock,
    keychain: Arc<Scripted>,
    tokens: Tokens,
}

async fn bench(answer: Answer, logins: Vec<Login>) -> Bench {
    let (server, clock, keychain) = (TokenServer::start(answer).await, VirtualClock::new(), Scripted::new(logins));
    let server_url = Some("http://127.0.0.1:5000".parse().unwrap());
    let options = TokenOptions { server: server_url, ..TokenOptions::default() };
    let tokens = Tokens::new("127.0.0.1:5000".to_owned(), keychain.clone(), options, clock.clock());
    Bench { server, clock, keychain, tokens }
}

impl Bench {
    async fn get(&self) -> Result<Option<String>, AuthError> {
        let until = self.clock.clock().now() + 30 * SECOND;
        self.tokens.authorization("a/b", until).await.map(text)
    }

    async fn challenged(&self, challenge: &str, sent: Option<&str>) -> Result<Option<String>, AuthError> {
        let until = self.clock.clock().now() + 30 * SECOND;
        let sent = sent.map(|sent| HeaderValue::from_str(sent).unwrap());
        self.tokens.challenged("a/b", &headers(challenge), sent.as_ref(), until).await.map(text)
    }

    /// After a 401 from the registry that names the token server.
    async fn refused(&self, sent: Option<&str>) -> Result<Option<String>, AuthError> {
        self.challenged(&self.server.challenge(), sent).await
    }
}

fn text(value: Option<HeaderValue>) -> Option<String> {
    value.map(|value| {
        assert!(value.is_sensitive());
        value.to_str().unwrap().to_owned()
    })
}

fn headers(challenge: &str) -> HeaderMap {
    HeaderMap::from_iter([(WWW_AUTHENTICATE, HeaderValue::from_str(challenge).unwrap())])
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[tokio::test]
async fn nothing_is_sent_until_a_registry_asks_and_then_a_token_for_readers() {
    let bench = bench(Answer::Token(300), vec![password("p")]).await;

    assert_eq!(bench.get().await.unwrap(), None);
    assert_eq!(bench.refused(None).await.unwrap(), some("Bearer t1"));
    assert_eq!(bench.get().await.unwrap(), some("Bearer t1"));

    let asked = bench.server.asked();
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0].method.as_str(), &asked[0].authorization), ("GET", &Some(basic("p"))));
    assert_eq!(asked[0].uri, "/token?service=registry&scope=repository%3Aa%2Fb%3Apull");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_who_need_a_token_ask_for_one() {
    let bench = Arc::new(bench(Answer::Token(300), vec![]).await);
    bench.server.close();

    let askers: Vec<_> = (0..500)
        .map(|_| {
            let bench = bench.clone();
            tokio::spawn(async move { bench.refused(None).await.unwrap() })
        })
        .collect();
    bench.server.until_asked(1).await;
    bench.server.open();

    for asker in askers {
        assert_eq!(asker.await.unwrap(), some("Bearer t1"));
    }
    assert_eq!(bench.server.count(), 1);
    assert_eq!(bench.server.asked()[0].authorization, None, "nobody in particular");
}

#[tokio::test]
async fn who_waits_leaves_at_his_own_time_and_the_request_goes_on() {
    let bench = bench(Answer::Token(300), vec![]).await;
    bench.server.close();

    let until = bench.clock.clock().now() + SECOND;
    let challenge = headers(&bench.server.challenge());
    let (late, ()) = tokio::join!(bench.tokens.challenged("a/b", &challenge, None, until), async {
        bench.server.until_asked(1).await;
        bench.clock.advance(SECOND);
    });
    assert!(matches!(late, Err(AuthError::Late { .. })), "{late:?}");

    bench.server.open();
    assert_eq!(bench.get().await.unwrap(), some("Bearer t1"));
    assert_eq!(bench.server.count(), 1);
}

#[tokio::test]
async fn a_token_is_replaced_before_it_ends_while_the_old_one_is_used() {
    let bench = bench(Answer::Token(100), vec![]).await;
    bench.refused(None).await.unwrap();

    bench.clock.skew_wall(-86_400);
    bench.clock.advance(69 * SECOND);
    assert_eq!(bench.get().await.unwrap(), some("Bearer t1"));
    assert_eq!(bench.server.count(), 1);

    bench.server.close();
    bench.clock.advance(17 * SECOND);
    for _ in 0..64 {
        assert_eq!(bench.get().await.unwrap(), some("Bearer t1"));
    }
    bench.server.until_asked(2).await;
    bench.server.open();
    bench.clock.advance(9 * SECOND);
    assert_eq!(bench.get().await.unwrap(), some("Bearer t2"), "the old one has ended");
    assert_eq!(bench.server.count(), 2);
}

#[tokio::test]
async fn a_token_server_that_is_down_costs_nothing_until_the_token_ends_and_is_asked_again_with_pauses() {
    let bench = bench(Answer::Token(100), vec![]).await;
    bench.refused(None).await.unwrap();
    bench.server.set(Answer::Status(503));

    bench.clock.advance(86 * SECOND);
    assert_eq!(bench.get().await.unwrap(), some("Bearer t1"));
    bench.server.until_asked(2).await;

    bench.clock.advance(9 * SECOND);
    let error = bench.get().await.unwrap_err();
    assert_eq!(error.fault(), Fault::Transient);
    let told =
        format!("http://{}/token gives no token for 127.0.0.1:5000: it answers with status 503", bench.server.address);
    assert_eq!(error.to_string(), told);
    let count = bench.server.count();
    for _ in 0..10 {
        assert_eq!(bench.get().await.unwrap_err().to_string(), told, "within the pause nobody asks");
    }
    assert_eq!(bench.server.count(), count);

    bench.server.set(Answer::Token(100));
    bench.clock.advance(10 * SECOND);
    assert_eq!(bench.get().await.unwrap(), Some(format!("Bearer t{}", count + 1)));
}

#[tokio::test]
async fn a_busy_token_server_is_left_alone_as_long_as_it_says() {
    let bench = bench(Answer::Busy(20), vec![]).await;

    bench.refused(None).await.unwrap_err();
    bench.clock.advance(19 * SECOND);
    bench.get().await.unwrap_err();
    assert_eq!(bench.server.count(), 1);
    bench.clock.advance(2 * SECOND);
    bench.get().await.unwrap_err();
    assert_eq!(bench.server.count(), 2);
}

#[tokio::test]
async fn answers_that_are_no_tokens_are_errors() {
    let bench = bench(Answer::Status(500), vec![]).await;
    for (body, told) in [
        ("{}".to_owned(), "there is no token in its answer"),
        (r#"{"token":""}"#.to_owned(), "there is no token in its answer"),
        ("<html>".to_owned(), "its answer is no token in JSON"),
        (r#"{"token":"a\nb"}"#.to_owned(), "its token cannot be sent"),
        (format!(r#"{{"token":"{}"}}"#, "x".repeat(300 << 10)), "its answer is too long"),
    ] {
        bench.server.set(Answer::Body(body));
        let error = bench.refused(None).await.unwrap_err().to_string();
        assert!(error.ends_with(told), "{error}");
        bench.clock.advance(60 * SECOND);
    }
    bench.server.set(Answer::Body(r#"{"access_token":"x"}"#.to_owned()));
    assert_eq!(bench.get().await.unwrap(), some("Bearer x"));
    bench.server.set(Answer::Token(300));
    bench.clock.advance(41 * SECOND);
    bench.get().await.unwrap();
    bench.clock.advance(17 * SECOND);
    let next = bench.get().await.unwrap();
    assert!(next.unwrap().starts_with("Bearer t"), "what says nothing is in force for 60 s");
}

#[tokio::test]
async fn a_refused_token_is_dropped_once_however_many_sent_it() {
    let bench = bench(Answer::Token(300), vec![]).await;
    bench.refused(None).await.unwrap();
    bench.clock.advance(10 * SECOND);

    for _ in 0..64 {
        assert_eq!(bench.refused(Some("Bearer t1")).await.unwrap(), some("Bearer t2"));
    }
    assert_eq!(bench.server.count(), 2);
}

#[tokio::test]
async fn a_registry_that_refuses_every_token_does_not_make_us_ask_for_ever_more() {
    let bench = bench(Answer::Token(300), vec![]).await;
    let mut sent = bench.refused(None).await.unwrap();
    let mut refusals = 0;
    for _ in 0..100 {
        sent = bench.refused(sent.as_deref()).await.unwrap();
        refusals += usize::from(sent.is_none());
    }
    assert!(bench.server.count() <= 3, "{}", bench.server.count());
    assert!(refusals >= 97, "{refusals}");

    bench.clock.advance(10 * SECOND);
    assert!(bench.get().await.unwrap().is_some(), "it may be well by now");
}

#[tokio::test]
async fn a_refresh_token_is_posted() {
    let bench = bench(Answer::Token(300), vec![Login::Identity(Secret::new("r&t"))]).await;

    assert_eq!(bench.refused(None).await.unwrap(), some("Bearer t1"));

    let asked = &bench.server.asked()[0];
    assert_eq!((asked.method.as_str(), asked.uri.as_str(), &asked.authorization), ("POST", "/token", &None));
    let expected = "grant_type=refresh_token&client_id=rafsd&scope=repository%3Aa%2Fb%3Apull&refresh_token=r%26t\
                    &service=registry";
    assert_eq!(asked.body, expected);
}

#[tokio::test]
async fn a_refused_login_is_asked_for_again_and_named_if_there_is_no_other() {
    let bench = bench(Answer::OnlyFor(basic("new")), vec![password("old"), password("new")]).await;

    assert_eq!(bench.refused(None).await.unwrap(), some("Bearer t2"));
    assert_eq!(*bench.keychain.refused.lock().unwrap(), [password("old")]);

    bench.server.set(Answer::Status(403));
    bench.keychain.generation.fetch_add(1, Ordering::Relaxed);
    let error = bench.get().await.unwrap_err();
    assert_eq!(error.fault(), Fault::Permanent);
    let told = error.to_string();
    assert!(told.contains("(status 403); check the credentials, which came from a script"), "{told}");
    assert!(!format!("{told} {error:?}").contains("new"), "{error:?}");
}

#[tokio::test]
async fn a_password_is_sent_to_a_registry_that_wants_it_and_not_again_when_it_was_refused() {
    let bench = bench(Answer::Status(500), vec![password("p")]).await;

    assert_eq!(bench.challenged("Basic realm=\"x\"", None).await.unwrap(), Some(basic("p")));
    assert_eq!(bench.get().await.unwrap(), Some(basic("p")));
    assert_eq!(bench.challenged("Basic realm=\"x\"", Some(&basic("p"))).await.unwrap(), None);
    assert_eq!(*bench.keychain.refused.lock().unwrap(), [password("p")]);
    assert_eq!(bench.server.count(), 0);

    *bench.keychain.logins.lock().unwrap() = vec![password("q")];
    bench.clock.advance(10 * SECOND);
    assert_eq!(bench.get().await.unwrap(), Some(basic("q")), "it was replaced");
}

#[tokio::test]
async fn nobody_has_no_password_and_a_given_token_is_sent_as_it_is() {
    let nobody = bench(Answer::Status(500), vec![]).await;
    assert_eq!(nobody.challenged("Basic realm=\"x\"", None).await.unwrap(), None);
    assert_eq!(nobody.challenged("Negotiate", None).await.unwrap(), None);

    let given = bench(Answer::Status(500), vec![Login::Bearer(Secret::new("abc"))]).await;
    assert_eq!(given.refused(None).await.unwrap(), some("Bearer abc"));
    assert_eq!(given.refused(Some("Bearer abc")).await.unwrap(), None);
    assert_eq!(given.server.count(), 0);
}

#[tokio::test]
async fn a_repository_for_everybody_is_read_although_there_is_no_token_for_it() {
    let bench = bench(Answer::Token(300), vec![]).await;
    bench.refused(None).await.unwrap();
    bench.server.set(Answer::Status(401));

    let until = bench.clock.clock().now() + SECOND;
    assert_eq!(bench.tokens.authorization("public", until).await.unwrap(), None, "the registry has not asked");
    let challenge = headers(&bench.server.challenge());
    let asked = bench.tokens.challenged("public", &challenge, None, until).await;
    assert!(matches!(asked, Err(AuthError::Denied { .. })), "{asked:?}");
}

#[tokio::test]
async fn a_login_does_not_follow_a_redirect_to_another_server() {
    let other = TokenServer::start(Answer::Token(300)).await;
    let away = Answer::Redirect(format!("http://{}/elsewhere", other.address));

    let by_password = bench(away.clone(), vec![password("p")]).await;
    let by_refresh = bench(away, vec![Login::Identity(Secret::new("r"))]).await;
    // With or without an answer, nothing of the login may arrive.
    let _ = by_password.refused(None).await;
    assert!(by_refresh.refused(None).await.is_err());

    assert_eq!(by_password.server.asked()[0].authorization, Some(basic("p")));
    for asked in other.asked() {
        assert_eq!((asked.method.as_str(), asked.authorization, asked.body.as_str()), ("GET", None, ""));
    }
}

#[tokio::test]
async fn a_registry_does_not_send_us_to_where_nobody_should_go() {
    let clock = VirtualClock::new();
    let keychain = Scripted::new(vec![password("p")]);
    let tokens = Tokens::new("registry.example".to_owned(), keychain, TokenOptions::default(), clock.clock());
    let until = clock.clock().now() + SECOND;
    for (realm, why) in [
        ("http://auth.example/token", "it would be asked without TLS"),
        ("ftp://auth.example/token", "it is not reached by HTTP"),
        ("https://me:p@auth.example/token", "its address holds a login"),
        ("nowhere", "there is no address"),
        ("https://127.0.0.1/token", "it is in a network of this host that the registry is not in itself"),
        ("https://169.254.169.254/token", "it is in a network of this host that the registry is not in itself"),
    ] {
        let challenge = headers(&format!("Bearer realm=\"{realm}\""));
        let error = tokens.challenged("a", &challenge, None, until).await.unwrap_err();
        assert_eq!(error.fault(), Fault::Permanent);
        assert!(error.to_string().ends_with(why), "{error}");
    }
}

#[tokio::test]
async fn a_name_for_this_very_host_does_not_help_a_registry_that_is_elsewhere() {
    let (clock, server) = (VirtualClock::new(), TokenServer::start(Answer::Token(300)).await);
    let server_url = Some("http://registry.example".parse().unwrap());
    let mut options = TokenOptions { server: server_url, ..TokenOptions::default() };
    options.client.resolve.push(("registry.example".to_owned(), "203.0.113.1:80".parse().unwrap()));
    let challenge = headers(&server.challenge().replace("127.0.0.1", "localhost"));
    let until = clock.clock().now() + SECOND;
    let ask = async |options| {
        let tokens = Tokens::new("registry.example".to_owned(), Scripted::new(vec![]), options, clock.clock());
        tokens.challenged("a", &challenge, None, until).await.map(text)
    };

    assert!(matches!(ask(options.clone()).await, Err(AuthError::Untrusted { .. })));
    assert_eq!(server.count(), 0);
    options.hosts.push("localhost".to_owned());
    assert_eq!(ask(options).await.unwrap(), some("Bearer t1"), "the operator says that it may");
}

#[tokio::test]
async fn a_registry_on_this_host_by_name_may_have_its_token_server_here_by_address() {
    let (clock, server) = (VirtualClock::new(), TokenServer::start(Answer::Token(300)).await);
    // A name for this host that does not say so itself.
    let Ok(name) = std::fs::read_to_string("/proc/sys/kernel/hostname") else { return };
    let name = name.trim().to_owned();
    let is_here = tokio::net::lookup_host((name.as_str(), 0)).await;
    if !is_here.is_ok_and(|mut found| found.next().is_some_and(|first| first.ip().is_loopback())) {
        eprintln!("SKIPPED: the name of this host is not one of loopback");
        return;
    }
    let options = TokenOptions { server: Some(format!("http://{name}").parse().unwrap()), ..TokenOptions::default() };
    let tokens = Tokens::new(name, Scripted::new(vec![]), options, clock.clock());
    let until = clock.clock().now() + SECOND;

    let token = tokens.challenged("a", &headers(&server.challenge()), None, until).await.unwrap();
    assert_eq!(text(token), some("Bearer t1"));
}

#[tokio::test]
async fn an_endpoint_is_authorized_by_tokens() {
    let bench = bench(Answer::Token(300), vec![]).await;
    let authorize: &dyn Authorize = &bench.tokens;
    let until = bench.clock.clock().now() + SECOND;

    let challenge = headers(&bench.server.challenge());
    assert_eq!(text(authorize.challenged("a", &challenge, None, until).await.unwrap()), some("Bearer t1"));
    assert_eq!(text(authorize.authorization("a", until).await.unwrap()), some("Bearer t1"));
    bench.server.set(Answer::Status(403));
    let refused = authorize.challenged("b", &challenge, None, until).await.unwrap_err();
    assert_eq!(refused.fault(), Fault::Permanent);
    assert!(refused.to_string().contains("no credentials are known for it"), "{refused}");
}
