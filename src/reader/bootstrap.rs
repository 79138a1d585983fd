//! A bootstrap from a file of its own, or out of the blob that it describes.
//!
//! A blob that holds its own bootstrap cannot be named in it, because its name is its digest: the
//! bootstrap says 64 times `x` instead, and whoever takes it out fills in the name of the file
//! (`blob.md` section 8).
//!
//! One of RAFS v5 is lifted: everybody behind this reads bootstraps of one format.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::base::{BlobId, ByteRange, Digest};
use crate::blob::toc::{HEADER_LEN, LastPart, Toc, TocError, Trailer};
use crate::build::{LIFT_VERSION, LiftError, lift};
use crate::codec::Sha256;
use crate::format::blobfile::features;
use crate::format::erofs::{self, DeviceSlot, SUPERBLOCK_OFFSET, Superblock};
use crate::format::rafs::{self, BlobEntry, ExtSuperblock};
use crate::format::{array_at, array_at_mut, record_at};
use crate::image::{Image, ImageError, MAX_BOOTSTRAP, v5};

/// What stands for the name of a blob that did not exist yet.
const UNNAMED: [u8; BlobId::MAX_LEN] = [b'x'; BlobId::MAX_LEN];

/// Part of a table of contents that is the bootstrap.
const BOOTSTRAP: &str = "image.boot";

/// A bootstrap in memory, every blob of it named, in the format that the kernel reads.
#[derive(Debug)]
pub struct Loaded {
    /// The bootstrap.
    pub bytes: Vec<u8>,
    /// The blob that it was taken out of, if it was no file of its own.
    pub container: Option<BlobId>,
}

/// A bootstrap as it was found, of whichever version.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    content: Content,
    /// What to call a blob that it cannot name.
    name: Option<BlobId>,
    taken_out: bool,
}

/// Where the bytes of a bootstrap are.
#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    /// All of this file, which is of RAFS v6 and was not read, of this length.
    File(File, u64),
}

/// Why a file gives no bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The file is neither a bootstrap nor a blob that holds one.
    #[error("{} is not a usable RAFS v6 bootstrap", path.display())]
    Image {
        path: PathBuf,
        #[source]
        cause: ImageError,
    },
    /// The file is a RAFS v5 bootstrap, or an older one, that is damaged or cannot be used.
    #[error("{} is a RAFS image that cannot be used", path.display())]
    Lift {
        path: PathBuf,
        #[source]
        cause: LiftError,
    },
    /// The file is a blob whose bootstrap cannot be had.
    #[error("the bootstrap in {} cannot be used", path.display())]
    Toc {
        path: PathBuf,
        #[source]
        cause: TocError,
    },
}

/// The image at `path`: see [`load`].
///
/// # Errors
/// As [`load`], and if what was read is no sound bootstrap.
pub fn open(path: &Path) -> Result<Image, LoadError> {
    let loaded = load(path)?;
    Image::parse(loaded.bytes).map_err(|cause| LoadError::Image { path: path.to_owned(), cause })
}

/// Reads the bootstrap at `path`: a bootstrap file, or a blob file that holds its bootstrap, with
/// or without a table of contents. At most 2 GiB of it; whether it makes sense is found out by
/// [`crate::image::Image::parse`].
pub fn load(path: &Path) -> Result<Loaded, LoadError> {
    load_as(path, None)
}

/// Reads the bootstrap at `path` as [`load`] does. If it lies in a blob, that blob is called `id`,
/// if given, whatever the name of the file.
pub fn load_as(path: &Path, id: Option<&BlobId>) -> Result<Loaded, LoadError> {
    find(path, id)?.load()
}

