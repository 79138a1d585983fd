//! Programs of other people that serve blobs, started on the loopback interface for one test each.
//!
//! Each has a private directory, a port that was free, and, where the test runs as root, an account without rights.
//! A program is killed by its id when its value is dropped, also by a panic.

pub mod nginx;
pub mod squid;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// `nobody` and `nogroup` of Debian, who own nothing.
const NOBODY: u32 = 65534;

/// How long a program may take to start, or to say in its log what it did.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a program is; administrators' programs are not on everybody's path.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Whether all `programs` are here. If not, says aloud that `test` proved nothing.
pub fn are_here(test: &str, programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|name| find(name).is_none()).copied().collect();
    if !missing.is_empty() {
        super::skip(test, &format!("not installed: {}", missing.join(", ")));
    }
    missing.is_empty()
}

/// A port of 127.0.0.1 where nobody listens.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Ends when `fact` holds.
///
/// # Panics
/// It does not come to hold.
pub fn wait_until(what: &str, mut fact: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !fact() {
        assert!(Instant::now() < until, "never came to hold: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A directory for one program, which may write there whoever it is.
pub fn private_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    if rustix::process::geteuid().is_root() {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    dir
}

/// A program that listens.
pub struct Program {
    pub dir: tempfile::TempDir,
    pub port: u16,
    name: &'static str,
    args: Vec<String>,
    child: Option<Child>,
}

impl Program {
    /// Starts `name` with `args`, which make it stay in the foreground and listen at `port`. What it says goes to the file `said` in `dir`.
    pub fn start(name: &'static str, args: Vec<String>, dir: tempfile::TempDir, port: u16) -> Self {
        let mut program = Self { dir, port, name, args, child: None };
        program.start_again();
        program
    }

    /// Starts it again after [`Program::kill`], at the same port.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "{} runs", self.name);
        let said = fs::File::options().create(true).append(true).open(self.dir.path().join("said")).unwrap();
        let mut command = Command::new(find(self.name).expect("looked for beforehand"));
        command.args(&self.args).current_dir(self.dir.path()).env("HOME", self.dir.path());
        command.stdin(Stdio::null()).stdout(said.try_clone().unwrap()).stderr(said).process_group(0);
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        self.child = Some(command.spawn().unwrap());
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let gone = self.child.as_mut().expect("just started").try_wait().unwrap();
            assert!(gone.is_none() && Instant::now() < until, "{} does not start: {}", self.name, self.read("said"));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it. Whoever asks it then finds nobody.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let child = self.child.as_ref().expect("it runs");
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    /// What it has written to a file of its directory so far.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A certificate for 127.0.0.1 and its key, as `cert.pem` and `key.pem` in `dir`, readable for a program there.
pub fn certify(dir: &Path) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    fs::write(dir.join("cert.pem"), made.cert.pem()).unwrap();
    fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
}
