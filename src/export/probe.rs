//! Proof that reads of a mount reach us, made before anybody else can see the mount.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::Backing;
use crate::base::{BLOCK, ByteRange};
use crate::image::{Extent, Image, ImageError, Kind};
use crate::sys::process::is_out_of_files;

/// A byte of a file that lies in a part of its device that is not filled yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ColdByte {
    /// Names from the root.
    pub(super) path: Vec<Vec<u8>>,
    /// Position in the file.
    pub(super) at: u64,
    /// Position in [`Image::devices`].
    pub(super) device: usize,
}

/// What each extent of a file takes in a bootstrap (`rafs-v6.md` section 12), in bytes.
const EXTENT_BYTES: u64 = 8;

/// One cold byte for each device that has one.
///
/// Damaged inodes are passed over: they are the reader's problem, not the mount's. So is an image
/// whose files share their chunk arrays to look larger than it is: the search ends when it has seen
/// as many extents as the bootstrap has room for. A file with several names is looked at once.
pub(super) fn find_cold(image: &Image, devices: &[impl AsRef<dyn Backing>]) -> Result<Vec<ColdByte>, ImageError> {
    let mut wanted: Vec<bool> = devices.iter().map(|device| !device.as_ref().is_settled()).collect();
    let mut found = Vec::new();
    let mut linked = HashSet::new();
    let mut budget = image.summary().bootstrap_len / EXTENT_BYTES;
    let mut walk = image.walk();
    while wanted.contains(&true) && budget > 0 {
        let Some(step) = walk.next_visit() else { break };
        let Ok(step) = step else { continue };
        if step.inode.kind != Kind::Regular {
            continue;
        }
        if step.inode.nlink > 1 && !linked.insert(step.inode.nid) {
            continue;
        }
        let mut visit = |extent: Extent<'_>| {
            if let Extent::Device { at, device, decoded } = extent
                && wanted[device]
                && !devices[device].as_ref().present(first_block(decoded))
            {
                wanted[device] = false;
                let path = step.path.iter().map(|name| name.to_vec()).collect();
                found.push(ColdByte { path, at, device });
            }
            budget = budget.saturating_sub(1);
            if budget > 0 && wanted.contains(&true) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        // Extents before a damaged one have been looked at; that is all that is wanted here.
        let _ = image.extents(&step.inode, &mut visit);
    }
    Ok(found)
}

fn first_block(decoded: ByteRange) -> ByteRange {
    ByteRange::at(decoded.start(), BLOCK).expect("a device is shorter than 2^44 bytes")
}

impl ColdByte {
    /// Whether a read of the byte through the mount whose root is `root` reaches us: `expect` has it done, and looks.
    ///
    /// # Errors
    /// There is no descriptor left to read it with, so that nothing is known.
    pub(super) fn reaches_us(
        &self,
        root: &impl AsFd,
        expect: impl FnOnce(&mut dyn FnMut() -> io::Result<()>) -> bool,
    ) -> io::Result<bool> {
        let mut untried = None;
        let seen = expect(&mut || {
            self.read(root).map_err(|error| {
                let kind = error.kind();
                if is_out_of_files(&error) {
                    untried = Some(error);
                }
                kind.into()
            })
        });
        untried.map_or(Ok(seen), Err)
    }

    /// Reads the byte through the mount whose root is `root`. Blocks until the read is answered.
    fn read(&self, root: &impl AsFd) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // Name by name: the whole path may be longer than one call accepts.
        let mut at: OwnedFd = root.as_fd().try_clone_to_owned()?;
        for name in &self.path {
            at = openat(&at, OsStr::from_bytes(name), flags, Mode::empty())?;
        }
        let file = File::from(at);
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        let read = file.read_exact_at(&mut [0], self.at);
        // What could not be read stays as a page that is there and empty, and is read alone by the next reader,
        // whom nothing can interrupt then.
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        read
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use zerocopy::IntoBytes;

    use super::*;
    use crate::build::{BuildSpec, Compression, Source, build};
    use crate::cache::{Completion, Fill, Request};
    use crate::format::erofs::{Dirent, InodeExtended};
    use crate::image::Layout;

