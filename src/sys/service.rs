//! The service manager that started this process, as systemd does: telling it how things stand,
//! sockets that it opened, and descriptors that it keeps across restarts.
//!
//! The protocols are those of `sd_notify(3)` and `sd_listen_fds(3)`. Without a service manager
//! everything here does nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::time::{ClockId, clock_gettime};

use super::fdpass;

/// The variables of the protocols. A program that starts another one which is no part of its own
/// service takes them out of its environment.
pub const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// First descriptor that a service manager hands over (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// Most descriptors that are taken. systemd's own limit is far below.
const MAX_RECEIVED: RawFd = 1 << 16;
/// Longest name of a stored descriptor, in bytes.
const MAX_NAME: usize = 255;

/// The service manager, or nobody. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Supervisor(Arc<Link>);

#[derive(Debug, Default)]
struct Link {
    /// Where it listens.
    address: Option<String>,
    socket: OnceLock<UnixDatagram>,
    watchdog: Option<Duration>,
    received: Mutex<Vec<(String, OwnedFd)>>,
}

impl Supervisor {
    /// Reads what the environment says about the service manager, and takes the descriptors that
    /// it handed over. Opens nothing. To be called first thing, before anything else is opened; a
    /// second call in one process finds no descriptors.
    pub fn from_environment() -> Self {
        let var = |name: &str| std::env::var(name).ok();
        let watchdog = watchdog(var("WATCHDOG_USEC").as_deref(), var("WATCHDOG_PID").as_deref());
        let handed =
            listed(var("LISTEN_PID").as_deref(), var("LISTEN_FDS").as_deref(), var("LISTEN_FDNAMES").as_deref());
        let received = Mutex::new(take_descriptors(handed));
        Self(Arc::new(Link { address: var("NOTIFY_SOCKET"), watchdog, received, ..Link::default() }))
    }

    /// Finds the service manager; until then it is told nothing.
    ///
    /// # Errors
    /// Its socket is named but cannot be reached.
    pub fn connect(&self) -> io::Result<()> {
        if let Some(address) = &self.0.address {
            let _ = self.0.socket.set(connect(address)?);
        }
        Ok(())
    }

    /// How often [`Supervisor::alive`] is expected, if at all.
    pub fn watchdog(&self) -> Option<Duration> {
        self.0.watchdog.filter(|_| self.0.socket.get().is_some())
    }

    /// Start-up is over, or a reload is.
    pub fn ready(&self, status: &str) -> io::Result<()> {
        self.tell(&format!("READY=1\nSTATUS={}", one_line(status)), None)
    }

    /// The process begins to stop.
    pub fn stopping(&self) -> io::Result<()> {
        self.tell("STOPPING=1", None)
    }

    /// The process changes its configuration or its program; [`Supervisor::ready`] ends that.
    pub fn reloading(&self) -> io::Result<()> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()), None)
    }

    /// The process is well: feeds the watchdog.
    pub fn alive(&self) -> io::Result<()> {
        self.tell("WATCHDOG=1", None)
    }

    /// Asks it to keep a copy of `fd`, also when this process dies, and to hand it to the next
    /// one under `name`. A name may be used for several descriptors. It does not let go of it for
    /// what happens to it (`FDPOLL=0`). Does nothing without a service manager.
    ///
    /// # Errors
    /// `InvalidInput` for a name that the protocol cannot carry: empty, over 255 bytes, or with a
    /// colon or a control character.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", checked(name)?), Some(fd))
    }

    /// Asks it to forget all descriptors called `name`.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={}", checked(name)?), None)
    }

    /// All descriptors that were handed over and not taken yet, in order, with their names:
    /// sockets, and what an earlier process had stored.
    pub fn received(&self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut *self.0.received.lock().unwrap())
    }

    /// Takes all received descriptors whose name is `wanted`, and leaves the others.
    pub fn take_those(&self, wanted: impl Fn(&str) -> bool) -> Vec<(String, OwnedFd)> {
        self.0.received.lock().unwrap().extract_if(.., |(name, _)| wanted(name)).collect()
    }

    /// Takes the first received descriptor that is called `name`.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        let mut received = self.0.received.lock().unwrap();
        let at = received.iter().position(|(known, _)| known == name)?;
        Some(received.remove(at).1)
    }

    fn tell(&self, message: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(socket) = self.0.socket.get() else { return Ok(()) };
        fdpass::send(socket.as_fd(), message.as_bytes(), fd)
    }
}

