//! What lies in the kernel's cache, and how it goes.
//!
//! One file for each object: `cache/I<volume key>/@<byte>/<encoded cookie key>` below the directory that was bound
//! (`cachefiles-ondemand.md` section 9). An object in its first use has no name yet and is not seen here.

use std::fmt;
use std::fs::{self, DirEntry};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Cachefiles;
use crate::cache::{KernelCache, KernelObject};
use crate::sys::cachefiles::Folders;
use crate::sys::sandbox::Sandbox;

/// How the name of a volume of EROFS begins.
const VOLUME: &str = "Ierofs,";

/// What an object is called by whoever mounts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectName<'a> {
    /// The domain of its volume.
    pub domain: &'a str,
    /// The blob's id, or the image's.
    pub name: &'a str,
}

/// Asked before an object goes: has it go by the function that is passed, or not. Tells whether it went.
pub type LetGo = Box<dyn Fn(&ObjectName<'_>, &mut dyn FnMut() -> io::Result<bool>) -> io::Result<bool> + Send + Sync>;

/// The kernel's cache of a bound service.
pub struct Culling {
    service: Arc<Cachefiles>,
    /// The directory of volumes.
    volumes: PathBuf,
    sandbox: Sandbox,
    let_go: LetGo,
}

impl fmt::Debug for Culling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Culling").field(&self.volumes).finish()
    }
}

impl Culling {
    /// For the cache that `service` has bound at `root`. `let_go` is asked about each object whose
    /// name can be one that this program gives.
    pub fn new(service: Arc<Cachefiles>, root: &Path, sandbox: Sandbox, let_go: LetGo) -> Self {
        Self { service, volumes: root.join("cache"), sandbox, let_go }
    }

    /// Its threads have a working directory of their own, which a confined one may not have.
    fn in_folders<T: Send>(&self, work: impl FnOnce(&Folders<'_>) -> io::Result<T> + Send) -> io::Result<T> {
        self.sandbox.try_outside(|| self.service.in_folders(work))
    }
}

impl KernelCache for Culling {
    fn objects(&self) -> io::Result<Vec<KernelObject>> {
        self.in_folders(|folders| {
            let mut objects = Vec::new();
            for volume in named(&self.volumes, VOLUME)? {
                for folder in named(&volume.path(), "@")? {
                    let files = named(&folder.path(), "")?;
                    if files.is_empty() {
                        continue;
                    }
                    folders.enter(&folder.path())?;
                    let object = |file: DirEntry| {
                        let meta = file.metadata().ok()?;
                        let name = file.path().strip_prefix(&self.volumes).ok()?.to_str()?.to_owned();
                        // One that went meanwhile is none, and one that cannot be asked for stays.
                        let in_use = folders.is_in_use(file.file_name().to_str()?).unwrap_or(true);
                        let last_used = u64::try_from(meta.atime().max(meta.mtime())).unwrap_or(0);
                        Some(KernelObject { name, bytes: meta.blocks() * 512, last_used, in_use })
                    };
                    objects.extend(files.into_iter().filter_map(object));
                }
            }
            Ok(objects)
        })
    }

    fn remove(&self, name: &str) -> io::Result<bool> {
        let Parts { folder, file, told } = Parts::of(name).ok_or(io::ErrorKind::InvalidInput)?;
        let mut cull = || {
            self.in_folders(|folders| {
                folders.enter(&self.volumes.join(folder))?;
                folders.cull(file)
            })
        };
        match told {
            // Somebody may mount it at any moment.
            Some(object) if self.service.is_registered(&object) => Ok(false),
            Some(object) => (self.let_go)(&object, &mut cull),
            None => cull(),
        }
    }
}

/// The parts of an object's path.
struct Parts<'a> {
    folder: &'a str,
    file: &'a str,
    /// What it is called, if the kernel wrote that as it is.
    told: Option<ObjectName<'a>>,
}

impl<'a> Parts<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let (folder, file) = name.rsplit_once('/')?;
        let (volume, fan) = folder.split_once('/')?;
        let domain = volume.strip_prefix(VOLUME)?;
        // Exactly one of each, and nothing that leads elsewhere.
        if !fan.starts_with('@') || fan.contains('/') || file.is_empty() || matches!(domain, "" | "." | "..") {
            return None;
        }
        Some(Self { folder, file, told: file.strip_prefix('D').map(|name| ObjectName { domain, name }) })
    }
}

/// What in `dir` has a name that begins so; nothing if it is not there.
fn named(dir: &Path, beginning: &str) -> io::Result<Vec<DirEntry>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let wanted = |entry: &DirEntry| entry.file_name().as_encoded_bytes().starts_with(beginning.as_bytes());
    Ok(entries.collect::<io::Result<Vec<_>>>()?.into_iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_objects_are_taken_apart_and_others_refused() {
        let parts = |name: &'static str| {
            let told = |object: ObjectName<'static>| (object.domain, object.name);
            Parts::of(name).map(|parts| (parts.folder, parts.file, parts.told.map(told)))
        };
        assert_eq!(parts("Ierofs,rafsd/@5f/Dabc"), Some(("Ierofs,rafsd/@5f", "Dabc", Some(("rafsd", "abc")))));
        assert_eq!(parts("Ierofs,d/@00/E0xZyo"), Some(("Ierofs,d/@00", "E0xZyo", None)));
        for bad in ["", "Dabc", "Ierofs,d/Dabc", "Infs/@00/Dabc", "Ierofs,d/00/x", "Ierofs,d/@00/../x", "Ierofs,/@00/x"]
        {
            assert_eq!(parts(bad), None, "{bad}");
        }
    }
}
