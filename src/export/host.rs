//! What this host can do, found by trying.
//!
//! No version is compared: options are built out, interfaces are back-ported by halves, and the
//! file system of the cache matters as much as the kernel. Each finding says what was tried, and
//! when it failed, what is missing and what to do about it.

use std::error::Error;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::fuse::selftest::{self as fuse_selftest, FuseTestError};
use super::selftest::{self, SelfTestError};
use super::{AttachError, BackendKind};
use crate::base::Chain;
use crate::sys::cachefiles;
use crate::sys::files::file_system;
use crate::sys::mount::FsContext;
use crate::sys::newdirs::NewDirs;
use crate::sys::process::is_out_of_files;

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Finding {
    /// Stable name for scripts.
    pub name: String,
    /// Whether it works.
    pub works: bool,
    /// What was seen, in one sentence.
    pub detail: String,
    /// What to do about it, in one sentence; only where it does not work.
    pub remedy: Option<String>,
}

/// Everything that was tried.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Host {
    /// Release of the running kernel, for people; nothing is decided by it.
    pub kernel: String,
    /// File system of the cache directory.
    pub cache_file_system: String,
    /// In the order in which they were tried.
    pub findings: Vec<Finding>,
    /// What `--backend auto` takes here, if anything.
    pub choice: Option<BackendKind>,
}

impl Host {
    /// Tries everything, with scratch files below `cache`, which is created if it is missing.
    /// Nothing stays behind.
    ///
    /// `bound` says that this process has bound a cache of cachefiles already, which only one can.
    pub fn examine(cache: &Path, bound: bool) -> io::Result<Self> {
        // They go again, unless somebody else has found a use for them meanwhile.
        let mut made = NewDirs::default();
        made.make(cache)?;
        Self::examine_existing(cache, bound)
    }

    fn examine_existing(cache: &Path, bound: bool) -> io::Result<Self> {
        let cache_file_system = file_system(std::fs::File::open(cache)?)?;
        let file_backed = file_backed(cache);
        let pre_content = if file_backed.works { pre_content(cache) } else { unreachable_pre_content() };
        let fuse = fuse(cache);
        let fuse_device = if fuse.works { fuse_device(cache) } else { unreachable_fuse_device() };
        let findings = vec![cachefiles(cache, bound), on_demand_erofs(), file_backed, pre_content, fuse, fuse_device];
        let uname = nix::sys::utsname::uname()?;
        let kernel = uname.release().to_string_lossy().into_owned();
        let host = Self { kernel, cache_file_system, findings, choice: None };
        let best_first =
            [BackendKind::Cachefiles, BackendKind::Fanotify, BackendKind::FuseDevice, BackendKind::FuseTree];
        let choice = best_first.into_iter().find(|kind| host.can(*kind));
        Ok(Self { choice, ..host })
    }

    /// Whether `kind` can serve here.
    pub fn can(&self, kind: BackendKind) -> bool {
        let needed: &[&str] = match kind {
            BackendKind::Fanotify => &["pre-content-events"],
            BackendKind::Cachefiles => &["cachefiles", "erofs-on-demand"],
            BackendKind::FuseDevice => &["fuse-device"],
            BackendKind::FuseTree | BackendKind::Blobfs => &["fuse"],
        };
        needed.iter().all(|name| self.findings.iter().any(|finding| finding.name == *name && finding.works))
    }

    /// Why `kind` cannot serve here: the findings that say so, with their remedies.
    pub fn obstacles(&self, kind: BackendKind) -> String {
        let names: &[&str] = match kind {
            BackendKind::Fanotify => &["file-backed-erofs", "pre-content-events"],
            BackendKind::Cachefiles => &["cachefiles", "erofs-on-demand"],
            BackendKind::FuseDevice => &["fuse", "fuse-device"],
            BackendKind::FuseTree | BackendKind::Blobfs => &["fuse"],
        };
        let failed = self.findings.iter().filter(|finding| names.contains(&finding.name.as_str()) && !finding.works);
        let say = |finding: &Finding| format!("{}: {}", finding.detail, finding.remedy.as_deref().unwrap_or_default());
        failed.map(say).collect::<Vec<_>>().join("; ")
    }
}

