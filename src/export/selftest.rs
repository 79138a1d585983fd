//! A tiny image that tells whether pre-content events really reach us on this host.
//!
//! Versions and build options lie (`kernel-matrix.md` section 2): a loop device in between, a file
//! system without the hook or a back-ported half of the interface all look fine until a hole is
//! read as zeros. So before the first use a real image is mounted and really read.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use rustix::mount::MountAttrFlags;
use zerocopy::{FromZeros, IntoBytes};

use super::{AttachError, Backing, fuse};
use crate::base::{BLOCK, ByteRange};
use crate::cache::{Completion, Fill, FillError, Request};
use crate::format::erofs::{
    self, CHUNK_FORMAT_INDEXES, ChunkIndex, DeviceSlot, Dirent, INODE_SLOT, InodeExtended, Superblock, file_type,
    layout,
};
use crate::format::rafs::DEVICE_TABLE_OFFSET;
use crate::sys::fanotify::{Answer, EVENT_BUFFER, Group};
use crate::sys::mount::{DetachedMount, FsContext, MountError};
use crate::sys::process::is_out_of_files;

/// What came of the test.
#[derive(Debug, thiserror::Error)]
pub(super) enum SelfTestError {
    #[error("cannot write to the cache directory")]
    Scratch(#[source] io::Error),
    #[error("cannot create a pre-content group")]
    Group(#[source] io::Error),
    #[error("cannot mark a file in the cache directory")]
    Mark(#[source] io::Error),
    #[error("cannot mount an EROFS image from a file")]
    Mount(#[source] MountError),
    #[error("it could not be tried")]
    Untried(#[source] io::Error),
    #[error("reads through the mount raise no events")]
    Silent,
    #[error("events do not carry the range that is read")]
    NoRange,
    #[error("bytes filled while a reader waits do not reach it")]
    WrongBytes,
    #[error("a denied read does not fail")]
    DenyIgnored,
    #[error("cannot serve devices through FUSE")]
    Serve(#[source] io::Error),
    #[error("cannot mount an EROFS image over FUSE")]
    Attach(#[source] AttachError),
}

/// Two files of one block each, far apart, so that no read-ahead joins them.
const FILES: [(&[u8], u64); 2] = [(b"allowed", 0), (b"denied", 255)];
/// [`BLOCK`] as a length in memory.
const BLOCK_LEN: usize = 4096;
const _: () = assert!(BLOCK_LEN as u64 == BLOCK);
const DEVICE_BLOCKS: u32 = 256;
const PATTERN: u8 = 0xa5;
/// How long a read may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long reads that came late are denied, after that.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// Mounts an image below `dir` from plain files, without events; the first half of the question.
pub(super) fn file_backed(dir: &Path) -> Result<(), SelfTestError> {
    let scratch = Scratch::new(dir).map_err(SelfTestError::Scratch)?;
    scratch.mount().map(drop).map_err(SelfTestError::Mount)
}

/// The first byte of the file `name`.
fn read_first(mount: &DetachedMount, name: &[u8]) -> io::Result<u8> {
    let name = std::str::from_utf8(name).expect("ASCII");
    let file = File::from(openat(mount, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0)?;
    Ok(byte[0])
}

/// Marks, mounts, reads, fills, denies.
pub(super) fn pre_content(dir: &Path) -> Result<(), SelfTestError> {
    let scratch = Scratch::new(dir).map_err(SelfTestError::Scratch)?;
    let group = Group::new().map_err(SelfTestError::Group)?;
    group.mark(scratch.device.as_fd()).map_err(SelfTestError::Mark)?;
    let mount = scratch.mount().map_err(SelfTestError::Mount)?;
    let read = |name: &[u8]| read_first(&mount, name);
    let fill = || scratch.device.write_all_at(&[PATTERN; BLOCK_LEN], 0).is_ok();
    let (allowed, group) = answering(group, Answer::Allow, fill, || read(FILES[0].0))?;
    match allowed {
        Ok(PATTERN) => {}
        Err(e) if is_out_of_files(&e) => return Err(SelfTestError::Untried(e)),
        _ => return Err(SelfTestError::WrongBytes),
    }
    let (denied, _) = answering(group, Answer::Deny(libc::EIO), || true, || read(FILES[1].0))?;
    match denied {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(()),
        Err(e) if is_out_of_files(&e) => Err(SelfTestError::Untried(e)),
        _ => Err(SelfTestError::DenyIgnored),
    }
}

/// Serves a device through FUSE, mounts over it, reads what is there and what is not.
pub(super) fn fuse_device(dir: &Path) -> Result<(), SelfTestError> {
    let scratch = Scratch::new(dir).map_err(SelfTestError::Scratch)?;
    scratch.device.write_all_at(&[PATTERN; BLOCK_LEN], 0).map_err(SelfTestError::Scratch)?;
    let file = scratch.device.try_clone().map_err(SelfTestError::Scratch)?;
    let device = Arc::new(Plain { path: scratch.dir.join("device"), file: Arc::new(file) });
    let read = |mount: &DetachedMount| read_first(mount, FILES[0].0);
    let fail = |mount: &DetachedMount| read_first(mount, FILES[1].0).map(drop);
    let outcome = fuse::try_device(&scratch.dir.join("bootstrap"), device, &read, &fail);
    let (allowed, failed) = outcome.map_err(|error| match error {
        fuse::TryError::Serve(cause) => SelfTestError::Serve(cause),
        fuse::TryError::Attach(error) => SelfTestError::Attach(error),
    })?;
    match (allowed, failed) {
        (Err(e), _) if is_out_of_files(&e) => Err(SelfTestError::Untried(e)),
        (Ok(PATTERN), true) => Ok(()),
        (Ok(PATTERN), false) => Err(SelfTestError::DenyIgnored),
        _ => Err(SelfTestError::WrongBytes),
    }
}

/// A device that is all there.
struct Plain {
    path: PathBuf,
    file: Arc<File>,
}

impl Fill for Plain {
    fn decoded_len(&self) -> u64 {
        u64::from(DEVICE_BLOCKS) * BLOCK
    }

    fn present(&self, _: ByteRange) -> bool {
        true
    }

    fn fill_for(&self, _: Request, _: ByteRange, done: Completion) {
        done(Err(FillError::Cancelled));
    }

    fn touched(&self, _: ByteRange) {}
}

impl Backing for Plain {
    fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    fn is_settled(&self) -> bool {
        false
    }

    fn when_settled(&self, _: Box<dyn FnOnce() + Send>) {}
}

/// Runs `read` on a thread of its own while this one answers the events that it raises. Gives
/// the group back.
///
/// This always ends: a read that comes late is denied, and one that comes later still finds no
/// group any more, whose end lets it through.
fn answering(
    group: Group,
    answer: Answer,
    prepare: impl Fn() -> bool,
    read: impl FnOnce() -> io::Result<u8> + Send,
) -> Result<(io::Result<u8>, Group), SelfTestError> {
    std::thread::scope(|scope| {
        let reader = scope.spawn(read);
        let mut events = Events::default();
        let done = || reader.is_finished();
        let answered = events
            .answer(&group, PATIENCE, &done, &|| if prepare() { answer } else { Answer::Deny(libc::EIO) })
            .and_then(|()| events.answer(&group, LAST_PATIENCE, &done, &|| Answer::Deny(libc::EIO)));
        // Closed before the reader is waited for, unless there is nothing to wait for.
        let group = done().then_some(group);
        let result = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        answered.map_err(SelfTestError::Untried)?;
        match (events, group) {
            (Events { seen: 0, .. }, _) => match result {
                // It never came to a read.
                Err(e) if is_out_of_files(&e) => Err(SelfTestError::Untried(e)),
                _ => Err(SelfTestError::Silent),
            },
            (Events { ranges: 0, .. }, _) => Err(SelfTestError::NoRange),
            (Events { .. }, Some(group)) => Ok((result, group)),
            (Events { .. }, None) => Err(SelfTestError::DenyIgnored),
        }
    })
}

/// Events that a reader raised.
#[derive(Default)]
struct Events {
    seen: u32,
    /// Those that said what is read.
    ranges: u32,
}

impl Events {
    /// Answers for so long, or until `done`.
    fn answer(
        &mut self,
        group: &Group,
        patience: Duration,
        done: &dyn Fn() -> bool,
        choose: &dyn Fn() -> Answer,
    ) -> io::Result<()> {
        let (mut buffer, until) = (vec![0; EVENT_BUFFER], Instant::now() + patience);
        while !done() && Instant::now() < until {
            let mut fds = [PollFd::new(group.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(20u8));
            let events = match group.read(&mut buffer) {
                // The kernel had no descriptor for an event, which it denied.
                Err(e) if is_out_of_files(&e) => return Err(e),
                events => events.unwrap_or_default(),
            };
            for event in events {
                let file = match event.file.map_err(io::Error::from_raw_os_error) {
                    Ok(file) => file,
                    Err(e) if is_out_of_files(&e) => return Err(e),
                    Err(_) => continue,
                };
                self.seen += 1;
                self.ranges += u32::from(event.range.is_some());
                group.answer(file.as_fd(), choose())?;
            }
        }
        Ok(())
    }
}

/// A bootstrap and a device file that nobody else sees.
struct Scratch {
    dir: std::path::PathBuf,
    /// Opened before any mark, so that our own writes raise no events.
    device: File,
}

impl Scratch {
    fn new(parent: &Path) -> io::Result<Self> {
        let dir = parent.join(format!(".selftest-{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::create_dir_all(&dir)?;
        let bootstrap = bootstrap();
        let create = || {
            std::fs::write(dir.join("bootstrap"), &bootstrap)?;
            let options = File::options().read(true).write(true).create(true).truncate(true).clone();
            let device = options.open(dir.join("device"))?;
            device.set_len(u64::from(DEVICE_BLOCKS) * BLOCK)?;
            Ok(device)
        };
        match create() {
            Ok(device) => Ok(Self { dir, device }),
            Err(e) => {
                let _ = std::fs::remove_dir_all(&dir);
                Err(e)
            }
        }
    }

    fn mount(&self) -> Result<DetachedMount, MountError> {
        let context = FsContext::open("erofs")?;
        context.set_path("source", &self.dir.join("bootstrap"))?;
        context.set_path("device", &self.dir.join("device"))?;
        context.mount(MountAttrFlags::empty())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Only our own two files are in it.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Two blocks: superblock and device table, then the root and its files.
fn bootstrap() -> Vec<u8> {
    const META: u64 = BLOCK;
    let slot = |nid: u64| usize::try_from(META + nid * INODE_SLOT).expect("within two blocks");
    let mut bytes = vec![0; 2 * BLOCK_LEN];
    let mut sb = Superblock::new_zeroed();
    sb.magic = erofs::MAGIC.into();
    sb.blkszbits = 12;
    sb.root_nid = 1.into();
    sb.inos = 3.into();
    sb.blocks = 2.into();
    sb.meta_blkaddr = 1.into();
    sb.feature_incompat = (erofs::INCOMPAT_CHUNKED_FILE | erofs::INCOMPAT_DEVICE_TABLE).into();
    sb.extra_devices = 1.into();
    sb.devt_slotoff = erofs::DEVICE_TABLE_SLOT.into();
    put(&mut bytes, 1024, sb.as_bytes());
    let mut device = DeviceSlot::new_zeroed();
    device.tag = [b'0'; 64];
    device.blocks = DEVICE_BLOCKS.into();
    put(&mut bytes, usize::try_from(DEVICE_TABLE_OFFSET).expect("small"), device.as_bytes());

    let names: [(&[u8], u64, u8); 4] = [
        (b".", 1, file_type::DIRECTORY),
        (b"..", 1, file_type::DIRECTORY),
        (FILES[0].0, 16, file_type::REGULAR),
        (FILES[1].0, 24, file_type::REGULAR),
    ];
    let mut directory = Vec::new();
    let mut nameoff = names.len() * size_of::<Dirent>();
    for (name, nid, file_type) in names {
        let nameoff_on_disk = u16::try_from(nameoff).expect("a short directory");
        let entry = Dirent { nid: nid.into(), nameoff: nameoff_on_disk.into(), file_type, reserved: 0 };
        directory.extend_from_slice(entry.as_bytes());
        nameoff += name.len();
    }
    names.iter().for_each(|(name, ..)| directory.extend_from_slice(name));
    let mut root = inode(libc::S_IFDIR | 0o755, layout::FLAT_INLINE, directory.len() as u64);
    root.nlink = 2.into();
    put(&mut bytes, slot(1), root.as_bytes());
    put(&mut bytes, slot(1) + size_of::<InodeExtended>(), &directory);
    for ((_, block), nid) in FILES.iter().zip([16, 24]) {
        let mut file = inode(libc::S_IFREG | 0o644, layout::CHUNK_BASED, BLOCK);
        file.u = CHUNK_FORMAT_INDEXES.into();
        put(&mut bytes, slot(nid), file.as_bytes());
        let index = ChunkIndex::new(0, 0, u32::try_from(*block).expect("small"));
        put(&mut bytes, slot(nid) + size_of::<InodeExtended>(), index.as_bytes());
    }
    bytes
}

fn inode(mode: u32, data_layout: u16, size: u64) -> InodeExtended {
    let mut inode = InodeExtended::new_zeroed();
    inode.format = (1 | data_layout << 1).into();
    inode.mode = u16::try_from(mode).expect("16 bits").into();
    inode.size = size.into();
    inode.nlink = 1.into();
    inode
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}
