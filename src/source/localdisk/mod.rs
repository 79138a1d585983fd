//! A disk of blobs: a block device or a file, with a partition for each blob, as Nydus lays it out.
//!
//! The name of a partition holds 36 characters and an id 64, so that an id is in two parts: the first 32 digits are the name,
//! the other 32 the partition's GUID. In an older form the partition is one of "basic data", and its name is
//! the blob's id cut to 32 digits. A partition is whole sectors, and nothing on the disk says how many bytes of the
//! last one belong to the blob.

mod gpt;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use reqwest::Url;
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;

pub use self::gpt::BadTable;
use self::gpt::{BASIC_DATA, Partition, ReadAt};
use super::{BlobSource, BoxFuture, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange};

/// Digits of an id that fit into the name of a partition.
const NAME: usize = 32;

/// A disk of blobs, held open. Needs a tokio runtime: it is read on its blocking threads.
#[derive(Debug)]
pub struct LocalDisk {
    file: Arc<File>,
    path: PathBuf,
    blobs: HashMap<BlobId, ByteRange>,
    /// By the first digits of their ids.
    truncated: HashMap<String, ByteRange>,
}

/// Why a disk cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BadDisk {
    #[error("cannot open {} as a disk of blobs", path.display())]
    Open {
        path: PathBuf,
        #[source]
        cause: Arc<io::Error>,
    },
    #[error("cannot use {} as a disk of blobs", path.display())]
    Table {
        path: PathBuf,
        #[source]
        cause: BadTable,
    },
    #[error("{} has blob {blob} twice", path.display())]
    Twice { path: PathBuf, blob: String },
    #[error(
        "localdisk:// is followed by the absolute path of a disk, and ?gpt=false&blob=ID where the whole of it is one blob; {0}"
    )]
    Spec(String),
}

impl LocalDisk {
    /// The disk that `localdisk:///PATH` names; with `?gpt=false&blob=ID` the whole of it is one blob.
    ///
    /// # Errors
    /// The spec is malformed, or the disk cannot be read as it says.
    pub fn new(spec: &str) -> Result<Self, BadDisk> {
        let url = Url::parse(spec).map_err(|error| BadDisk::Spec(error.to_string()))?;
        if url.host_str().is_some_and(|host| !host.is_empty()) {
            return Err(BadDisk::Spec("there is one / too few".into()));
        }
        let path = Url::parse(&format!("file://{}", url.path())).ok().and_then(|url| url.to_file_path().ok());
        let path = path.ok_or_else(|| BadDisk::Spec("this is no path".into()))?;
        let (mut table, mut blob) = (true, None);
        for (key, value) in url.query_pairs() {
            match (&*key, &*value) {
                ("gpt", "true") => table = true,
                ("gpt", "false") => table = false,
                ("blob", id) => blob = Some(id.parse().map_err(|_| BadDisk::Spec(format!("{id:?} is no blob id")))?),
                (key, _) => return Err(BadDisk::Spec(format!("{key:?} is not understood"))),
            }
        }
        match (table, blob) {
            (true, None) => Self::partitioned(&path),
            (false, Some(blob)) => Self::whole(&path, blob),
            (true, Some(_)) => Err(BadDisk::Spec("blob is only for gpt=false".into())),
            (false, None) => Err(BadDisk::Spec("gpt=false needs blob".into())),
        }
    }

    /// The disk at `path`, whose partitions are blobs.
    pub fn partitioned(path: &Path) -> Result<Self, BadDisk> {
        let (mut disk, len) = Self::open(path)?;
        let table = gpt::read(&*disk.file, len).map_err(|cause| BadDisk::Table { path: path.to_owned(), cause })?;
        let (partitions, copy) = table;
        if copy {
            tracing::warn!(disk = %path.display(), "the partition table is damaged; its copy is used");
        }
        for partition in partitions {
            disk.take(partition)?;
        }
        Ok(disk)
    }

    /// The disk at `path`, which is `blob` as a whole.
    pub fn whole(path: &Path, blob: BlobId) -> Result<Self, BadDisk> {
        let (mut disk, len) = Self::open(path)?;
        disk.blobs.insert(blob, ByteRange::new(0, len).unwrap_or_default());
        Ok(disk)
    }

