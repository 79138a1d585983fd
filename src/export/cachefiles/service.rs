use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::FsId;
use super::object::{Object, ObjectSpec};
use crate::base::{BLOCK, ByteRange, Chain, Class};
use crate::cache::FillError;
use crate::export::AttachError;
use crate::export::limiter::Limiter;
use crate::sys::cachefiles::{Device, Open, Request};

/// The bound cache and everything the kernel may ask it for.
pub struct Cachefiles {
    device: Device,
    stop: EventFd,
    known: Mutex<Known>,
    /// By the kernel's number for an open object.
    open: Mutex<HashMap<u32, Arc<Object>>>,
    reads: AtomicU64,
    log: Arc<Limiter>,
}

/// Volume key and cookie key.
type ObjectKey = (Vec<u8>, Vec<u8>);

/// What the kernel may ask for.
#[derive(Default)]
struct Known {
    /// With the number of registrations that use it.
    objects: HashMap<ObjectKey, (Arc<ObjectSpec>, usize)>,
    /// Names that mounts of registered images have in sysfs.
    sysfs: HashSet<String>,
}

/// An image whose names the kernel may ask for. Dropping it forgets the names; objects that are
/// open stay served.
pub struct Registration {
    service: Arc<Cachefiles>,
    name: FsId,
    keys: Vec<ObjectKey>,
}

impl fmt::Debug for Cachefiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cachefiles").field("device", &self.device).finish_non_exhaustive()
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registration").field(&self.name).finish()
    }
}

impl Cachefiles {
    /// Opens the device and binds the cache below `root`, an existing directory.
    ///
    /// # Errors
    /// See [`Device::open`] and [`Device::bind`].
    pub fn bind(root: &Path) -> io::Result<Arc<Self>> {
        let device = Device::open()?;
        device.bind(root, "rafsd")?;
        Ok(Arc::new(Self {
            device,
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            known: Mutex::default(),
            open: Mutex::default(),
            reads: AtomicU64::new(0),
            log: Arc::new(Limiter::new()),
        }))
    }

    /// Makes an image known: `bootstrap` under its own name, each blob under its id.
    ///
    /// # Errors
    /// If the image's name is taken, or differs from another one only where the kernel does not
    /// look. Blobs may be shared within a domain.
    pub fn register(
        self: &Arc<Self>,
        name: &FsId,
        bootstrap: ObjectSpec,
        blobs: Vec<(String, ObjectSpec)>,
    ) -> Result<Registration, AttachError> {
        let volume = name.volume_key();
        let mut known = self.known.lock().unwrap();
        let key = (volume.clone(), name.id.clone().into_bytes());
        if known.objects.contains_key(&key) || !known.sysfs.insert(name.sysfs_name()) {
            return Err(AttachError::Taken(name.mount_options()));
        }
        let known = &mut known.objects;
        known.insert(key.clone(), (Arc::new(bootstrap), 1));
        let mut keys = vec![key];
        for (blob, spec) in blobs {
            let key = (volume.clone(), blob.into_bytes());
            // The newest registration serves objects opened from now on: its source is the one
            // most recently known to work.
            let users = known.get(&key).map_or(0, |(_, users)| *users);
            known.insert(key.clone(), (Arc::new(spec), users + 1));
            keys.push(key);
        }
        Ok(Registration { service: self.clone(), name: name.clone(), keys })
    }

