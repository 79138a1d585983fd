//! A running daemon is given secrets, uses them against a registry that fails in all ways, and is listened to: its log at
//! its most talkative, what its commands print, its metrics and the answers of its interface. None of them says one.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::clock::VirtualClock;
use support::registry::{Access, Content, Door, Fault, Registry, Setup, USER, When, fresh};
use support::{building, secrets, tree};

/// How many images there are. Each has bytes of its own, so that nothing of it is there when it is asked for.
const IMAGES: usize = 12;

/// The repository of an image. All but the first are in one place, which has credentials of its own.
fn repository(number: usize) -> String {
    if number == 0 { format!("first/image{number}") } else { format!("team/image{number}") }
}

/// A daemon that says everything it can.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start(signed: &str) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RAFSD_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--restart", "never", "--log", "trace"]);
        command.arg("--cache").arg(path("cache")).arg("--run").arg(path("run"));
        command.env("HOME", path("home")).env_remove("DOCKER_CONFIG").env("RAFSD_REGISTRY_AUTH", signed);
        command.stdin(Stdio::null()).stderr(fs::File::create(path("log")).unwrap());
        let daemon = Self { child: command.spawn().unwrap(), dir };
        let until = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(daemon.dir.path().join("run/rafsd.sock")).is_err() {
            assert!(Instant::now() < until, "no answer: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// What a command prints, in both ways, and whether it succeeds. All of it is listened to.
    fn rafsd(&self, args: &[&str], stdin: &str) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        command.args(args).env("RAFSD_RUN", self.dir.path().join("run"));
        command.env("RAFSD_CACHE", self.dir.path().join("cache"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = [output.stdout, output.stderr].map(|part| String::from_utf8_lossy(&part).into_owned()).join("\n");
        secrets::said(&text);
        (output.status.success(), text)
    }

    /// The answer of the interface as it stands. It is listened to.
    fn ask(&self, request: &str, body: &Value) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("run/rafsd.sock")).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = "Host: x\r\nConnection: close\r\nContent-Type: application/json";
        write!(stream, "{request} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        secrets::said(&answer);
        answer
    }

    /// Everything that can be asked for without doing anything.
    fn ask_everything(&self) {
        for path in
            ["info", "mounts", "prefetch", "trace", "activity", "log", "cache", "cache/usage", "pulls", "credentials"]
        {
            let answer = self.ask(&format!("GET /v1/{path}"), &Value::Null);
            assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        }
        let metrics = self.ask("GET /metrics", &Value::Null);
        assert!(metrics.contains("rafsd_"), "{metrics}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_keeps_its_secrets_whatever_goes_wrong() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/var/tmp").is_dir() {
        support::skip("a_daemon_keeps_its_secrets_whatever_goes_wrong", "not root");
        return;
    }
    let watch = secrets::watch();
    let scratch = tempfile::tempdir().unwrap();
    let mut content = Content::default();
    for number in 0..IMAGES {
        let (source, out) = (scratch.path().join(format!("source{number}")), scratch.path().join(format!("{number}")));
        fs::create_dir_all(&source).unwrap();
        tree::big_file(&source.join("file"), 1, number as u64).unwrap();
        building::build(&source, &out).unwrap();
        content.image(&repository(number), "1", &out, true);
    }
    let setup = Setup { content, access: Access::Bearer, storage: true, numeric: true, ..Setup::default() };
    let registry = Registry::start(setup, &VirtualClock::new()).await;

    // One that is of no use here, as somebody may have it in the environment.
    let other = fresh("environment");
    secrets::keep(&other);
    let environment = support::registry::basic("somebody", &other);
    secrets::keep(&environment);
    let daemon = Daemon::start(&environment);
    let record = registry.record().clone();
    tokio::task::spawn_blocking(move || go_through_everything(&daemon, &registry, &other)).await.unwrap();

    assert!(record.scopes().len() >= IMAGES, "{:?}", record.scopes());
    assert!(watch.heard() > 10_000, "it is listened to");
    assert_eq!(record.leaks(), Vec::<String>::new());
}

/// Everything that a daemon does with a registry, in good days and bad.
fn go_through_everything(daemon: &Daemon, registry: &Registry, other: &str) {
    let runtime = tokio::runtime::Handle::current();
    let host = registry.host(Door::Registry);
    let image = |number| format!("docker://{host}/{}:1", repository(number));
    let keys = registry.keys();

    // With wrong credentials, with those of the environment, then with the right ones.
    daemon.rafsd(&["resolve", &image(0)], "");
    daemon.rafsd(&["credentials", "set", &host, "--user", USER, "--password-stdin"], other);
    let (works, text) = daemon.rafsd(&["resolve", &image(0)], "");
    assert!(!works && text.contains("gives no token"), "{text}");
    let (works, text) =
        daemon.rafsd(&["credentials", "set", &host, "--user", USER, "--password-stdin"], &keys.password);
    assert!(works, "{text}");
    let (works, text) = daemon.rafsd(&["resolve", "--json", &image(0)], "");
    assert!(works, "{text}\n{}", daemon.log());
    let (works, text) = daemon.rafsd(&["pull", "--json", &image(0)], "");
    assert!(works, "{text}\n{}", daemon.log());
    daemon.ask_everything();

    // By a refresh token, from another repository, with every kind of fault at each door.
    let place = format!("{host}/team");
    let (works, text) = daemon.rafsd(&["credentials", "set", &place, "--identity-token-stdin"], &keys.refresh);
    assert!(works, "{text}");
    let faults = [
        (Door::Tokens, Fault::HangUp),
        (Door::Tokens, Fault::NoToken),
        (Door::Registry, Fault::TokenRefused),
        (Door::Registry, Fault::RedirectLoop),
        (Door::Registry, Fault::RedirectElsewhere),
        (Door::Storage, Fault::HangUp),
        (Door::Storage, Fault::Reset { after: 1000 }),
        (Door::Storage, Fault::Status(403)),
        (Door::Storage, Fault::Page),
        (Door::Storage, Fault::RedirectTo("http://169.254.169.254/".to_owned())),
    ];
    assert_eq!(faults.len(), IMAGES - 2);
    for (number, (door, fault)) in faults.into_iter().enumerate() {
        keys.revoke_tokens();
        let next = registry.plan().counted(door);
        // The storage gives the bootstrap first, which is fetched in another way than the blob.
        let first = if door == Door::Storage { next + 1 } else { next };
        runtime.block_on(registry.fault(door, When::Some(first, 2), 0, fault.clone()));
        let (_, text) = daemon.rafsd(&["pull", &image(1 + number)], "");
        assert!(registry.plan().counted(door) > first, "{door:?}: {fault:?} was not met: {text}");
        daemon.ask("POST /v1/pulls", &json!({ "image": { "bootstrap": image(1 + number) } }));
        registry.mend();
    }

    // When nothing is good any more.
    keys.lock(true);
    keys.revoke_signatures();
    let (works, text) = daemon.rafsd(&["pull", &image(IMAGES - 1)], "");
    assert!(!works, "{text}");
    daemon.ask("POST /v1/mounts", &json!({ "image": { "bootstrap": image(IMAGES - 1) }, "dir": "/nonexistent" }));
    daemon.rafsd(&["credentials", "list"], "");
    daemon.rafsd(&["credentials", "remove", &host], "");
    daemon.ask_everything();
    secrets::said(&daemon.log());
}