    fn open(path: &Path) -> Result<(Self, u64), BadDisk> {
        let opened = || {
            // A FIFO must not make us wait for a writer.
            let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            let kind = file.metadata()?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"));
            }
            // The metadata of a device does not tell its length.
            let len = file.seek(SeekFrom::End(0))?;
            Ok((file, len))
        };
        let (file, len) = opened().map_err(|cause| BadDisk::Open { path: path.to_owned(), cause: Arc::new(cause) })?;
        let disk =
            Self { file: Arc::new(file), path: path.to_owned(), blobs: HashMap::new(), truncated: HashMap::new() };
        Ok((disk, len))
    }

    fn take(&mut self, partition: Partition) -> Result<(), BadDisk> {
        let Some(range) = ByteRange::at(partition.start, partition.len) else { return Ok(()) };
        let is_half = |name: &str| name.len() == NAME && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        let (name, twice) = if partition.kind == BASIC_DATA {
            // Most of this kind are nobody's blob.
            if !is_half(&partition.name) {
                return Ok(());
            }
            let twice = self.truncated.insert(partition.name.clone(), range).is_some();
            (partition.name, twice)
        } else {
            let name = partition.name + &partition.id.simple();
            // Other partitions, such as that of a boot loader, are nobody's blob.
            let twice = name.parse().is_ok_and(|id| self.blobs.insert(id, range).is_some());
            (name, twice)
        };
        if twice { Err(BadDisk::Twice { path: self.path.clone(), blob: name }) } else { Ok(()) }
    }

    fn find(&self, blob: &BlobId) -> Result<ByteRange, SourceError> {
        let short = || self.truncated.get(blob.as_str().get(..NAME).unwrap_or(blob.as_str()));
        let found = self.blobs.get(blob).or_else(short).copied();
        found.ok_or_else(|| SourceError::NotFound { blob: blob.clone(), place: self.describe() })
    }

    async fn read_range(&self, blob: &BlobId, stored: ByteRange, ctx: ReadCtx) -> Result<Bytes, SourceError> {
        let lies = self.find(blob)?;
        let place = self.describe();
        if stored.end() > lies.len() {
            return Err(SourceError::OutOfRange { blob: blob.clone(), place, range: stored, len: lies.len() });
        }
        let failed = |cause| SourceError::Io { blob: blob.clone(), place: self.describe(), cause: Arc::new(cause) };
        let len = usize::try_from(stored.len()).map_err(|error| failed(io::Error::other(error)))?;
        let (file, at) = (Arc::clone(&self.file), lies.start() + stored.start());
        let task = spawn_blocking(move || {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).map(|()| Bytes::from(bytes))
        });
        match timeout_at(ctx.deadline.into(), task).await {
            Ok(Ok(read)) => read.map_err(failed),
            Ok(Err(join)) => Err(failed(io::Error::other(join))),
            Err(_) => Err(SourceError::Deadline { blob: blob.clone(), place, range: stored }),
        }
    }
}

impl ReadAt for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }
}