    /// Answers requests until [`Cachefiles::stop`].
    pub fn run(&self) -> io::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(self.device.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if self.stop.read().is_ok() {
                return Ok(());
            }
            loop {
                match self.device.next() {
                    Ok(Some(request)) => self.handle_contained(request),
                    Ok(None) => break,
                    // It concerns one request, which the kernel has failed; the others must go on.
                    Err(error) => {
                        tracing::error!(%error, "a request of the kernel was lost");
                        break;
                    }
                }
            }
        }
    }

    /// Ends [`Cachefiles::run`].
    pub fn stop(&self) {
        // The counter cannot overflow from a handful of stops, and a full one wakes as well.
        let _ = self.stop.write(1);
    }

    /// Whether the kernel has objects open: somebody has an image mounted.
    pub fn is_in_use(&self) -> bool {
        !self.open.lock().unwrap().is_empty()
    }

    /// READ requests since the start.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    fn handle_contained(&self, request: Request) {
        // A bug met by one request must not stop the answers for every other reader of the host.
        if catch_unwind(AssertUnwindSafe(|| self.handle(request))).is_err() {
            tracing::error!("a request could not be handled and its reader was failed");
        }
    }

    fn handle(&self, request: Request) {
        match request {
            Request::Open(open) => self.opened(open),
            Request::Close { object_id } => drop(self.open.lock().unwrap().remove(&object_id)),
            Request::Read { msg_id, object_id, range } => self.read(msg_id, object_id, range),
            Request::Unknown { opcode } => tracing::error!(opcode, "the kernel sent a request of an unknown kind"),
        }
    }

    /// Answered from memory alone: the kernel holds a worker of a shared queue until then.
    fn opened(&self, open: Open) {
        let name = object_name(&open.volume_key, &open.cookie_key);
        let spec =
            self.known.lock().unwrap().objects.get(&(open.volume_key, open.cookie_key)).map(|(spec, _)| spec.clone());
        let answer = match &spec {
            Some(spec) => self.device.opened(open.msg_id, spec.size),
            // Dropping `open.object` afterwards closes the descriptor, as it must be.
            None => self.device.refuse_open(open.msg_id, libc::ENOENT),
        };
        if let Err(error) = answer {
            // No CLOSE will follow, and an object that stays open here would block its name.
            tracing::error!(object = name, %error, "an open could not be answered");
            return;
        }
        match spec {
            Some(spec) => {
                let object = Arc::new(Object::new(name, open.object, spec));
                self.open.lock().unwrap().insert(open.object_id, object);
            }
            None => tracing::warn!(object = name, "the kernel asked for an object of no registered image"),
        }
    }

    fn read(&self, msg_id: u32, object_id: u32, range: ByteRange) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let Some(object) = self.open.lock().unwrap().get(&object_id).cloned() else {
            // Without the object's descriptor there is no way to answer.
            tracing::error!(object_id, "the kernel reads an object that is not open here");
            return;
        };
        let duty = object.duty(msg_id);
        let device = match object.device() {
            Ok(device) => device,
            Err(error) => {
                tracing::error!(object = object.name, %error, "an object's holes cannot be found");
                return;
            }
        };
        let wanted = range.align_out(BLOCK).unwrap_or(range).clamp_end(object.len());
        if wanted.is_empty() {
            return;
        }
        let (asked, log, name) = (Instant::now(), self.log.clone(), object.name.clone());
        device.fill(
            wanted,
            Class::OnDemand,
            Box::new(move |result: Result<(), FillError>| {
                drop(duty);
                if let Err(error) = result
                    && let Some(held_back) = log.admit(Instant::now())
                {
                    let ms = asked.elapsed().as_millis();
                    tracing::warn!(error = %Chain(&error), object = name, decoded = %wanted, ms, held_back, "read failed");
                }
            }),
        );
    }
}

/// What to call an object.
fn object_name(volume_key: &[u8], cookie_key: &[u8]) -> String {
    format!("{}/{}", String::from_utf8_lossy(volume_key), String::from_utf8_lossy(cookie_key))
}

impl Registration {
    /// Makes the device of `blob` before the kernel reads any of it, so that it can be filled ahead.
    /// Gives whether the device is there; if not, the kernel does not have the object open yet, or is
    /// still setting it up.
    pub fn wake(&self, blob: &str) -> bool {
        let name = object_name(&self.name.volume_key(), blob.as_bytes());
        let object = self.service.open.lock().unwrap().values().find(|object| object.name == name).cloned();
        object.is_some_and(|object| object.has_device() || object.device().is_ok())
    }

    /// The names.
    pub fn name(&self) -> &FsId {
        &self.name
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut known = self.service.known.lock().unwrap();
        known.sysfs.remove(&self.name.sysfs_name());
        let known = &mut known.objects;
        for key in &self.keys {
            if let Some((_, users)) = known.get_mut(key) {
                *users -= 1;
                if *users == 0 {
                    known.remove(key);
                }
            }
        }
    }
}
