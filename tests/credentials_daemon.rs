//! A confined daemon logs in to a registry: by a helper that it cannot start itself, and with credentials that it
//! is given while it runs.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;

const PATIENCE: Duration = Duration::from_secs(60);

/// A registry that wants a password and has nothing. It remembers what it was sent.
struct Registry {
    address: SocketAddr,
    sent: Arc<Mutex<Vec<String>>>,
}

impl Registry {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, sent) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
        let log = sent.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let log = log.clone();
                thread::spawn(move || answer(stream, &log));
            }
        });
        Self { address, sent }
    }

    /// Who asked since the last call, each once.
    fn users(&self) -> Vec<String> {
        let mut users = std::mem::take(&mut *self.sent.lock().unwrap());
        users.dedup();
        users
    }
}

/// One request for each connection: 401 without a login, 404 with one.
fn answer(mut stream: TcpStream, sent: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let login = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("authorization").then(|| value.trim_start_matches("Basic ").to_owned())
    });
    let status = match login {
        Some(login) => {
            let text = base64::engine::general_purpose::STANDARD.decode(login).unwrap();
            sent.lock().unwrap().push(String::from_utf8(text).unwrap());
            "404 Not Found\r\n"
        }
        None => "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\n",
    };
    let _ = write!(stream, "HTTP/1.1 {status}Content-Length: 0\r\nConnection: close\r\n\r\n");
}

struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    /// A daemon whose docker config names a helper, and that may read hardly anything.
    fn start() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["home/.docker", "bin", "readable"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        let helper = path("bin/docker-credential-test");
        fs::write(&helper, "#!/bin/sh\necho '{\"Username\": \"helped\", \"Secret\": \"hunter1\"}'\n").unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("home/.docker/config.json"), r#"{"credsStore": "test"}"#).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RAFSD_") || name.starts_with("XDG_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--restart", "never", "--log", "debug"]);
        command.arg("--cache").arg(path("cache")).arg("--run").arg(path("run"));
        command.arg("--sandbox-read").arg(path("readable"));
        command.env("HOME", path("home")).env("PATH", path("bin")).env_remove("DOCKER_CONFIG");
        command.stdin(Stdio::null()).stderr(fs::File::create(path("log")).unwrap());
        let daemon = Self { child: command.spawn().unwrap(), dir };
        let until = Instant::now() + PATIENCE;
        while !daemon.rafsd(&["credentials", "list"], "").status.success() {
            assert!(Instant::now() < until, "no answer: {}", daemon.log());
            thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    fn rafsd(&self, args: &[&str], stdin: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        command
            .args(args)
            .env("RAFSD_RUN", self.dir.path().join("run"))
            .env("RAFSD_CACHE", self.dir.path().join("cache"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that is refused may not read it.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    }

    fn set(&self, args: &[&str], stdin: &str) -> Output {
        self.rafsd(&[&["credentials", "set"], args].concat(), stdin)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// The answer to a request as it stands.
    fn raw(&self, method: &str, body: &str) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("run/rafsd.sock")).unwrap();
        let head = format!("{method} /v1/credentials HTTP/1.1\r\nHost: x\r\nConnection: close");
        let length = body.len();
        write!(stream, "{head}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_confined_daemon_has_its_helpers_run_and_takes_other_credentials_while_it_runs() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/var/tmp").is_dir() {
        eprintln!("SKIPPED: not root");
        return;
    }
    let (daemon, registry) = (Daemon::start(), Registry::start());
    let (host, reference) = (registry.address.to_string(), format!("docker://{}/team/app:1", registry.address));
    let users = || {
        let output = daemon.rafsd(&["resolve", &reference], "");
        assert!(!output.status.success() && !text(&output.stderr).contains("hunter"), "{output:?}");
        registry.users()
    };

    assert_eq!(users(), ["helped:hunter1"], "{}", daemon.log());
    let place = format!("{host}/team");
    assert!(daemon.set(&[&place, "--user", "given", "--password-stdin"], "hunter2\n").status.success());
    assert_eq!(users(), ["given:hunter2"]);
    let listed = text(&daemon.rafsd(&["credentials", "list"], "").stdout);
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(listed.contains(&format!("{place}  password        given")), "{listed}");
    let json: serde_json::Value =
        serde_json::from_slice(&daemon.rafsd(&["credentials", "list", "--json"], "").stdout).unwrap();
    let expected = serde_json::json!([{"registry": host, "repository": "team", "user": "given", "kind": "password"}]);
    assert_eq!(json, expected);
    assert!(daemon.set(&[&place, "--user", "other", "--password-stdin"], "hunter3").status.success());
    assert_eq!(users(), ["other:hunter3"]);

    assert!(daemon.rafsd(&["credentials", "remove", &place], "").status.success());
    assert_eq!(users(), ["helped:hunter1"]);
    let gone = daemon.rafsd(&["credentials", "remove", &place], "");
    assert_eq!(gone.status.code(), Some(1));
    let told =
        format!("rafsd: no credentials were given for {place}; `rafsd credentials list` lists those that were\n");
    assert_eq!(text(&gone.stderr), told);

    // What is refused is not repeated either.
    let odd = r#"{"registry": "r.example", "login": {"password": {"user": "me", "password": 424242}}}"#;
    let refused = daemon.raw("PUT", odd);
    assert!(refused.starts_with("HTTP/1.1 422 ") && !refused.contains("424242"), "{refused}");
    let odd = r#"{"registry": "me:hunter4@r.example", "login": {"registry_token": "hunter5"}}"#;
    let refused = daemon.raw("PUT", odd);
    assert!(refused.starts_with("HTTP/1.1 422 ") && !refused.contains("hunter"), "{refused}");
    for (args, stdin) in [
        (&[host.as_str(), "--user", "a:b", "--password-stdin"][..], "hunter6"),
        (&[&host, "--identity-token-stdin"], "two words"),
        (&[&host, "--registry-token-stdin"], ""),
        (&["r.example", "--user", "me"], ""),
        (&["*.example", "--registry-token-stdin"], "t"),
    ] {
        assert!(!daemon.set(args, stdin).status.success(), "{args:?}");
    }
    let log = daemon.log();
    assert!(!log.contains("hunter") && !log.contains("424242"), "{log}");
    assert!(log.contains("credentials were given"), "{log}");
}