    /// A device with everything in it except for the block at `cold`, if any.
    #[derive(Default)]
    struct Warm {
        cold: Option<u64>,
        asked: AtomicU64,
    }

    impl Fill for Warm {
        fn decoded_len(&self) -> u64 {
            1 << 30
        }

        fn present(&self, decoded: ByteRange) -> bool {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.cold != Some(decoded.start())
        }

        fn fill_for(&self, _: Request, _: ByteRange, done: Completion) {
            done(Ok(()));
        }

        fn touched(&self, _: ByteRange) {}
    }

    impl Backing for Warm {
        fn path(&self) -> &Path {
            Path::new("/nowhere")
        }

        fn file(&self) -> Arc<File> {
            Arc::new(File::open("/dev/null").unwrap())
        }

        fn is_settled(&self) -> bool {
            false
        }

        fn when_settled(&self, _: Box<dyn FnOnce() + Send>) {}
    }

    /// The bootstrap of one file of 256 chunks and 300 names of empty files.
    fn bootstrap() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut add = |path: &str, content: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, content).unwrap();
        };
        let content: Vec<u8> = (0..256 * 1024u32).flat_map(u32::to_le_bytes).collect();
        add("big", &content);
        (0..300).for_each(|number| add(&format!("empty-{number}"), b""));
        let out = tempfile::tempdir().unwrap();
        let stream = Box::new(io::Cursor::new(tar.into_inner().unwrap()));
        let mut spec = BuildSpec::new(Source::Archive { name: "test.tar".into(), stream }, out.path());
        (spec.compression, spec.chunk_size) = (Compression::None, 4096);
        std::fs::read(build(spec, &()).unwrap().bootstrap).unwrap()
    }

    fn find(bootstrap: Vec<u8>, device: Warm) -> (Vec<ColdByte>, u64) {
        let image = Image::parse(bootstrap).unwrap();
        let device = Arc::new(device);
        let found = find_cold(&image, &[Arc::clone(&device) as Arc<dyn Backing>]).unwrap();
        (found, device.asked.load(Ordering::Relaxed))
    }

    #[test]
    fn the_only_cold_block_is_found() {
        let (found, _) = find(bootstrap(), Warm { cold: Some(255 * 4096), ..Warm::default() });
        assert_eq!(found, [ColdByte { path: vec![b"big".to_vec()], at: 255 * 4096, device: 0 }]);
    }

    #[test]
    fn an_image_whose_every_name_is_the_same_file_is_searched_no_longer_than_it_is() {
        let mut bytes = bootstrap();
        let image = Image::parse(bytes.clone()).unwrap();
        let root = image.inode(image.summary().root).unwrap();
        let Layout::Inline { at, tail } = root.layout else { panic!("{root:?}") };
        let mut big = 0;
        let mut take = |entry: crate::image::DirEntry<'_>| {
            big = if entry.name == b"big" { entry.nid } else { big };
            ControlFlow::Continue(())
        };
        image.list(&root, &mut take).unwrap();
        let blocks = (0..root.size / BLOCK).map(|block| at + block * BLOCK).chain([tail]);
        for block in blocks.map(|at| usize::try_from(at).unwrap()) {
            // The offset of the first name tells how many entries there are.
            let names_at = usize::from(u16::from_le_bytes([bytes[block + 8], bytes[block + 9]]));
            for entry in (block..block + names_at).step_by(size_of::<Dirent>()).skip(2) {
                bytes[entry..entry + 8].copy_from_slice(big.as_bytes());
            }
        }
        let links = image.summary().meta_start + big * 32 + std::mem::offset_of!(InodeExtended, nlink) as u64;
        assert_eq!(bytes[usize::try_from(links).unwrap()], 1, "so that it is not known for a hard link");

        let (found, asked) = find(bytes.clone(), Warm::default());
        assert_eq!(found, []);
        assert!((256 * 2..=bytes.len() as u64 / EXTENT_BYTES).contains(&asked), "{asked}");
    }
}
