//! The daemon as a service: what it tells a service manager, the socket that it is given, what its
//! threads have given up, and the units.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rafsd::sys::sandbox::{has_seccomp, landlock_version};

const PATIENCE: Duration = Duration::from_secs(60);

/// A directory for a daemon, on a disk.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// A daemon below `dir`, with nothing from outside in its environment.
fn serve(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    let foreign = |name: &String| name.starts_with("RAFSD_") || name.starts_with("LISTEN_");
    for name in std::env::vars().map(|(name, _)| name).filter(foreign) {
        command.env_remove(name);
    }
    command.arg("serve").arg("--cache").arg(dir.join("cache")).arg("--run").arg(dir.join("run"));
    command.stdin(Stdio::null()).stderr(fs::File::create(dir.join("log")).unwrap());
    command
}

/// Kills the daemon if the test fails before it has ended.
struct Daemon(Child);

impl Daemon {
    /// SIGTERM, and the exit status.
    fn stop(&mut self) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `GET /v1/info` on the control socket: the answer's first line.
fn ask(socket: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /v1/info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

fn wait_until_it_answers(socket: &Path) {
    let until = Instant::now() + PATIENCE;
    while !ask(socket).is_ok_and(|line| line.contains("200")) {
        assert!(Instant::now() < until, "no answer");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_service_manager_hears_of_readiness_life_and_the_end() {
    let dir = scratch();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut buffer = [0; 1024];
        loop {
            let len = socket.recv(&mut buffer).expect("a message in time");
            let text = String::from_utf8(buffer[..len].to_vec()).unwrap();
            // What it gives to hold is another matter.
            if !text.starts_with("FDSTORE") {
                return text;
            }
        }
    };
    let mut command = serve(dir.path());
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "2000000");
    let mut daemon = Daemon(command.spawn().unwrap());

    let ready = hear();
    assert!(ready.starts_with("READY=1\nSTATUS="), "{ready}");
    assert!(ask(&dir.path().join("run/rafsd.sock")).unwrap().contains("200"), "ready means that it answers");
    let since = Instant::now();
    for _ in 0..3 {
        assert_eq!(hear(), "WATCHDOG=1");
    }
    assert!(since.elapsed() < Duration::from_secs(6), "in time, each time");
    let status = std::thread::scope(|scope| {
        let stopped = scope.spawn(|| daemon.stop());
        while hear() == "WATCHDOG=1" {}
        stopped.join().unwrap()
    });
    assert_eq!(status, Some(0));
}

#[test]
fn the_last_word_is_that_it_stops() {
    let dir = scratch();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let mut command = serve(dir.path());
    command.env("NOTIFY_SOCKET", &path).args(["--exit-when-idle", "1s"]);
    let mut daemon = Daemon(command.spawn().unwrap());

    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));

    let (mut told, mut buffer) = (Vec::new(), [0; 1024]);
    socket.set_nonblocking(true).unwrap();
    while let Ok(len) = socket.recv(&mut buffer) {
        told.push(String::from_utf8_lossy(&buffer[..len]).into_owned());
    }
    // Descriptors that it gave to hold and took back.
    told.retain(|text| !text.starts_with("FDSTORE"));
    assert_eq!(told.len(), 2, "no watchdog was asked for: {told:?}");
    assert_eq!(told[1], "STOPPING=1");
}

#[test]
fn a_socket_that_was_handed_over_is_answered_on_and_stays() {
    let dir = scratch();
    let path = dir.path().join("given.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // Asked before anybody is there to answer: the service manager's socket holds the request.
    let asked = std::thread::spawn({
        let path = path.clone();
        move || ask(&path).unwrap()
    });
    let inner = serve(dir.path());
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=control; exec \"$0\" \"$@\" 3<&0 0</dev/null";
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(script).arg(inner.get_program()).args(inner.get_args());
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener))).stderr(Stdio::null());
    let mut daemon = Daemon(command.spawn().unwrap());

    assert!(asked.join().unwrap().contains("200"));
    assert!(!dir.path().join("run/rafsd.sock").exists(), "it makes none of its own");
    assert_eq!(daemon.stop(), Some(0));
    assert!(path.exists(), "the socket is not the daemon's to remove");
}

#[test]
fn a_wrong_socket_is_refused() {
    let dir = scratch();
    let inner = serve(dir.path());
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=control; exec \"$0\" \"$@\" 3</dev/null";
    let output =
        Command::new("/bin/sh").arg("-c").arg(script).arg(inner.get_program()).args(inner.get_args()).output().unwrap();

    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("the socket that was handed over is no listening Unix stream socket"), "{told}");
}

