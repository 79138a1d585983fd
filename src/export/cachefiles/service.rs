use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Whence, lseek};

use super::object::{Object, ObjectSpec};
use super::{FsId, ObjectName};
use crate::base::{BLOCK, ByteRange, Chain, Class};
use crate::cache::{FillError, Request};
use crate::export::AttachError;
use crate::export::limiter::{Limiter, Told};
use crate::export::pulse::Pulse;
use crate::sys::cachefiles::{self, Device, Open};
use crate::telemetry::{Answer, Backend, Telemetry};

/// The bound cache and everything the kernel may ask it for.
pub struct Cachefiles {
    device: Device,
    pulse: Pulse,
    known: Mutex<Known>,
    /// By the kernel's number for an open object.
    open: Mutex<HashMap<u32, Arc<Object>>>,
    telemetry: Telemetry,
    log: Arc<Limiter>,
}

/// Requests answered before the pulse is looked at again.
const REQUESTS_AT_ONCE: usize = 256;

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
    /// Opens the device and binds the cache below `root`, an existing directory. `telemetry` counts
    /// the reads.
    ///
    /// # Errors
    /// See [`Device::open`] and [`Device::bind`].
    pub fn bind(root: &Path, telemetry: Telemetry) -> io::Result<Arc<Self>> {
        let device = Device::open()?;
        device.bind(root, "rafsd")?;
        Self::over(device, telemetry)
    }

    /// Goes on with the bound device of a process that has died. Its images are to be registered
    /// before [`Cachefiles::run`], and [`Cachefiles::restore`] is to be called after.
    pub fn adopt(device: OwnedFd, telemetry: Telemetry) -> io::Result<Arc<Self>> {
        Self::over(Device::from(device), telemetry)
    }

    fn over(device: Device, telemetry: Telemetry) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            device,
            pulse: Pulse::new()?,
            known: Mutex::default(),
            open: Mutex::default(),
            telemetry,
            log: Arc::new(Limiter::new()),
        }))
    }

    /// The device, to be held by other processes as well.
    pub fn device(&self) -> io::Result<OwnedFd> {
        self.device.as_fd().try_clone_to_owned()
    }

    /// Whether a registered image has an object of this name.
    pub(super) fn is_registered(&self, object: &ObjectName<'_>) -> bool {
        let key = (format!("erofs,{}", object.domain).into_bytes(), object.name.as_bytes().to_vec());
        self.known.lock().unwrap().objects.contains_key(&key)
    }

    /// Runs `work` where the kernel can be asked about the files of its cache: see [`Device::in_folders`].
    pub(super) fn in_folders<T: Send>(
        &self,
        work: impl FnOnce(&cachefiles::Folders<'_>) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        self.device.in_folders(work)
    }

    /// Has the requests delivered again that a dead process had taken.
    ///
    /// # Errors
    /// `Unsupported` where the kernel cannot: their readers then wait until they are killed.
    pub fn restore(&self) -> io::Result<()> {
        self.device.restore().map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => io::ErrorKind::Unsupported.into(),
            _ => error,
        })
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
        let mut registering = self.known.lock().unwrap();
        let known = &mut *registering;
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
        drop(registering);
        self.serve_open();
        Ok(Registration { service: self.clone(), name: name.clone(), keys })
    }

    /// Answers requests until [`Cachefiles::stop`].
    pub fn run(&self) -> io::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(self.device.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.pulse.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if self.pulse.beat() {
                return Ok(());
            }
            // Not without end: whoever asks whether this thread is well wants to be heard in between.
            for _ in 0..REQUESTS_AT_ONCE {
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
        self.pulse.stop();
    }

    /// Whether the thread that answers comes round within this time. Blocks.
    pub fn is_responsive(&self, within: Duration) -> bool {
        self.pulse.is_felt(within)
    }

    /// Whether the kernel has objects open: somebody has an image mounted.
    pub fn is_in_use(&self) -> bool {
        !self.open.lock().unwrap().is_empty()
    }

    /// READ requests since the start.
    pub fn reads(&self) -> u64 {
        let reads = self.telemetry.reads.at(Backend::Cachefiles);
        reads.answered.sum() + u64::try_from(reads.waiting.get()).unwrap_or(0)
    }

    fn handle_contained(&self, request: cachefiles::Request) {
        // A bug met by one request must not stop the answers for every other reader of the host.
        if catch_unwind(AssertUnwindSafe(|| self.handle(request))).is_err() {
            tracing::error!("a request could not be handled and its reader was failed");
        }
    }

    fn handle(&self, request: cachefiles::Request) {
        use cachefiles::Request;
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
        // A reader of an object that the kernel has open would not hear of a refusal: the kernel asks for the object
        // again, and again. Accepted, each of its reads is denied.
        let size = spec.as_ref().map_or_else(|| opened_before(&open.object), |spec| Some(spec.size));
        let answer = match size {
            Some(size) => self.device.opened(open.msg_id, size),
            // Dropping `open.object` afterwards closes the descriptor, as it must be.
            None => self.device.refuse_open(open.msg_id, libc::ENOENT),
        };
        if let Err(error) = answer {
            // No CLOSE will follow, and an object that stays open here would block its name.
            tracing::error!(object = name, %error, "an open could not be answered");
            return;
        }
        if spec.is_none() {
            tracing::warn!(object = name, "the kernel asked for an object of no registered image");
        }
        let Some(size) = size else { return };
        let object = match spec {
            Some(spec) => Object::new(name, open.object, spec),
            None => Object::unserved(name, open.object, size),
        };
        let is_served = object.is_served();
        self.open.lock().unwrap().insert(open.object_id, Arc::new(object));
        if !is_served {
            // An image with it may have been registered meanwhile.
            self.serve_open();
        }
    }

    /// Serves open objects of which nothing was known, and is by now: the kernel does not ask for them again.
    fn serve_open(&self) {
        let open = self.open.lock().unwrap();
        let unserved: Vec<_> = open.values().filter(|object| !object.is_served()).cloned().collect();
        drop(open);
        let known = self.known.lock().unwrap();
        for object in unserved {
            let mut all = known.objects.iter();
            if let Some((_, (spec, _))) = all.find(|((volume, cookie), _)| object_name(volume, cookie) == object.name) {
                object.serve(spec.clone());
            }
        }
    }

    fn read(&self, msg_id: u32, object_id: u32, range: ByteRange) {
        let asked = Request::new(self.telemetry.next_request(), Class::OnDemand);
        // Counted as denied on every way out but a good one.
        let waiting = self.telemetry.waiting_read(Backend::Cachefiles, asked.asked());
        let request = asked.id().number();
        let Some(object) = self.open.lock().unwrap().get(&object_id).cloned() else {
            // Without the object's descriptor there is no way to answer.
            tracing::error!(request, object_id, "the kernel reads an object that is not open here");
            return;
        };
        let duty = object.duty(msg_id);
        let device = match object.device() {
            Ok(device) => device,
            Err(error) => {
                if let Some(held_back) = self.log.admit(Instant::now()) {
                    tracing::error!(request, object = object.name, %error, held_back, "an object cannot be filled");
                }
                return;
            }
        };
        let wanted = range.align_out(BLOCK).unwrap_or(range).clamp_end(object.len());
        if wanted.is_empty() {
            return;
        }
        let answer = if device.present(wanted) { Answer::AtOnce } else { Answer::Filled };
        let (log, name, of) = (self.log.clone(), object.name.clone(), asked.clone());
        let done = move |result: Result<(), FillError>| {
            drop(duty);
            waiting.answered(if result.is_ok() { answer } else { Answer::Denied });
            if let Err(error) = result
                && let Some(held_back) = log.admit(Instant::now())
            {
                let Told { request, class, queue_ms, service_ms } = Told::of(&of);
                tracing::warn!(
                    request, error = %Chain(&error), object = name, decoded = %wanted, class, queue_ms, service_ms,
                    held_back, "read failed"
                );
            }
        };
        device.fill_for(asked, wanted, Box::new(done));
    }
}

/// Length of an object's file in whole blocks, if the kernel has had the object open before: one that is opened for the
/// first time has no file yet when it is asked for.
fn opened_before(object: &OwnedFd) -> Option<u64> {
    lseek(object, 0, Whence::SeekEnd).ok().and_then(|len| u64::try_from(len).ok()).filter(|len| *len > 0)
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
