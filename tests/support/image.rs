//! Images of RAFS v6 in the hands of the kernel, without any code under test.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use rustix::fs::CWD;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

/// A file system mounted read-only by the kernel, mostly an image by its EROFS driver; unmounted
/// when dropped.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Mounts `bootstrap` with complete device files, in the order of the device table.
    pub fn new(bootstrap: &Path, devices: &[PathBuf], at: &Path) -> io::Result<Self> {
        let devices = devices.iter().map(|path| ("device", path.as_path()));
        Self::configured("erofs", std::iter::once(("source", bootstrap)).chain(devices), at)
    }

    /// Mounts the directories as overlayfs shows them, the lowest first; at least two.
    pub fn overlay(layers: &[PathBuf], at: &Path) -> io::Result<Self> {
        let topmost_first = layers.iter().rev().map(|path| ("lowerdir+", path.as_path()));
        Self::configured("overlay", topmost_first, at)
    }

    /// A file system in memory that can be written to, for trees of very many files.
    pub fn memory(at: &Path) -> io::Result<Self> {
        let context = mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        Self::attach(&context, MountAttrFlags::empty(), at)
    }

    /// The same with room for one megabyte.
    pub fn small(at: &Path) -> io::Result<Self> {
        let context = mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        mount::fsconfig_set_string(&context, "size", "1m")?;
        Self::attach(&context, MountAttrFlags::empty(), at)
    }

    /// Option by option: `mount(2)` has one page for all of them, about thirty devices.
    fn configured<'p>(name: &str, options: impl Iterator<Item = (&'p str, &'p Path)>, at: &Path) -> io::Result<Self> {
        let context = mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, path) in options {
            mount::fsconfig_set_string(&context, key, path)?;
        }
        mount::fsconfig_set_flag(&context, "ro")?;
        Self::attach(&context, MountAttrFlags::MOUNT_ATTR_RDONLY, at)
    }

    fn attach(context: &OwnedFd, attributes: MountAttrFlags, at: &Path) -> io::Result<Self> {
        mount::fsconfig_create(context)?;
        let mounted = mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        mount::move_mount(&mounted, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(Self { at: at.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.at, MntFlags::MNT_DETACH).expect("what was mounted can be unmounted");
    }
}

/// A blob that is neither encrypted nor framed by tar headers, written out as the device it stands
/// for.
///
/// Reads the tables by hand: an error here is an error in the blob, not in a reader of ours.
pub fn expand(blob: &Path, device: &Path) -> io::Result<()> {
    let file = File::open(blob)?;
    let len = file.metadata()?.len();
    let mut header = [0; 64];
    file.read_exact_at(&mut header, len - 4096)?;
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
    assert_eq!(u32_at(0), 0xb10b_b10b, "header magic");
    let (features, algorithm, entries) = (u32_at(4), u32_at(8), u32_at(12) as usize);
    assert_eq!(u64_at(16) + u64_at(24) + 4096, len, "the array lies in front of the header");
    let mut stored = vec![0; usize::try_from(u64_at(24)).unwrap()];
    file.read_exact_at(&mut stored, u64_at(16))?;
    let table = plain(algorithm, &stored, usize::try_from(u64_at(32)).unwrap());
    let is_long = features & 4 != 0;
    let (table, contexts) = table.split_at(entries * if is_long { 24 } else { 16 });
    assert_eq!(contexts.len(), u32_at(56) as usize * 40);

    let out = File::create(device)?;
    let mut end = 0;
    for entry in table.chunks_exact(table.len() / entries) {
        let place = if is_long { Place::of_long(entry, contexts) } else { Place::of_short(entry) };
        assert_eq!(place.decoded_at, end, "chunks follow each other on block boundaries");
        end = (place.decoded_at + place.len as u64).next_multiple_of(4096);
        let mut bytes = vec![0; place.stored_len];
        file.read_exact_at(&mut bytes, place.stored_at)?;
        // Chunks have the compression of the table, or none where it does not pay. A table that
        // did not compress says nothing, so the frame's own magic is asked.
        let algorithm = match (place.stored_len == place.whole, algorithm) {
            (true, _) => 0,
            (false, 0) if bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) => 3,
            (false, 0) => 1,
            (false, other) => other,
        };
        let whole = plain(algorithm, &bytes, place.whole);
        out.write_all_at(&whole[place.part..place.part + place.len], place.decoded_at)?;
    }
    out.set_len(end)
}

/// What a chunk-info entry says.
struct Place {
    decoded_at: u64,
    len: usize,
    stored_at: u64,
    stored_len: usize,
    /// Plain bytes of what is stored there, and where those of the chunk start in them.
    whole: usize,
    part: usize,
}

impl Place {
    fn of_short(entry: &[u8]) -> Self {
        let (decoded, stored) = (word(entry, 0), word(entry, 8));
        let len = |size: u64| usize::try_from(size + 1).unwrap();
        let whole = len(decoded >> 44 | (decoded >> 8 & 0xf) << 20);
        Self {
            decoded_at: decoded & 0xfff_ffff_f000,
            len: whole,
            stored_at: stored & 0xff_ffff_ffff,
            stored_len: len(stored >> 44 | (stored >> 40 & 0xf) << 20),
            whole,
            part: 0,
        }
    }

    fn of_long(entry: &[u8], contexts: &[u8]) -> Self {
        let (decoded, stored, data) = (word(entry, 0), word(entry, 8), word(entry, 16));
        let small = |value: u64| usize::try_from(value).unwrap();
        let len = small((decoded >> 32 & 0xff_ffff) + 1);
        let mut place = Self {
            decoded_at: (decoded & 0xffff_ffff) << 12,
            len,
            stored_at: stored & 0xff_ffff_ffff,
            stored_len: small(stored >> 40),
            whole: len,
            part: 0,
        };
        if decoded >> 56 & 4 != 0 {
            assert_eq!(place.stored_len, 0, "members leave the length to their batch");
            let context = word(&contexts[small(data >> 32) * 40..], 0);
            (place.stored_len, place.whole) = (small(context & 0xffff_ffff), small(context >> 32));
            place.part = small(data & 0xffff_ffff);
        }
        place
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn plain(algorithm: u32, stored: &[u8], len: usize) -> Vec<u8> {
    let plain = match algorithm {
        0 => stored.to_vec(),
        1 => lz4_flex::block::decompress(stored, len).expect("a sound lz4 block"),
        3 => zstd::bulk::decompress(stored, len).expect("a sound zstd frame"),
        other => panic!("unexpected compression {other}"),
    };
    assert_eq!(plain.len(), len);
    plain
}