/// The same without a look at what is in it.
pub fn find(path: &Path, id: Option<&BlobId>) -> Result<Found, LoadError> {
    let io = |cause| LoadError::Io { path: path.to_owned(), cause };
    // Opening a FIFO must not make the caller wait for a writer for ever.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(io(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let len = metadata.len();
    let name = name_of(path);
    let found = |content, name, taken_out| Found { path: path.to_owned(), content, name, taken_out };
    // From the end first: a blob without data starts with its bootstrap, and looks like one.
    match take_out(&file, len) {
        Ok(bytes) => return Ok(found(Content::Bytes(bytes), id.cloned().or(name), true)),
        Err(Failure::Toc(TocError::NoHeader)) => {}
        Err(Failure::Toc(cause)) => return Err(LoadError::Toc { path: path.to_owned(), cause }),
        Err(Failure::Io(cause)) => return Err(io(cause)),
    }
    let Some(version) = version_of(&file, len).map_err(io)? else {
        let cause = ImageError::NotRafs(
            "no EROFS magic at byte 1024, no RAFS v5 magic at its start, and no blob that holds a bootstrap",
        );
        return Err(LoadError::Image { path: path.to_owned(), cause });
    };
    if len > MAX_BOOTSTRAP {
        return Err(io(io::Error::other("it is longer than 2 GiB, so it is no bootstrap")));
    }
    // A file that anybody may have called anything names a blob only if it looks like a name.
    let name = name.filter(|name| Digest::from_hex(name.as_str()).is_some());
    let content = match version {
        Version::V6 if name.is_none() => Content::File(file, len),
        _ => Content::Bytes(read_all(&file, len).map_err(io)?),
    };
    Ok(found(content, name, false))
}

/// A bootstrap that somebody took out of a layer, with its blobs named. `shown` is what people call it.
pub fn of_bytes(bytes: Vec<u8>, shown: &Path) -> Result<Found, LoadError> {
    let path = shown.to_owned();
    let magic =
        usize::try_from(SUPERBLOCK_OFFSET).ok().and_then(|at| bytes.get(at..)).and_then(|rest| rest.first_chunk::<4>());
    if !v5::is_bootstrap(&bytes) && magic.is_none_or(|magic| u32::from_le_bytes(*magic) != erofs::MAGIC) {
        let cause = ImageError::NotRafs("no EROFS magic at byte 1024, and no RAFS v5 magic at its start");
        return Err(LoadError::Image { path, cause });
    }
    Ok(Found { path, content: Content::Bytes(bytes), name: None, taken_out: false })
}

/// What the bootstrap in a layer with this digest depends on, lifted or not: see [`Found::to_be_lifted`].
pub fn layer_key(layer: Digest) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(b"the bootstrap in the layer ");
    hasher.update(&layer.0);
    hasher.update(&LIFT_VERSION.to_le_bytes());
    hasher.finish()
}

impl Found {
    /// The bootstrap with every blob named, and lifted if it is of RAFS v5.
    pub fn load(self) -> Result<Loaded, LoadError> {
        let bytes = if self.is_v5() {
            self.v5().and_then(|image| lift(&image)).map_err(|cause| LoadError::Lift { path: self.path, cause })?
        } else {
            let mut bytes = match self.content {
                Content::Bytes(bytes) => bytes,
                Content::File(file, len) => {
                    read_all(&file, len).map_err(|cause| LoadError::Io { path: self.path, cause })?
                }
            };
            fill_in(&mut bytes, self.name.as_ref(), self.taken_out);
            bytes
        };
        Ok(Loaded { bytes, container: self.name.filter(|_| self.taken_out) })
    }

    /// Whether it is of RAFS v5, or of an older version.
    pub fn is_v5(&self) -> bool {
        v5::is_bootstrap(self.bytes())
    }

    /// The file that it is from end to end, if what lies there is what [`Found::load`] would give.
    pub fn file(&self) -> Option<&File> {
        match &self.content {
            Content::Bytes(_) => None,
            Content::File(file, _) => Some(file),
        }
    }

    /// As far as it was read.
    fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Bytes(bytes) => bytes,
            Content::File(..) => &[],
        }
    }

    /// The RAFS v5 bootstrap that it is, every blob named.
    ///
    /// # Errors
    /// If it is none, or damaged.
    pub fn v5(&self) -> Result<v5::Bootstrap<'_>, LiftError> {
        let mut image = v5::Bootstrap::parse(self.bytes())?;
        if let Some(name) = &self.name {
            image.name_blobs(name, self.taken_out);
        }
        Ok(image)
    }

    /// What the lifted bootstrap depends on, if this one has to be lifted: two that agree in it become
    /// the same.
    pub fn to_be_lifted(&self) -> Option<Digest> {
        if !self.is_v5() {
            return None;
        }
        let mut hasher = Sha256::new();
        hasher.update(self.bytes());
        hasher.update(&[u8::from(self.taken_out)]);
        hasher.update(self.name.as_ref().map_or(b"", |name| name.as_str().as_bytes()));
        hasher.update(&[0]);
        hasher.update(&LIFT_VERSION.to_le_bytes());
        Some(hasher.finish())
    }
}

