use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::thread;

use rustix::mount::{MountAttrFlags, UnmountFlags};
use seccompiler::SeccompAction;

use super::*;
use crate::sys::mount::{self, FsContext};

/// Runs `test` on a thread of its own in a sandbox that may write to `dir` only. Skips, aloud, on
/// kernels without one.
fn confined(read: Option<Vec<std::path::PathBuf>>, test: impl FnOnce(&Sandbox, &Path) + Send) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let policy = Policy { write: vec![dir.path().to_owned()], devices: vec!["/dev/null".into()], read };
            let (sandbox, strength) = Sandbox::enter(&policy).unwrap();
            if strength.landlock.is_none() || !strength.seccomp {
                return eprintln!("skipped: this kernel has {strength:?}");
            }
            test(&sandbox, dir.path());
        });
    });
}

fn kind<T>(outcome: io::Result<T>) -> Option<io::ErrorKind> {
    outcome.err().map(|error| error.kind())
}

const DENIED: Option<io::ErrorKind> = Some(io::ErrorKind::PermissionDenied);

#[test]
fn a_confined_thread_writes_beneath_its_directories_and_nowhere_else() {
    let elsewhere = tempfile::tempdir_in("/var/tmp").unwrap();
    let victim = elsewhere.path().join("victim");
    fs::write(&victim, "as it was").unwrap();
    confined(None, |_, dir| {
        fs::write(dir.join("own"), "new").unwrap();
        fs::create_dir(dir.join("deep")).unwrap();
        fs::rename(dir.join("own"), dir.join("deep/moved")).unwrap();
        fs::remove_file(dir.join("deep/moved")).unwrap();

        assert_eq!(kind(File::options().write(true).open(&victim)), DENIED);
        assert_eq!(kind(File::options().append(true).open(&victim)), DENIED);
        assert_eq!(kind(fs::remove_file(&victim)), DENIED);
        assert_eq!(kind(fs::rename(&victim, dir.join("stolen"))), DENIED);
        assert_eq!(kind(fs::write(elsewhere.path().join("new"), "x")), DENIED);
        assert_eq!(kind(std::os::unix::fs::symlink("x", elsewhere.path().join("link"))), DENIED);
        assert_eq!(kind(fs::hard_link(&victim, dir.join("link"))), Some(io::ErrorKind::CrossesDevices));
        // By a link that lies where writing is allowed.
        std::os::unix::fs::symlink(&victim, dir.join("way")).unwrap();
        assert_eq!(kind(fs::write(dir.join("way"), "x")), DENIED);

        assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was", "reading was left alone");
    });
}

#[test]
fn where_reading_is_narrowed_other_files_cannot_be_read() {
    let (given, other) = (tempfile::tempdir_in("/var/tmp").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap());
    for dir in [&given, &other] {
        fs::write(dir.path().join("file"), "x").unwrap();
    }
    confined(Some(vec![given.path().to_owned(), "/nowhere/at/all".into()]), |sandbox, dir| {
        fs::write(dir.join("own"), "own").unwrap();
        assert_eq!(fs::read_to_string(dir.join("own")).unwrap(), "own");
        assert_eq!(fs::read_to_string(given.path().join("file")).unwrap(), "x");
        assert_eq!(kind(fs::write(given.path().join("file"), "y")), DENIED);
        assert_eq!(kind(fs::read(other.path().join("file"))), DENIED);
        assert_eq!(kind(fs::read_dir(other.path())), DENIED);
        assert_eq!(kind(fs::read("/etc/passwd")), DENIED);

        assert_eq!(sandbox.outside(|| fs::read_to_string(other.path().join("file"))).unwrap(), "x");
    });
}

#[test]
fn threads_that_are_started_inside_are_inside() {
    confined(None, |_, _| {
        let denied = thread::spawn(|| kind(fs::write("/var/tmp/rafsd-must-not-exist", "x"))).join().unwrap();
        assert_eq!(denied, DENIED);
    });
}

#[test]
fn a_confined_thread_starts_no_programs_and_mounts_nothing_but_hands_both_out() {
    confined(None, |sandbox, dir| {
        assert_eq!(kind(Command::new("/bin/true").status()), DENIED);
        assert!(sandbox.outside(|| Command::new("/bin/true").status()).unwrap().success());

        let errno = |outcome: rustix::io::Result<()>| outcome.err().map(rustix::io::Errno::raw_os_error);
        let unmount = || errno(rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW));
        assert_eq!(unmount(), Some(libc::EPERM));
        if nix::unistd::geteuid().is_root() {
            assert_eq!(sandbox.outside(unmount), Some(libc::EINVAL), "nothing is mounted there, said by the kernel");
        }
        let fsopen = rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC);
        assert_eq!(fsopen.err(), Some(rustix::io::Errno::PERM));
    });
}

/// Refusals are in the kernel's log where it takes filters with that wish: all that this program supports.
#[test]
fn filters_have_the_kernel_tell_its_log_of_what_they_refuse() {
    if !calls::is_available() {
        return eprintln!("skipped: this kernel has no filters");
    }
    let (logged, outcome) = thread::spawn(|| {
        let logged = calls::wide().unwrap().apply_logged();
        (logged, rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC).map(drop))
    })
    .join()
    .unwrap();
    assert!(logged);
    assert_eq!(outcome, Err(rustix::io::Errno::PERM));
}

