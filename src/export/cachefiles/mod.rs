//! Serving through the kernel's own cache, `/dev/cachefiles` in on-demand mode.
//!
//! The kernel opens an *object* for each bootstrap and each blob, keeps its bytes in a cache of
//! its own, and sends a READ for what is missing. We write checked bytes into the object and
//! complete the READ; whatever goes wrong, completing it without having written makes the reader
//! fail with `EIO`: this interface never shows zeros.
//!
//! Objects are named by `(domain, name)`. [`Cachefiles::register`] makes an image's names known;
//! from then on anybody may `mount -t erofs -o fsid=NAME,domain_id=DOMAIN none /mnt`.

mod culling;
mod object;
mod service;

pub use culling::{Culling, LetGo, ObjectName};
pub use object::{ObjectSpec, OpenObject};
pub use service::{Cachefiles, Registration};

use std::path::Path;

use rustix::mount::MountAttrFlags;

use super::erofs::{self, Making, Stage};
use super::{Announce, AttachError, MountWatch, WatchId};
use crate::sys::cachefiles::MAX_COOKIE_KEY;
use crate::sys::mount::FsContext;
use crate::sys::sandbox::Sandbox;

/// Longest domain: it becomes part of a directory name together with a prefix.
const MAX_DOMAIN: usize = 200;

/// The two names under which the kernel asks for an image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FsId {
    /// `fsid=` of the mount: the name of the bootstrap's object.
    pub id: String,
    /// `domain_id=`: images of one domain share the cache of their blobs. Without one, the
    /// image's own name is its domain and it can be mounted once at a time.
    pub domain: Option<String>,
}

impl FsId {
    /// Checks the names against what the kernel survives: an over-long cookie key trips a
    /// `BUG_ON`, and a slash in a volume key becomes part of a path.
    pub fn new(id: &str, domain: Option<&str>) -> Result<Self, AttachError> {
        let check = |name: &str, max: usize| {
            let wrong = |rule| Err(AttachError::Name { name: name.to_owned(), rule });
            if name.is_empty() || name.len() > max {
                return wrong("it must have 1 to 200 characters");
            }
            if !name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b',')) || name.starts_with('.') {
                return wrong("it may hold printable characters other than space, slash and comma");
            }
            Ok(())
        };
        check(id, MAX_DOMAIN.min(MAX_COOKIE_KEY))?;
        domain.map_or(Ok(()), |domain| check(domain, MAX_DOMAIN))?;
        Ok(Self { id: id.to_owned(), domain: domain.map(str::to_owned) })
    }

    /// The volume key that EROFS derives from these names.
    fn volume_key(&self) -> Vec<u8> {
        format!("erofs,{}", self.domain.as_deref().unwrap_or(&self.id)).into_bytes()
    }

    /// What the kernel calls a mount of this image in sysfs, where two mounts must differ: it
    /// keeps 36 bytes (`s_sysfs_name`, Linux 6.12).
    fn sysfs_name(&self) -> String {
        let whole = self.domain.as_ref().map_or(self.id.clone(), |domain| format!("{domain},{}", self.id));
        whole.chars().take(36).collect()
    }

    /// The options of a mount of this image, as `mount -o` takes them.
    pub fn mount_options(&self) -> String {
        match &self.domain {
            Some(domain) => format!("fsid={},domain_id={domain}", self.id),
            None => format!("fsid={}", self.id),
        }
    }
}

/// Mounts a registered image at `target` and watches its superblock. What a confined thread may
/// not do is done outside of `sandbox`.
pub fn mount(
    name: &FsId,
    target: &Path,
    watch: &MountWatch,
    announce: Announce<'_>,
    sandbox: &Sandbox,
) -> Result<WatchId, AttachError> {
    let mount = || {
        let context = FsContext::open("erofs")?;
        context.set("fsid", &name.id)?;
        name.domain.as_deref().map_or(Ok(()), |domain| context.set("domain_id", domain))?;
        context.mount(MountAttrFlags::empty())
    };
    let make = || mount().map_err(AttachError::Mount);
    // The kernel waits for us, and before Linux 6.10 it hears no signal meanwhile.
    let making = Making { make: &make, needs: &[], reaches_us: &|_, _| Ok(true) };
    erofs::show(making, &[], &[], Stage { target, watch, announce, sandbox })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_mishandles_never_reach_it() {
        for bad in ["", "a/b", "a b", "a,b", ".", "..", "a\n", "ü", &"x".repeat(201)] {
            assert!(FsId::new(bad, None).is_err(), "{bad:?}");
            assert!(FsId::new("ok", Some(bad)).is_err(), "{bad:?}");
        }
        assert!(FsId::new(&"x".repeat(200), Some("d")).is_ok());
    }

    #[test]
    fn without_a_domain_the_image_is_its_own_volume() {
        assert_eq!(FsId::new("img1", None).unwrap().volume_key(), b"erofs,img1");
        let shared = FsId::new("img1", Some("d")).unwrap();
        assert_eq!(shared.volume_key(), b"erofs,d");
        assert_eq!(shared.mount_options(), "fsid=img1,domain_id=d");
    }
}