enum Failure {
    Io(io::Error),
    Toc(TocError),
}

impl From<io::Error> for Failure {
    fn from(cause: io::Error) -> Self {
        Self::Io(cause)
    }
}

impl From<TocError> for Failure {
    fn from(cause: TocError) -> Self {
        Self::Toc(cause)
    }
}

/// What a file is of that begins with a bootstrap.
enum Version {
    /// Or older.
    V5,
    V6,
}

fn version_of(file: &File, len: u64) -> io::Result<Option<Version>> {
    let mut magic = [0; 4];
    if len < SUPERBLOCK_OFFSET + magic.len() as u64 {
        return Ok(None);
    }
    file.read_exact_at(&mut magic, 0)?;
    if v5::is_bootstrap(&magic) {
        return Ok(Some(Version::V5));
    }
    file.read_exact_at(&mut magic, SUPERBLOCK_OFFSET)?;
    Ok((u32::from_le_bytes(magic) == erofs::MAGIC).then_some(Version::V6))
}

fn read_all(file: &File, len: u64) -> io::Result<Vec<u8>> {
    read(file, ByteRange::at(0, len).ok_or(io::ErrorKind::InvalidInput)?)
}

/// The bootstrap in a blob file of `len` bytes.
fn take_out(file: &File, len: u64) -> Result<Vec<u8>, Failure> {
    let last = len.checked_sub(HEADER_LEN).and_then(|at| ByteRange::at(at, HEADER_LEN));
    let trailer = Trailer::parse(&read(file, last.ok_or(TocError::NoHeader)?)?, len)?;
    if trailer.part == LastPart::Bootstrap {
        if trailer.stored.len() > MAX_BOOTSTRAP {
            return Err(TocError::Header("is of a bootstrap longer than 2 GiB").into());
        }
        return Ok(read(file, trailer.stored)?);
    }
    let toc = Toc::parse(&read(file, trailer.stored)?, trailer.stored)?;
    let part = toc.find(BOOTSTRAP).ok_or(TocError::Header("is of a table of contents without a bootstrap"))?;
    if part.stored.len() > MAX_BOOTSTRAP {
        return Err(TocError::Header("is of a bootstrap longer than 2 GiB").into());
    }
    Ok(part.open(&read(file, part.stored)?, MAX_BOOTSTRAP)?)
}

/// Reads a range that lies in the file, and so has a bounded length.
fn read(file: &File, range: ByteRange) -> io::Result<Vec<u8>> {
    let len = usize::try_from(range.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, range.start())?;
    Ok(bytes)
}

/// The blob that a file is, by its name: without all extensions, of which `.image.boot` is one.
fn name_of(path: &Path) -> Option<BlobId> {
    path.file_name()?.to_str()?.split('.').next()?.parse().ok()
}

/// Gives blobs without a name the `name` of the file, in the device table, which the kernel reads,
/// and in the blob table. Blobs of the time before 2.2 have one that is not theirs if the bootstrap
/// was taken out of a blob. Whatever does not fit is left for the checks of the image.
fn fill_in(bytes: &mut [u8], name: Option<&BlobId>, taken_out: bool) {
    let Some(name) = name else { return };
    let Some((count, table)) = tables(bytes) else { return };
    for number in 0..count {
        let entry_at = table + number * size_of::<BlobEntry>() as u64;
        let slot_at = rafs::DEVICE_TABLE_OFFSET + number * size_of::<DeviceSlot>() as u64;
        let Ok([entry]) = array_at_mut::<BlobEntry>(bytes, entry_at, 1, "blob table") else { return };
        let set = entry.features.get();
        if set & features::SEPARATE != 0 && entry.meta_digest == [0; 32] && taken_out {
            // Its chunks lie in a foreign file, and its tables in this one.
            if let Some(digest) = Digest::from_hex(name.as_str()) {
                entry.meta_digest = digest.0;
            }
            continue;
        }
        if entry.id != UNNAMED && !(taken_out && set & features::CAP_TAR_TOC == 0) {
            continue;
        }
        entry.id = name.to_padded();
        let Ok([slot]) = array_at_mut::<DeviceSlot>(bytes, slot_at, 1, "device table") else { return };
        slot.tag = name.to_padded();
    }
}