fn works(name: &'static str, detail: &str) -> Finding {
    Finding { name: name.to_owned(), works: true, detail: detail.to_owned(), remedy: None }
}

fn missing(name: &'static str, detail: String, remedy: &'static str) -> Finding {
    Finding { name: name.to_owned(), works: false, detail, remedy: Some(remedy.to_owned()) }
}

/// The same for what failed for this reason. Without descriptors nothing works, and nothing is known.
fn failed(name: &'static str, error: &(dyn Error + 'static), remedy: &'static str) -> Finding {
    let is_it = |cause: &(dyn Error + 'static)| cause.downcast_ref::<io::Error>().is_some_and(is_out_of_files);
    let is_starved = std::iter::successors(Some(error), |&error| error.source()).any(is_it);
    missing(name, Chain(error).to_string(), if is_starved { MORE_FILES } else { remedy })
}

/// What to do about a lack of descriptors.
const MORE_FILES: &str =
    "allow more open files: LimitNOFILE of the service, `ulimit -n`, or fs.file-max for all processes";

fn cachefiles(cache: &Path, bound: bool) -> Finding {
    const NAME: &str = "cachefiles";
    if bound {
        return works(NAME, "an on-demand cache is bound in the cache directory");
    }
    let device = match cachefiles::Device::open() {
        Ok(device) => device,
        Err(e) => {
            let remedy = match e.raw_os_error() {
                Some(libc::ENOENT) => "load the cachefiles module, or use a kernel built with CACHEFILES (up to 7.1)",
                Some(libc::EBUSY) => "stop the daemon that has it open: cachefilesd, nydusd or another rafsd",
                Some(libc::EPERM | libc::EACCES) => "run as root in the initial user namespace",
                Some(libc::EMFILE | libc::ENFILE) => MORE_FILES,
                _ => "see the kernel log",
            };
            return missing(NAME, format!("{} cannot be opened ({e})", cachefiles::DEVICE), remedy);
        }
    };
    let scratch = cache.join(format!(".bind-{}", std::process::id()));
    let bound = std::fs::create_dir_all(&scratch).and_then(|()| device.bind(&scratch, "rafsd-probe"));
    // Closing the device withdraws the cache; only then can its directories be removed.
    drop(device);
    let _ = std::fs::remove_dir_all(&scratch);
    match bound {
        Ok(()) => works(NAME, "an on-demand cache can be bound in the cache directory"),
        Err(e) => {
            let remedy = match e.raw_os_error() {
                Some(libc::EINVAL) => "use a kernel built with CACHEFILES_ONDEMAND (Linux 5.19 to 7.1)",
                Some(libc::EOPNOTSUPP) => "put the cache on ext4 or XFS",
                Some(libc::EROFS) => "put the cache on a writable file system",
                Some(libc::EMFILE | libc::ENFILE) => MORE_FILES,
                _ => "see the kernel log",
            };
            missing(NAME, format!("an on-demand cache cannot be bound ({e})"), remedy)
        }
    }
}

/// The call that sets the option succeeds even where the option is built out; only the message
/// log of the context tells (seen on 6.18).
fn on_demand_erofs() -> Finding {
    const NAME: &str = "erofs-on-demand";
    const REMEDY: &str = "use a kernel built with EROFS_FS_ONDEMAND (Linux 5.19 to 7.1), or the fanotify backend";
    let context = match FsContext::open("erofs") {
        Ok(context) => context,
        Err(e) if e.cause.raw_os_error() == Some(libc::EPERM) => {
            return failed(NAME, &e, "run as root in the initial user namespace");
        }
        Err(e) => return failed(NAME, &e, "load the erofs module, or use a kernel with EROFS_FS"),
    };
    match context.set("fsid", "probe") {
        Err(e) => failed(NAME, &e, REMEDY),
        Ok(()) => match context.messages().first() {
            Some(message) => missing(NAME, message.clone(), REMEDY),
            None => works(NAME, "EROFS knows the fsid option"),
        },
    }
}

