//! What a successor must know of an image that is served: one small file each, in the run directory.
//!
//! Written before anybody can see the mount, taken away when its superblock is gone. Not synced:
//! the mounts do not outlive the machine either. Of a record that a newer release wrote only the
//! version is believed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::api::ImageSpec;
use super::blobfs::Shown;
use crate::export::fuse::Lasting;
use crate::export::{BackendKind, WatchId};
use crate::sys::files::InodeId;

/// The newest version. A change that an older release would misread raises it; every version that
/// was ever released is read, and each record is written as the oldest that can say what is in it.
const VERSION: u32 = 3;

/// One served image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Mount point; `None` for an image that is only registered.
    pub(super) dir: Option<PathBuf>,
    /// The superblock, as the inotify instance in the keepers' hands knows it.
    pub(super) superblock: Option<Superblock>,
    /// It was unmounted, and something keeps the superblock alive.
    #[serde(default)]
    pub(super) lingering: bool,
    pub(super) backend: BackendKind,
    pub(super) why: String,
    pub(super) spec: ImageSpec,
    /// SHA-256 of the bootstrap, which names our copy.
    pub(super) key: String,
    /// Its devices in the order of the image; for fanotify.
    #[serde(default)]
    pub(super) devices: Vec<DeviceFile>,
    /// Its name in the kernel's cache; for cachefiles.
    #[serde(default)]
    pub(super) name: Option<CacheName>,
    /// Its connection, which the keepers have; for FUSE.
    #[serde(default)]
    pub(super) fuse: Option<Lasting>,
    /// For each device, whether the kernel reads its file without asking, as decided when it was mounted; for
    /// devices over FUSE.
    #[serde(default)]
    pub(super) straight: Vec<bool>,
    /// SHA-256 of the manifest that the reference led to; for images of registries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) manifest: Option<String>,
    /// The directory that is shown with the image's blobs in it; for blobfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) blobfs: Option<Shown>,
}

impl Record {
    /// The oldest version that has words for it: 2 is what knows references and several places of blobs, 3
    /// directories with blobs in them.
    fn version(&self) -> u32 {
        match &self.blobfs {
            Some(_) => 3,
            None if self.spec.is_new() => 2,
            None => 1,
        }
    }
}

/// A superblock in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Superblock {
    watch: i32,
    major: u32,
    minor: u32,
}

/// A device of the store in a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DeviceFile {
    /// Name of its directory.
    pub(super) directory: String,
    /// `st_dev` and `st_ino` of its file, by which the keepers know it.
    device: u64,
    inode: u64,
}

impl DeviceFile {
    pub(super) fn new(directory: String, file: InodeId) -> Self {
        Self { directory, device: file.device(), inode: file.inode() }
    }

    pub(super) fn file(&self) -> InodeId {
        InodeId::new(self.device, self.inode)
    }
}

/// A name of the cachefiles backend in a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CacheName {
    pub(super) id: String,
    pub(super) domain: Option<String>,
}

impl From<WatchId> for Superblock {
    fn from(watch: WatchId) -> Self {
        Self { watch: watch.number, major: watch.device.0, minor: watch.device.1 }
    }
}

impl From<Superblock> for WatchId {
    fn from(superblock: Superblock) -> Self {
        Self { number: superblock.watch, device: (superblock.major, superblock.minor) }
    }
}

/// Names a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RecordId(u64);

impl RecordId {
    /// Its number, by which the keepers know what belongs to it.
    pub(super) fn number(self) -> u64 {
        self.0
    }
}

/// The file around a record.
#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    record: T,
}

/// All records of one daemon.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
    next: AtomicU64,
}

impl Records {
    /// Records below `run`.
    pub(super) fn open(run: &Path) -> io::Result<Self> {
        let dir = run.join("served");
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let ids = entries(&dir)?.into_iter().map(|(RecordId(id), _)| id);
        remove_unfinished(&dir);
        let next = AtomicU64::new(ids.max().map_or(1, |highest| highest.saturating_add(1)));
        Ok(Self { dir, next })
    }

