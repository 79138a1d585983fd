use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::sleep;
use std::time::Duration;

use crate::base::{BLOCK, ByteRange};
use crate::cache::{Fill, Sink};
use crate::sys::cachefiles::read_complete;
use crate::sys::files::data_ranges;

/// Makes the device behind an object, from where its bytes go and what is there already.
pub type OpenObject = Box<dyn Fn(Box<dyn Sink>, &[ByteRange]) -> Arc<dyn Fill> + Send + Sync>;

/// What the service must know to answer the kernel about one name.
pub struct ObjectSpec {
    /// Exact length in bytes. Must never change for a name: the kernel throws away what it has
    /// cached when it does.
    pub size: u64,
    /// Makes the device once the kernel has opened the object.
    pub open: OpenObject,
}

impl fmt::Debug for ObjectSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectSpec").field("size", &self.size).finish_non_exhaustive()
    }
}

/// An object that the kernel has open.
pub(super) struct Object {
    pub(super) name: String,
    file: Arc<OwnedFd>,
    size: u64,
    /// Not there while no image that is served has the object: its reads are denied.
    spec: OnceLock<Arc<ObjectSpec>>,
    device: OnceLock<Arc<dyn Fill>>,
    /// Held while the device is made: there must not be two over one file.
    making: Mutex<()>,
}

impl Object {
    pub(super) fn new(name: String, file: OwnedFd, spec: Arc<ObjectSpec>) -> Self {
        Self { spec: OnceLock::from(spec.clone()), ..Self::unserved(name, file, spec.size) }
    }

    /// One of no image that is served.
    pub(super) fn unserved(name: String, file: OwnedFd, size: u64) -> Self {
        Self {
            name,
            file: Arc::new(file),
            size,
            spec: OnceLock::new(),
            device: OnceLock::new(),
            making: Mutex::default(),
        }
    }

    /// Whether an image that is served has it.
    pub(super) fn is_served(&self) -> bool {
        self.spec.get().is_some()
    }

    /// An image that is served has it, from now on.
    pub(super) fn serve(&self, spec: Arc<ObjectSpec>) {
        let _ = self.spec.set(spec);
    }

    /// Length in bytes, rounded up to whole blocks as the kernel rounds it.
    pub(super) fn len(&self) -> u64 {
        self.size.next_multiple_of(BLOCK)
    }

    /// The device, made at the first READ or a little before: before that the kernel may not have set
    /// the object's file up, and writes to it or questions about its holes fail.
    pub(super) fn device(&self) -> io::Result<&Arc<dyn Fill>> {
        if let Some(device) = self.device.get() {
            return Ok(device);
        }
        let _alone = self.making.lock().unwrap();
        if let Some(device) = self.device.get() {
            return Ok(device);
        }
        let unserved = || io::Error::new(io::ErrorKind::NotFound, "no image that is served has it");
        let spec = self.spec.get().ok_or_else(unserved)?;
        let present = data_ranges(self.file.as_fd(), self.len())?;
        let device =
            (spec.open)(Box::new(ObjectSink { file: self.file.clone(), is_ready: AtomicBool::new(false) }), &present);
        Ok(self.device.get_or_init(|| device))
    }

    /// Whether the device has been made.
    pub(super) fn has_device(&self) -> bool {
        self.device.get().is_some()
    }

    /// The duty to complete one READ of this object.
    pub(super) fn duty(&self, msg_id: u32) -> ReadDuty {
        ReadDuty { file: self.file.clone(), msg_id }
    }
}

/// The duty to complete one READ. Completion is the same call whether data was written or not:
/// the kernel looks for itself, and fails the reader if the range is still missing.
#[derive(Debug)]
pub(super) struct ReadDuty {
    file: Arc<OwnedFd>,
    msg_id: u32,
}

impl Drop for ReadDuty {
    fn drop(&mut self) {
        match read_complete(self.file.as_fd(), self.msg_id) {
            Ok(()) => {}
            // The reader was killed while it waited.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => tracing::error!(%error, msg_id = self.msg_id, "a read could not be completed"),
        }
    }
}

/// Writes into the kernel's cache object.
#[derive(Debug)]
struct ObjectSink {
    file: Arc<OwnedFd>,
    /// Set by the first write that went through: the kernel has set the file up.
    is_ready: AtomicBool,
}

/// Longest piece of one write: before Linux 6.13 a short write was reported as whole.
const PIECE: usize = 1 << 20;

impl Sink for ObjectSink {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut at = i64::try_from(at).map_err(io::Error::other)?;
        for piece in bytes.chunks(PIECE) {
            self.write_piece(piece, at)?;
            at += i64::try_from(piece.len()).expect("at most 1 MiB");
        }
        Ok(())
    }

    /// Writes are direct: nothing is left to sync.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl ObjectSink {
    /// `ENOBUFS` means that the kernel is still setting the file up, which passes within moments
    /// and only happens before the first write, or that its disk is below the stop threshold.
    fn write_piece(&self, piece: &[u8], at: i64) -> io::Result<()> {
        let mut patience = if self.is_ready.load(Ordering::Relaxed) { 0 } else { 10 };
        loop {
            match nix::sys::uio::pwrite(&self.file, piece, at) {
                Ok(len) if len == piece.len() => {
                    self.is_ready.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                Ok(_) => return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took only part of a write")),
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::ENOBUFS) if patience > 0 => {
                    patience -= 1;
                    sleep(Duration::from_millis(50));
                }
                Err(nix::errno::Errno::ENOBUFS) => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