#[test]
fn a_daemon_that_is_refused_leaves_no_directory_behind() {
    let dir = scratch();
    let mut daemon = Daemon(serve(dir.path()).spawn().unwrap());
    wait_until_it_answers(&dir.path().join("run/rafsd.sock"));
    let second = dir.path().join("second");
    fs::create_dir(&second).unwrap();
    let places = |cache: &str, run: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        command.arg("serve").arg("--cache").arg(dir.path().join(cache)).arg("--run").arg(dir.path().join(run));
        command.output().unwrap()
    };

    let refused = places("second/a/cache", "run");

    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("a daemon is serving here"), "{said}");
    assert!(fs::read_dir(&second).unwrap().next().is_none());
    assert!(ask(&dir.path().join("run/rafsd.sock")).unwrap().contains("200"), "the first one goes on");
    assert_eq!(daemon.stop(), Some(0));
}

/// Of each thread: `NoNewPrivs`, `Seccomp`, `Seccomp_filters`.
fn threads(pid: u32) -> BTreeMap<String, (u32, u32, u32)> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).unwrap_or("0").to_owned()
        };
        let number = |name: &str| field(name).parse().unwrap();
        let about = (number("NoNewPrivs"), number("Seccomp"), number("Seccomp_filters"));
        found.insert(format!("{} {}", field("Name"), task.file_name().display()), about);
    }
    found
}