    /// Every record that can be read, and what is wrong with the others.
    pub(super) fn load(&self) -> io::Result<Vec<(RecordId, io::Result<Record>)>> {
        Ok(entries(&self.dir)?.into_iter().map(|(id, path)| (id, read(&path))).collect())
    }

    /// A name for a record to be written.
    pub(super) fn reserve(&self) -> RecordId {
        RecordId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Writes a record, in place of an older one of that name.
    pub(super) fn write(&self, id: RecordId, record: &Record) -> io::Result<()> {
        let (path, new) = (self.path(id), self.dir.join(format!(".{}{UNFINISHED}", id.0)));
        let bytes = serde_json::to_vec(&Envelope { version: record.version(), record })?;
        let put = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&bytes)?;
            fs::rename(&new, &path)
        };
        put().inspect_err(|_| drop(fs::remove_file(&new)))
    }

    /// Writes a record anew with a change.
    pub(super) fn change(&self, id: RecordId, change: impl FnOnce(Record) -> Record) -> io::Result<()> {
        self.write(id, &change(read(&self.path(id))?))
    }

    /// Takes away what cannot be read, once nothing lives that it could be about.
    pub(super) fn remove_unreadable(&self) {
        for (id, record) in self.load().unwrap_or_default() {
            // One that could not be looked at is another matter.
            let makes_no_sense = |kind| {
                matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::Unsupported)
            };
            if let Err(error) = record
                && makes_no_sense(error.kind())
            {
                tracing::warn!(%error, "the record of an image could not be read, and is about nothing any more");
                self.remove(id);
            }
        }
    }

    /// Takes a record away.
    pub(super) fn remove(&self, id: RecordId) {
        if let Err(error) = fs::remove_file(self.path(id))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path(id).display(), "cannot remove the record of an image");
        }
    }

    fn path(&self, id: RecordId) -> PathBuf {
        self.dir.join(format!("{}.json", id.0))
    }
}

/// Files of records, in the order in which they were made.
fn entries(dir: &Path) -> io::Result<Vec<(RecordId, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        if let Some(id) = stem.filter(|_| path.extension().is_some_and(|it| it == "json")) {
            found.push((RecordId(id), path));
        }
    }
    found.sort();
    Ok(found)
}

/// How the name of a record ends while it is being written.
const UNFINISHED: &str = ".new";