fn file_backed(cache: &Path) -> Finding {
    const NAME: &str = "file-backed-erofs";
    match selftest::file_backed(cache) {
        Ok(()) => works(NAME, "EROFS mounts an image and a device from files in the cache directory"),
        Err(SelfTestError::Mount(e)) => {
            let remedy = match e.cause.raw_os_error() {
                Some(libc::ENODEV) => "load the erofs module, or use a kernel with EROFS_FS",
                Some(libc::EPERM) => "run as root in the initial user namespace",
                Some(libc::ENOTBLK) => {
                    "use Linux 6.12 or later with EROFS_FS_BACKED_BY_FILE, and put the cache on a plain disk file system"
                }
                _ => "see the kernel log",
            };
            failed(NAME, &e, remedy)
        }
        Err(e) => failed(NAME, &e, "make the cache directory writable"),
    }
}

fn unreachable_pre_content() -> Finding {
    let detail = "not tried, because it needs EROFS mounts from files".to_owned();
    missing("pre-content-events", detail, "make EROFS mounts from files work first")
}

fn pre_content(cache: &Path) -> Finding {
    const NAME: &str = "pre-content-events";
    let Err(e) = selftest::pre_content(cache) else {
        return works(NAME, "a cold read raised an event with its range, waited for the data, and a denial failed it");
    };
    let errno = |cause: &io::Error| cause.raw_os_error();
    let remedy = match &e {
        SelfTestError::Group(cause) if errno(cause) == Some(libc::EPERM) => "run as root in the initial user namespace",
        SelfTestError::Group(cause) if errno(cause) == Some(libc::ENOSYS) => "use a kernel built with FANOTIFY",
        SelfTestError::Mark(cause) if errno(cause) == Some(libc::EOPNOTSUPP) => "put the cache on ext4, XFS or btrfs",
        SelfTestError::Mark(_) => "use Linux 6.14 or later built with FANOTIFY_ACCESS_PERMISSIONS",
        SelfTestError::NoRange => "use Linux 6.15 or later",
        SelfTestError::Silent => "use Linux 6.14 or later, with the cache on ext4, XFS or btrfs itself",
        _ => "see the kernel log and report it: this kernel would show wrong data",
    };
    failed(NAME, &e, remedy)
}

fn fuse(cache: &Path) -> Finding {
    const NAME: &str = "fuse";
    let error = match fuse_selftest::offer(cache) {
        Ok(offer) => return works(NAME, &offer.to_string()),
        Err(error) => error,
    };
    let remedy = match &error {
        FuseTestError::Open(e) if matches!(e.kind(), io::ErrorKind::PermissionDenied) => {
            "let this user open /dev/fuse (mode 0666 is usual), and the control group its device"
        }
        FuseTestError::Open(_) => "load the fuse module",
        FuseTestError::NotAllowed => "run as root, or install fuse3 for its program fusermount3",
        FuseTestError::TooOld { .. } => "use Linux 5.4 or later",
        FuseTestError::Fusermount(_) => "see /etc/fuse.conf, and that fusermount3 is owned by root and set-uid",
        FuseTestError::Mount(_) | FuseTestError::Scratch(_) | FuseTestError::Silent(_) => "see the kernel log",
    };
    failed(NAME, &error, remedy)
}

fn unreachable_fuse_device() -> Finding {
    let detail = "not tried, because it needs FUSE".to_owned();
    missing("fuse-device", detail, "make FUSE work first")
}

fn fuse_device(cache: &Path) -> Finding {
    const NAME: &str = "fuse-device";
    let error = match selftest::fuse_device(cache) {
        Ok(()) => return works(NAME, "EROFS read a device through FUSE, and failed where that was refused"),
        Err(error) => error,
    };
    let remedy = match &error {
        SelfTestError::Attach(AttachError::Mount(e)) if e.cause.raw_os_error() == Some(libc::EPERM) => {
            "run as root in the initial user namespace"
        }
        SelfTestError::Attach(AttachError::Mount(_)) => {
            "use Linux 6.12 or later with EROFS_FS_BACKED_BY_FILE, or load the loop module"
        }
        SelfTestError::Scratch(_) => "make the cache directory writable",
        _ => "see the kernel log",
    };
    failed(NAME, &error, remedy)
}