/// The facts of the kernel for which mounting is done outside, with landlock alone.
#[test]
fn landlock_takes_mounts_away_whatever_its_rules_say() {
    if !nix::unistd::geteuid().is_root() || landlock_version().is_none() {
        return eprintln!("skipped: not root, or no landlock");
    }
    let make = || FsContext::open("tmpfs").and_then(|context| context.mount(MountAttrFlags::empty()));
    let (Ok(mounted), Ok(detached)) = (make(), make()) else {
        return eprintln!("skipped: no tmpfs can be mounted here");
    };
    let look = || {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::openat(detached.as_fd(), ".", flags, rustix::fs::Mode::empty()).err()
    };
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    mounted.attach(dir.path()).unwrap();
    drop(mounted);
    let seen = thread::scope(|scope| {
        let confined = scope.spawn(|| {
            let policy = Policy { write: vec!["/".into()], devices: Vec::new(), read: Some(vec!["/".into()]) };
            let version = files::restrict(&policy);
            let again = make().map(|another| another.attach(dir.path()).map_err(|e| e.raw_os_error()));
            (version, rustix::mount::unmount(dir.path(), UnmountFlags::NOFOLLOW), look(), again)
        });
        confined.join()
    });
    let before = look();
    mount::unmount(dir.path()).unwrap();

    let (version, unmounted, looked, attached) = seen.unwrap();
    assert!(version.unwrap().is_some());
    assert_eq!(unmounted.err(), Some(rustix::io::Errno::PERM));
    assert_eq!(attached.unwrap(), Err(Some(libc::EPERM)));
    assert_eq!((before, looked), (None, Some(rustix::io::Errno::ACCESS)), "no rule names a mount that is in no tree");
}

#[test]
fn work_outside_may_borrow_and_its_panic_arrives() {
    confined(None, |sandbox, _| {
        let mut number = 1;
        sandbox.outside(|| number += 1);
        assert_eq!(number, 2);
        let panic = std::panic::catch_unwind(|| sandbox.outside(|| panic!("expected by the test"))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"expected by the test"));
        assert_eq!(sandbox.outside(|| 7), 7, "the next one is served");
    });
}

#[test]
fn a_narrowed_thread_works_on_files_and_does_nothing_else() {
    confined(None, |sandbox, dir| {
        // Allowed until now.
        drop(TcpListener::bind("127.0.0.1:0").unwrap());
        thread::spawn(|| {}).join().unwrap();

        sandbox.narrow();

        let path = dir.join("file");
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        File::open(&path).unwrap().sync_data().unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), 1 << 20);
        fs::remove_file(&path).unwrap();
        thread::sleep(std::time::Duration::from_millis(1));
        assert!(std::panic::catch_unwind(|| panic!("expected by the test")).is_err());
        assert_eq!(kind(TcpListener::bind("127.0.0.1:0")), DENIED);
        assert_eq!(kind(std::os::unix::net::UnixDatagram::unbound()), DENIED);
        assert!(thread::Builder::new().spawn(|| {}).is_err());
        assert_eq!(sandbox.outside(|| 7), 7, "the way out stays");
    });
}

#[test]
fn a_keeper_has_its_sockets_and_starts_and_writes_nothing_else() {
    use std::os::unix::net::{UnixListener, UnixStream};
    let (run, elsewhere) = (tempfile::tempdir_in("/var/tmp").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap());
    let confined = || {
        let strength = confine_keeper(run.path()).unwrap();
        if strength.landlock.is_none() || !strength.seccomp {
            return eprintln!("skipped: this kernel has {strength:?}");
        }
        let path = run.path().join("socket");
        let listener = UnixListener::bind(run.path().join("new")).unwrap();
        fs::rename(run.path().join("new"), &path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        fs::remove_file(&path).unwrap();
        assert!(fs::read_to_string("/proc/self/mountinfo").is_ok());

        assert_eq!(kind(UnixListener::bind(elsewhere.path().join("socket"))), DENIED);
        assert_eq!(kind(fs::write(elsewhere.path().join("file"), "x")), DENIED);
        assert_eq!(kind(TcpListener::bind("127.0.0.1:0")), DENIED);
        assert_eq!(kind(Command::new("/bin/true").status()), DENIED);
        assert!(thread::Builder::new().spawn(|| {}).is_err());
        assert!(mount::detach(run.path()).is_err_and(|error| error.raw_os_error() == Some(libc::EPERM)));
    };
    thread::scope(|scope| scope.spawn(confined).join().unwrap());
}

#[test]
fn what_the_kernel_lacks_is_left_out_and_told() {
    let on_a_kernel_without = |call: i64| {
        let strength = thread::spawn(move || {
            let rules = [(call, Vec::new())].into_iter().collect();
            let (allow, lacking) = (SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()));
            calls::compile(rules, allow, lacking).unwrap().apply().then(|| {
                let (sandbox, strength) = Sandbox::enter(&Policy::default()).unwrap();
                sandbox.narrow();
                assert_eq!(sandbox.outside(|| 7), 7);
                strength
            })
        });
        strength.join().unwrap()
    };
    let Some(strength) = on_a_kernel_without(libc::SYS_landlock_create_ruleset) else {
        return eprintln!("skipped: this kernel filters no calls");
    };
    assert_eq!(strength, Strength { landlock: None, seccomp: true });
    let strength = on_a_kernel_without(libc::SYS_seccomp).unwrap();
    assert_eq!(strength, Strength { landlock: landlock_version(), seccomp: false });
}

#[test]
fn a_sandbox_that_is_off_runs_work_in_place() {
    let here = thread::current().id();
    assert_eq!(Sandbox::off().outside(|| thread::current().id()), here);
    Sandbox::off().narrow();
    assert_eq!(Sandbox::off(), Sandbox::default());
}