/// Removes what a daemon was killed over. Whoever opens the records is the only one.
fn remove_unfinished(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") && name.as_encoded_bytes().ends_with(UNFINISHED.as_bytes()) {
            // One that stays is never read, and written over.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn read(path: &Path) -> io::Result<Record> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let bytes = fs::read(path)?;
    let Version { version } = serde_json::from_slice(&bytes)?;
    if !(1..=VERSION).contains(&version) {
        let what = format!("{} has version {version}, of a newer release", path.display());
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    Ok(serde_json::from_slice::<Envelope<Record>>(&bytes)?.record)
}

/// Makes sure that nobody else can look into the directory that records and sockets lie in.
pub(super) fn ensure_private(run: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let meta = File::open(run)?.metadata()?;
    if meta.permissions().mode() & 0o077 != 0 {
        fs::set_permissions(run, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::PrefetchOrder;

    fn record() -> Record {
        Record {
            dir: Some("/mnt".into()),
            superblock: Some(Superblock { watch: 3, major: 0, minor: 40 }),
            lingering: false,
            backend: BackendKind::Fanotify,
            why: "asked for".to_owned(),
            spec: serde_json::from_str(r#"{"bootstrap": "/b", "blobs": "/blobs"}"#).unwrap(),
            key: "00".repeat(32),
            devices: vec![DeviceFile::new("ab".to_owned(), InodeId::new(1, 2))],
            name: None,
            fuse: None,
            straight: Vec::new(),
            manifest: None,
            blobfs: None,
        }
    }

    #[test]
    fn records_are_read_as_they_were_written_in_the_order_they_were_made() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let ids: Vec<_> = (0..12).map(|_| records.reserve()).collect();
        for id in &ids {
            records.write(*id, &Record { lingering: id.0 % 2 == 0, ..record() }).unwrap();
        }
        records.remove(ids[3]);

        let again = Records::open(dir.path()).unwrap();

        let loaded = again.load().unwrap();
        let names: Vec<_> = loaded.iter().map(|(id, _)| *id).collect();
        assert_eq!(names, ids.iter().copied().filter(|id| *id != ids[3]).collect::<Vec<_>>());
        assert!(loaded.iter().all(|(id, it)| it.as_ref().unwrap().lingering == (id.0 % 2 == 0)));
        assert!(again.reserve() > *ids.last().unwrap());
    }

    #[test]
    fn newer_and_damaged_records_are_told_and_do_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let id = records.reserve();
        records.write(id, &record()).unwrap();
        fs::write(dir.path().join("served/8.json"), br#"{"version": 4, "record": {"anything": 1}}"#).unwrap();
        fs::write(dir.path().join("served/9.json"), b"{").unwrap();

        let loaded = records.load().unwrap();

        assert_eq!(loaded[0].1.as_ref().unwrap(), &record());
        assert_eq!(loaded[1].1.as_ref().unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert!(loaded[2].1.is_err() && loaded.len() == 3);
    }

    #[test]
    fn what_is_about_nothing_and_what_was_never_finished_goes() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        records.write(records.reserve(), &record()).unwrap();
        for name in ["7.json", ".8.new"] {
            fs::write(dir.path().join("served").join(name), b"{").unwrap();
        }

        let records = Records::open(dir.path()).unwrap();
        records.remove_unreadable();

        let names: Vec<_> =
            fs::read_dir(dir.path().join("served")).unwrap().map(|it| it.unwrap().file_name()).collect();
        assert_eq!(names, ["1.json"]);
    }

    /// Written by the first release that had records. Add one for each version, change none.
    #[test]
    fn the_first_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let text = br#"{"version":1,"record":{"dir":"/mnt","superblock":{"watch":3,"major":0,"minor":40},
            "lingering":false,"backend":"fanotify","why":"asked for","spec":{"bootstrap":"/b","blobs":"/blobs",
            "ca":null,"prefetch":false},"key":"0000000000000000000000000000000000000000000000000000000000000000",
            "devices":[{"directory":"ab","device":1,"inode":2}],"name":null}}"#;
        fs::write(dir.path().join("served/1.json"), text).unwrap();
        let mut expected = record();
        expected.spec.prefetch = PrefetchOrder::None;
        assert_eq!(records.load().unwrap()[0].1.as_ref().unwrap(), &expected);
    }

    /// The same for the second, which knows registries. What the first can say is still written as the first.
    #[test]
    fn the_second_version_is_read_and_written_only_where_it_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let text = br#"{"version":2,"record":{"dir":"/mnt","superblock":{"watch":3,"major":0,"minor":40},
            "lingering":false,"backend":"fanotify","why":"asked for","spec":{"reference":"docker://r.example/a:1",
            "platform":"linux/arm64","offline":true,"blobs":["/one","/two"],"ca":null,"prefetch":"none"},
            "key":"0000000000000000000000000000000000000000000000000000000000000000",
            "devices":[{"directory":"ab","device":1,"inode":2}],"name":null,"manifest":"11"}}"#;
        fs::write(dir.path().join("served/1.json"), text).unwrap();
        let mut expected = record();
        expected.manifest = Some("11".to_owned());
        expected.spec = serde_json::from_str(
            r#"{"reference": "docker://r.example/a:1", "platform": "linux/arm64", "offline": true,
                "blobs": ["/one", "/two"], "prefetch": "none"}"#,
        )
        .unwrap();
        assert_eq!(records.load().unwrap()[0].1.as_ref().unwrap(), &expected);

        let version = |id: RecordId| {
            let text = fs::read_to_string(records.path(id)).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["version"].as_u64()
        };
        let ids = [record(), expected].map(|record| {
            let id = records.reserve();
            records.write(id, &record).unwrap();
            id
        });
        assert_eq!(ids.map(version), [Some(1), Some(2)]);
    }
}