#[test]
fn every_thread_but_the_one_outside_is_confined() {
    if landlock_version().is_none() || !has_seccomp() {
        return eprintln!("SKIPPED: this kernel has no sandbox");
    }
    let before = threads(std::process::id()).into_values().next().unwrap();
    let dir = scratch();
    let mut daemon = Daemon(serve(dir.path()).spawn().unwrap());
    wait_until_it_answers(&dir.path().join("run/rafsd.sock"));

    let threads = threads(daemon.0.id());
    let kind = |name: &str| name.split(['-', ' ']).next().unwrap_or_default().to_owned();
    let kinds: std::collections::BTreeSet<_> = threads.keys().map(|name| kind(name)).collect();
    for wanted in ["rafsd", "net", "decode", "flush", "mnt", "outside", "keep"] {
        assert!(kinds.contains(wanted), "{threads:?}");
    }
    for (name, about) in &threads {
        // This test may itself run under a filter, as in a container.
        let more = |filters| (1, 2, before.2 + filters);
        let wanted = match kind(name).as_str() {
            // Keepers are started by one that is outside itself.
            "outside" | "keep" => before,
            "decode" => more(2),
            _ => more(1),
        };
        assert_eq!(*about, wanted, "{name}");
    }
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn keepers_are_confined_but_for_the_threads_that_start_daemons_and_unmount() {
    if landlock_version().is_none() || !has_seccomp() {
        return eprintln!("SKIPPED: this kernel has no sandbox");
    }
    let before = threads(std::process::id()).into_values().next().unwrap();
    for (options, confined) in [(&["--restart", "keepers"][..], true), (&["--sandbox", "off"], false)] {
        let dir = scratch();
        let mut daemon = Daemon(serve(dir.path()).args(options).spawn().unwrap());
        wait_until_it_answers(&dir.path().join("run/rafsd.sock"));

        let keepers = rafsd::daemon::keeper::statuses(&dir.path().join("run"));

        assert_eq!(keepers.len(), 2);
        for keeper in keepers {
            let threads = threads(keeper.pid);
            assert_eq!(threads.len(), 3, "{threads:?}");
            for (name, about) in &threads {
                let is_free = !confined || name.starts_with("hands");
                assert_eq!(*about, if is_free { before } else { (1, 2, before.2 + 1) }, "{name} {options:?}");
            }
        }
        assert_eq!(daemon.stop(), Some(0));
    }
}

#[test]
fn a_hangup_has_the_settings_read_again_and_never_ends_the_daemon() {
    let dir = scratch();
    let config = dir.path().join("config.toml");
    let write = |text: &str| fs::write(&config, text).unwrap();
    write("log = \"info\"\n");
    let mut daemon = Daemon(serve(dir.path()).arg("--config").arg(&config).spawn().unwrap());
    wait_until_it_answers(&dir.path().join("run/rafsd.sock"));
    let hang_up = |text: &str, told: &str| {
        write(text);
        let pid = nix::unistd::Pid::from_raw(daemon.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        let until = Instant::now() + PATIENCE;
        while !fs::read_to_string(dir.path().join("log")).unwrap().contains(told) {
            assert!(Instant::now() < until, "never {told:?}: {}", fs::read_to_string(dir.path().join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let level = || {
        let mut stream = UnixStream::connect(dir.path().join("run/rafsd.sock")).unwrap();
        stream.write_all(b"GET /v1/log HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().last().unwrap_or_default().to_owned()
    };

    hang_up("log = \"debug\"\n", "settings were read again");
    assert!(level().contains("rafsd=debug"), "{}", level());
    hang_up("log = \"debug\"\ndeadline = \"5s\"\nfetches = 3\n", "settings=\"deadline, fetches\"");
    hang_up("log = \"trace\"\nfetchs = 3\n", "settings stay as they are");
    assert!(level().contains("rafsd=debug"), "{}", level());
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn the_sandbox_can_be_turned_off() {
    let before = threads(std::process::id()).into_values().next().unwrap();
    let dir = scratch();
    let mut command = serve(dir.path());
    command.args(["--sandbox", "off"]);
    let mut daemon = Daemon(command.spawn().unwrap());
    wait_until_it_answers(&dir.path().join("run/rafsd.sock"));

    assert!(threads(daemon.0.id()).values().all(|about| *about == before));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn the_hardening_of_the_unit_counts() {
    let unit = &units()[0];
    // The unit before it was hardened had 9.4. What is left is what mounting takes.
    let threshold = ["security", "--offline=yes", "--threshold=45"];
    let Ok(output) = Command::new("systemd-analyze").args(threshold).arg(unit).output() else {
        return eprintln!("SKIPPED: no systemd-analyze here");
    };
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", told.lines().last().unwrap_or_default());
}

fn units() -> [PathBuf; 2] {
    ["rafsd.service", "rafsd.socket"].map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name))
}

/// Settings of a unit file.
fn settings(path: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn the_units_never_give_the_daemon_mounts_that_nobody_sees() {
    // Directives that give a service a mount namespace of its own (systemd.exec(5)).
    const FORBIDDEN: &[&str] = &[
        "Private",
        "ProtectSystem",
        "ProtectHome",
        "ProtectProc",
        "ProcSubset",
        "ProtectKernel",
        "ProtectControlGroups",
        "DynamicUser",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "ExecPaths",
        "NoExecPaths",
        "TemporaryFileSystem",
        "Bind",
        "Root",
        "MountImages",
        "ExtensionImages",
        "LoadCredential",
        "SetCredential",
        "LogNamespace",
        "MountAPIVFS",
        "MountFlags",
        "NetworkNamespacePath",
        "IPCNamespacePath",
    ];
    for unit in units() {
        for (key, _) in settings(&unit) {
            assert!(!FORBIDDEN.iter().any(|forbidden| key.starts_with(forbidden)), "{key} in {}", unit.display());
        }
    }
    let service = settings(&units()[0]);
    let has = |key: &str, value: &str| service.contains(&(key.to_owned(), value.to_owned()));
    assert!(has("Type", "notify") && has("KillMode", "process") && has("FileDescriptorStorePreserve", "yes"));
}

#[test]
fn systemd_understands_the_units() {
    let dir = scratch();
    // The program need not be installed, nor its manual.
    for unit in units() {
        let text = fs::read_to_string(&unit).unwrap();
        let text = text.replace("/usr/local/sbin/rafsd", env!("CARGO_BIN_EXE_rafsd"));
        let text: String =
            text.lines().filter(|line| !line.starts_with("Documentation=")).map(|l| format!("{l}\n")).collect();
        fs::write(dir.path().join(unit.file_name().unwrap()), text).unwrap();
    }
    let verify = |unit: &str| Command::new("systemd-analyze").arg("verify").arg(dir.path().join(unit)).output();
    for unit in ["rafsd.service", "rafsd.socket"] {
        let Ok(output) = verify(unit) else {
            return eprintln!("SKIPPED: no systemd-analyze here");
        };
        let told = String::from_utf8_lossy(&output.stderr);
        // A directive that is younger than this systemd.
        let told: Vec<_> = told.lines().filter(|line| !line.contains("FileDescriptorStorePreserve")).collect();
        assert!(output.status.success() && told.is_empty(), "{unit}: {told:?}");
    }
}