impl BlobSource for LocalDisk {
    fn len<'a>(&'a self, blob: &'a BlobId, _ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(std::future::ready(self.find(blob).map(|lies| lies.len())))
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(self.read_range(blob, stored, ctx))
    }

    fn describe(&self) -> String {
        format!("localdisk://{}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::base::Class;

    /// Two halves of an id, all digits different enough to show an order that is wrong.
    const NAME_PART: &str = "be7d77eeb719f70884758d1aa800ed0f";
    const GUID_PART: &str = "b09d701aaec469964e9d54325f0d5fef";

    fn soon() -> ReadCtx {
        ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60))
    }

    fn id() -> BlobId {
        format!("{NAME_PART}{GUID_PART}").parse().unwrap()
    }

    /// `GUID_PART` as it lies on disk.
    fn guid() -> [u8; 16] {
        let byte = |at: usize| u8::from_str_radix(&GUID_PART[2 * at..2 * at + 2], 16).unwrap();
        [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map(byte)
    }

    async fn check(disk: &LocalDisk, blob: &BlobId, len: u64, first: &[u8]) {
        assert_eq!(disk.len(blob, soon()).await.unwrap(), len);
        let bytes = disk.read(blob, ByteRange::new(0, first.len() as u64).unwrap(), soon()).await.unwrap();
        assert_eq!(bytes, first);
        let error = disk.read(blob, ByteRange::new(len - 1, len + 1).unwrap(), soon()).await.unwrap_err();
        assert!(matches!(error, SourceError::OutOfRange { .. }), "{error:?}");
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[tokio::test]
    async fn blobs_are_found_by_both_parts_of_their_ids_and_by_the_older_form() {
        let older: BlobId = format!("{}{}", "a".repeat(32), "5".repeat(32)).parse().unwrap();
        let mut bytes = gpt::tests::disk(
            512,
            &[
                ([7; 16], guid(), 4, 5, NAME_PART),
                (BASIC_DATA.0, [1; 16], 6, 6, &"a".repeat(32)),
                ([6; 16], [2; 16], 7, 7, "EFI system partition"),
            ],
        );
        bytes[4 * 512..4 * 512 + 5].copy_from_slice(b"hello");
        bytes[6 * 512..6 * 512 + 5].copy_from_slice(b"older");
        let file = file(&bytes);
        let disk = LocalDisk::new(&format!("localdisk://{}", file.path().display())).unwrap();

        check(&disk, &id(), 1024, b"hello").await;
        check(&disk, &older, 512, b"older").await;
        let other = format!("{NAME_PART}{}", "0".repeat(32)).parse().unwrap();
        assert!(matches!(disk.len(&other, soon()).await, Err(SourceError::NotFound { .. })));
    }

    #[tokio::test]
    async fn a_disk_that_sgdisk_made_is_understood() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let unique = format!(
            "{}-{}-{}-{}-{}",
            &GUID_PART[..8],
            &GUID_PART[8..12],
            &GUID_PART[12..16],
            &GUID_PART[16..20],
            &GUID_PART[20..]
        );
        let made = Command::new("sgdisk")
            .args(["--new=1:2048:4095", "--typecode=1:8300"])
            .args([format!("--change-name=1:{NAME_PART}"), format!("--partition-guid=1:{unique}")])
            .arg(file.path())
            .output();
        let Ok(made) = made else {
            eprintln!("skipped: sgdisk is not installed (Debian's package gdisk)");
            return;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
        file.as_file().write_all_at(b"hello", 2048 * 512).unwrap();

        let disk = LocalDisk::partitioned(file.path()).unwrap();
        check(&disk, &id(), 1 << 20, b"hello").await;

        // The first table is gone; sgdisk's copy is at the end.
        file.as_file().write_all_at(&[0; 33 * 512], 512).unwrap();
        check(&LocalDisk::partitioned(file.path()).unwrap(), &id(), 1 << 20, b"hello").await;
    }

    #[tokio::test]
    async fn a_whole_disk_may_be_one_blob() {
        let file = file(b"hello world");
        let disk = LocalDisk::new(&format!("localdisk://{}?gpt=false&blob=x", file.path().display())).unwrap();

        check(&disk, &"x".parse().unwrap(), 11, b"hello").await;
        assert!(disk.len(&"y".parse().unwrap(), soon()).await.is_err());
    }

    #[test]
    fn specs_and_disks_that_are_of_no_use_say_why() {
        let empty = file(b"");
        let told = |spec: &str| crate::base::Chain(&LocalDisk::new(spec).unwrap_err()).to_string();
        for (spec, end) in [
            ("localdisk://dev/sda".to_owned(), "there is one / too few"),
            ("localdisk:///x?gpt=false".to_owned(), "gpt=false needs blob"),
            ("localdisk:///x?blob=a".to_owned(), "blob is only for gpt=false"),
            ("localdisk:///x?gpt=false&blob=a/b".to_owned(), "\"a/b\" is no blob id"),
            ("localdisk:///x?disable_gpt=true".to_owned(), "\"disable_gpt\" is not understood"),
            (
                "localdisk:///nonexistent".to_owned(),
                "cannot open /nonexistent as a disk of blobs: No such file or directory (os error 2)",
            ),
            ("localdisk:///tmp".to_owned(), "neither a regular file nor a block device"),
            (format!("localdisk://{}", empty.path().display()), "it has no partition table"),
        ] {
            let told = told(&spec);
            assert!(told.ends_with(end), "{spec}: {told}");
        }
    }

    #[test]
    fn two_partitions_of_one_blob_are_refused() {
        let row = ([7; 16], guid(), 4, 5, NAME_PART);
        let file = file(&gpt::tests::disk(512, &[row, row]));

        let error = LocalDisk::partitioned(file.path()).unwrap_err();

        assert!(matches!(error, BadDisk::Twice { .. }), "{error}");
    }
}