/// Number of devices and start of the blob table.
fn tables(bytes: &[u8]) -> Option<(u64, u64)> {
    let sb: &Superblock = record_at(bytes, SUPERBLOCK_OFFSET, "superblock").ok()?;
    let ext: &ExtSuperblock = record_at(bytes, rafs::EXT_SUPERBLOCK_OFFSET, "extended superblock").ok()?;
    let (count, table) = (u64::from(sb.extra_devices.get()), ext.blob_table_offset.get());
    array_at::<BlobEntry>(bytes, table, count, "blob table").ok()?;
    array_at::<DeviceSlot>(bytes, rafs::DEVICE_TABLE_OFFSET, count, "device table").ok()?;
    Some((count, table))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::blobfile::PartHeader;
    use zerocopy::{FromZeros, IntoBytes};

    const NAME: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    /// The two superblocks and tables of a bootstrap with the named blobs.
    fn bootstrap(blobs: &[(&[u8; 64], u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        let mut sb = Superblock::new_zeroed();
        sb.magic = erofs::MAGIC.into();
        sb.extra_devices = u16::try_from(blobs.len()).unwrap().into();
        sb.write_to_prefix(&mut bytes[1024..]).unwrap();
        let mut ext = ExtSuperblock::new_zeroed();
        ext.blob_table_offset = 4096.into();
        ext.write_to_prefix(&mut bytes[1152..]).unwrap();
        for (number, (id, set)) in blobs.iter().enumerate() {
            let mut entry = BlobEntry::new_zeroed();
            (entry.id, entry.features) = (**id, (*set).into());
            entry.write_to_prefix(&mut bytes[4096 + number * 256..]).unwrap();
            let mut slot = DeviceSlot::new_zeroed();
            slot.tag = **id;
            slot.write_to_prefix(&mut bytes[1408 + number * 128..]).unwrap();
        }
        bytes
    }

    /// Ids in the blob table and in the device table.
    fn names(bytes: &[u8], count: usize) -> Vec<(String, String)> {
        let text = |at: usize| String::from_utf8_lossy(&bytes[at..at + 64]).into_owned();
        (0..count).map(|number| (text(4096 + number * 256), text(1408 + number * 128))).collect()
    }

    fn load_as(name: &str, content: &[u8]) -> Result<Loaded, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        load(&path)
    }

    #[test]
    fn blobs_without_a_name_get_that_of_the_file_in_both_tables() {
        let own = [b'b'; 64];
        let unnamed = bootstrap(&[(&UNNAMED, features::CAP_TAR_TOC), (&own, features::CAP_TAR_TOC)]);
        let blob = [b"data", &*unnamed, PartHeader::new("image.boot", 8192).as_bytes()].concat();
        let (new, own) = (NAME.to_owned(), "b".repeat(64));
        let want = [(new.clone(), new), (own.clone(), own)];

        for name in [NAME.to_owned(), format!("{NAME}.image.boot")] {
            assert_eq!(names(&load_as(&name, &blob).unwrap().bytes, 2), want);
            assert_eq!(names(&load_as(&name, &unnamed).unwrap().bytes, 2), want);
        }
        assert_eq!(load_as(NAME, &blob).unwrap().container.unwrap().as_str(), NAME);
        assert_eq!(load_as("bootstrap", &unnamed).unwrap().bytes, unnamed, "that is no name of a blob");
    }

    #[test]
    fn old_blobs_are_renamed_only_when_the_bootstrap_comes_out_of_one() {
        let old = [b'c'; 64];
        let bytes = bootstrap(&[(&old, 0)]);
        let blob = [&*bytes, PartHeader::new("image.boot", 8192).as_bytes()].concat();

        assert_eq!(load_as(NAME, &bytes).unwrap().bytes, bytes);
        assert_eq!(names(&load_as(NAME, &blob).unwrap().bytes, 1), [(NAME.to_owned(), NAME.to_owned())]);
    }

    #[test]
    fn what_holds_no_bootstrap_is_refused() {
        for content in [&b""[..], &[0; 100], &[0; 5000]] {
            assert!(matches!(load_as(NAME, content), Err(LoadError::Image { .. })));
        }
        let cut = PartHeader::new("image.boot", 8192);
        assert!(matches!(load_as(NAME, cut.as_bytes()), Err(LoadError::Toc { .. })));
        let unnamed = bootstrap(&[(&UNNAMED, 0)]);
        let lying = [&unnamed[..1024 + 128], &[0xff; 4096]].concat();
        assert_eq!(load_as(NAME, &lying).unwrap().bytes, lying, "tables outside are left to the image's checks");
    }
}
