//! What this machine has, and where its pieces are.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, statfs};

use crate::Backend;

/// Where the guest's disk is mounted.
pub(crate) const GUEST_STORE: &str = "/var/lib/rafsd-test";
/// Where images made by other builders lie on the guest's disk.
pub(crate) const GUEST_INTEROP: &str = "interop";
/// Where distributions have systemd.
pub(crate) const SYSTEMD: &str = "/lib/systemd/systemd";
/// Where the guest finds the daemon.
pub(crate) const GUEST_RAFSD: &str = "/bin/rafsd";

/// A precondition of a case. A need that is not met skips the case and says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "offered to every case, whether one of today uses it or not")]
pub(crate) enum Need {
    Root,
    /// The kernel serves images by the backend the case runs for.
    Backend,
    /// The kernel mounts EROFS, where the backend needs that.
    Erofs,
    /// The case's directory lies on a file system that can hold a cache: ext4, XFS or btrfs.
    DiskStore,
    /// Images made by other builders are at hand.
    Interop,
    /// A memory control group can be made and given a limit.
    MemoryGroups,
    /// systemd is installed, running or not.
    Systemd,
    /// Control groups of the second version can be made.
    ProcessGroups,
    /// A program on the path. The guest gets the host's, with its libraries.
    Program(&'static str),
}

impl Need {
    /// Why the need is not met here; `None` when it is.
    pub(crate) fn unmet(&self, backend: Backend, in_guest: bool) -> Option<String> {
        match self {
            Self::Root => (!nix::unistd::geteuid().is_root()).then(|| "not root".into()),
            Self::Backend => match backend {
                Backend::Cachefiles => cannot_cachefiles(),
                Backend::Fanotify => cannot_fanotify(),
                Backend::FuseDevice | Backend::FuseTree => cannot_fuse(),
            },
            Self::Erofs if backend == Backend::FuseTree => None,
            Self::Erofs => cannot_erofs(backend),
            Self::DiskStore => {
                let dir = store(in_guest);
                let reason = format!("{} is not on ext4, XFS or btrfs; set RAFSD_TEST_DIR", dir.display());
                (!on_disk(&dir)).then_some(reason)
            }
            Self::Interop => {
                interop(in_guest).is_none().then(|| "no images of other builders; set RAFSD_INTEROP".into())
            }
            Self::MemoryGroups => {
                memory_groups().is_none().then(|| "no memory control groups that we may change".into())
            }
            Self::Systemd => {
                let is_there = Path::new(SYSTEMD).is_file() && find_program("systemctl").is_some();
                (!is_there).then(|| "no systemd".into())
            }
            Self::ProcessGroups => {
                process_groups().is_none().then(|| "no control groups (version 2) that we may change".into())
            }
            Self::Program(name) => find_program(name).is_none().then(|| format!("no program {name}")),
        }
    }
}

/// The folder of images made by other builders, if it is there. The guest has it on its disk.
pub(crate) fn interop(in_guest: bool) -> Option<PathBuf> {
    if in_guest {
        return Path::new(GUEST_STORE).join(GUEST_INTEROP).canonicalize().ok();
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/interop");
    let folder = std::env::var_os("RAFSD_INTEROP").map_or(beside, PathBuf::from);
    folder.canonicalize().ok()
}

/// Pre-content events came with Linux 6.14; their range records are complete from here on.
const FANOTIFY_SINCE: (u32, u32) = (6, 15);

/// Why the fanotify backend cannot work on this host; `None` when it can.
///
/// The one place that decides it for the tests. A version is a poor witness, and is taken only to
/// choose between running and skipping: a case that runs on a kernel without the events fails.
pub(crate) fn cannot_fanotify() -> Option<String> {
    older_than(FANOTIFY_SINCE).map(|release| format!("Linux {release} has no complete pre-content events (6.15)"))
}

/// The release of the running kernel, if it is older than `since`.
fn older_than(since: (u32, u32)) -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (version < since).then(|| release.trim().to_owned())
}

fn cannot_cachefiles() -> Option<String> {
    (!Path::new("/dev/cachefiles").exists()).then(|| "no /dev/cachefiles".into())
}

fn cannot_fuse() -> Option<String> {
    std::fs::File::open("/dev/fuse").err().map(|error| format!("/dev/fuse cannot be opened: {error}"))
}

fn cannot_erofs(backend: Backend) -> Option<String> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing = !known.split_whitespace().any(|word| word == "erofs");
    // Where it mounts no files, blobs over FUSE are read through loop devices.
    let needs_files = !(backend == Backend::FuseDevice && Path::new("/dev/loop-control").exists());
    let old = || {
        let release = older_than((6, 12)).filter(|_| needs_files)?;
        Some(format!("Linux {release} mounts no EROFS image from a file (6.12)"))
    };
    if missing { Some("the kernel has no EROFS (or its module is not loaded)".into()) } else { old() }
}

/// The daemon's binary.
pub(crate) fn rafsd(in_guest: bool) -> PathBuf {
    PathBuf::from(if in_guest { GUEST_RAFSD } else { env!("CARGO_BIN_EXE_rafsd") })
}

/// Where the directories of cases are made: the first candidate on a file system that can hold a cache.
///
/// `/var/tmp` before the build directory because paths of sockets are limited to 107 bytes.
pub(crate) fn store(in_guest: bool) -> PathBuf {
    if in_guest {
        return GUEST_STORE.into();
    }
    if let Some(dir) = std::env::var_os("RAFSD_TEST_DIR") {
        return dir.into();
    }
    let candidates = ["/var/tmp", env!("CARGO_TARGET_TMPDIR")];
    candidates.into_iter().map(PathBuf::from).find(|dir| on_disk(dir)).unwrap_or_else(std::env::temp_dir)
}

fn on_disk(dir: &Path) -> bool {
    let kinds = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];
    statfs(dir).is_ok_and(|fs| kinds.contains(&fs.filesystem_type()))
}

/// Where memory control groups are made, and the file that takes a limit; of version 2 if it has the
/// controller, else of version 1.
pub(crate) fn memory_groups() -> Option<(PathBuf, &'static str)> {
    let second = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new).into_iter().find(|root| {
        let enabled = std::fs::read_to_string(root.join("cgroup.subtree_control")).unwrap_or_default();
        enabled.split_whitespace().any(|controller| controller == "memory")
    });
    let first = Path::new("/sys/fs/cgroup/memory");
    let first = first.join("memory.limit_in_bytes").exists().then_some((first.to_owned(), "memory.limit_in_bytes"));
    let found = second.map(|root| (root.to_owned(), "memory.max")).or(first);
    found.filter(|(root, _)| nix::unistd::access(root, nix::unistd::AccessFlags::W_OK).is_ok())
}

/// Where control groups of the second version are made, if we may.
pub(crate) fn process_groups() -> Option<PathBuf> {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let mut found = roots.into_iter().filter(|root| root.join("cgroup.controllers").exists());
    found.find(|root| {
        let attempt = root.join(format!("rafsd-attempt-{}", std::process::id()));
        std::fs::create_dir(&attempt).and_then(|()| std::fs::remove_dir(&attempt)).is_ok()
    })
}

/// Finds a program on the path, or in the directories that only root's path has.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(name)).find(|file| file.is_file())
}