fn connect(address: &str) -> io::Result<UnixDatagram> {
    let address = match address.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    // Connected now: in a sandbox it could not be found any more.
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// The watchdog's period, if it is meant for this process.
fn watchdog(period: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    if !is_for_us(pid.unwrap_or(&std::process::id().to_string())) {
        return None;
    }
    period?.parse().ok().filter(|us| *us > 0).map(Duration::from_micros)
}

fn is_for_us(pid: &str) -> bool {
    pid.parse() == Ok(std::process::id())
}

/// Numbers and names of what is handed over, if it is meant for this process.
fn listed(pid: Option<&str>, count: Option<&str>, names: Option<&str>) -> Vec<(String, RawFd)> {
    if !pid.is_some_and(is_for_us) {
        return Vec::new();
    }
    let count = count.and_then(|count| count.parse().ok()).unwrap_or(0).clamp(0, MAX_RECEIVED);
    let mut names = names.unwrap_or_default().split(':').filter(|name| !name.is_empty());
    (FIRST..FIRST + count).map(|number| (names.next().unwrap_or("unknown").to_owned(), number)).collect()
}

fn take_descriptors(listed: Vec<(String, RawFd)>) -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if listed.is_empty() || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let own = |(name, number)| {
        // SAFETY: the number is only looked up; a closed one is told by EBADF.
        let open = unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
        // SAFETY: it is open; whoever started this process says that it is for us; this runs once
        // in a process, before anything else is opened, so nobody else owns the number.
        let fd = open.then(|| unsafe { OwnedFd::from_raw_fd(number) })?;
        // Not for the programs that this one starts. Failing would only leave them a spare copy.
        let _ = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        Some((name, fd))
    };
    listed.into_iter().filter_map(own).collect()
}

fn checked(name: &str) -> io::Result<&str> {
    let fits = (1..=MAX_NAME).contains(&name.len()) && !name.contains(|c: char| c == ':' || c.is_ascii_control());
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot name a stored descriptor"));
    if fits { Ok(name) } else { Err(wrong()) }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Supervisor, OwnedFd) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        (Supervisor(Arc::new(Link { socket: ours.into(), ..Link::default() })), theirs.into())
    }

    fn heard(socket: &OwnedFd) -> (String, Option<OwnedFd>) {
        let mut buffer = [0; 512];
        let (len, fd) = fdpass::receive(socket.as_fd(), &mut buffer).unwrap().unwrap();
        (String::from_utf8(buffer[..len].to_vec()).unwrap(), fd)
    }

    #[test]
    fn states_are_told_in_the_words_of_the_protocol() {
        let (supervisor, socket) = pair();

        supervisor.ready("serving\nby fanotify").unwrap();
        supervisor.alive().unwrap();
        supervisor.stopping().unwrap();
        supervisor.reloading().unwrap();

        assert_eq!(heard(&socket).0, "READY=1\nSTATUS=serving by fanotify");
        assert_eq!(heard(&socket).0, "WATCHDOG=1");
        assert_eq!(heard(&socket).0, "STOPPING=1");
        let reloading = heard(&socket).0;
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(since.parse::<u64>().unwrap() > 0);
    }

    #[test]
    fn a_stored_descriptor_goes_with_its_name() {
        use std::os::unix::fs::MetadataExt;
        let (supervisor, socket) = pair();
        let file = tempfile::tempfile().unwrap();

        supervisor.store("group", file.as_fd()).unwrap();
        supervisor.remove("group").unwrap();

        let (text, fd) = heard(&socket);
        assert_eq!(text, "FDSTORE=1\nFDPOLL=0\nFDNAME=group");
        let copy = std::fs::File::from(fd.unwrap());
        assert_eq!(copy.metadata().unwrap().ino(), file.metadata().unwrap().ino());
        let (text, fd) = heard(&socket);
        assert_eq!((text.as_str(), fd.is_none()), ("FDSTOREREMOVE=1\nFDNAME=group", true));
        for bad in ["", "a:b", "a\nREADY=1", &"x".repeat(256)] {
            assert_eq!(supervisor.store(bad, file.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
    }

    #[test]
    fn only_what_is_meant_for_this_process_is_taken() {
        let me = std::process::id().to_string();
        assert_eq!(listed(Some(&me), Some("2"), Some("control")), [("control".into(), 3), ("unknown".into(), 4)]);
        assert_eq!(listed(Some("1"), Some("2"), None), []);
        assert_eq!(listed(None, Some("2"), None), []);
        assert_eq!(listed(Some(&me), Some("-5"), None), []);
        assert_eq!(listed(Some(&me), Some("many"), None), []);
        assert_eq!(watchdog(Some("2000000"), None), Some(Duration::from_secs(2)));
        assert_eq!(watchdog(Some("2000000"), Some(&me)), Some(Duration::from_secs(2)));
        assert_eq!(watchdog(Some("2000000"), Some("1")), None);
        assert_eq!(watchdog(Some("0"), None), None);
    }

    #[test]
    fn received_descriptors_are_taken_by_name_and_once() {
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        let received = Mutex::new(vec![("control".into(), file()), ("group".into(), file()), ("group".into(), file())]);
        let supervisor = Supervisor(Arc::new(Link { received, ..Link::default() }));

        assert!(supervisor.take("control").is_some());
        assert!(supervisor.take("control").is_none());
        let left = supervisor.received();
        assert_eq!(left.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["group", "group"]);
        assert!(supervisor.received().is_empty());
    }

    #[test]
    fn abstract_addresses_are_reached() {
        let name = format!("rafsd-test-{}", std::process::id());
        let server = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let socket = connect(&format!("@{name}")).unwrap();

        socket.send(b"x").unwrap();

        assert_eq!(server.recv(&mut [0; 4]).unwrap(), 1);
        assert!(connect("/nowhere/notify").is_err());
    }
}
