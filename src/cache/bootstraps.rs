//! Copies of bootstraps, each under its digest.
//!
//! To the cache they are opaque files that are complete and never written again, so that nobody
//! can change one while a kernel has it mounted. Whoever needs one keeps it; what nobody keeps and
//! nobody has open may go, for it can be copied again from where it was named.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Disk, FileFacts, HostDisk};
use super::shelves::StockError;
use super::store::{StoreError, at};
use super::victims::{Lot, LotKind};
use crate::base::Digest;
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::codec::{Sha256, sha256};

/// The directory of bootstraps of one store.
#[derive(Debug)]
pub struct Bootstraps {
    dir: PathBuf,
    /// Those that somebody keeps.
    kept: Mutex<HashMap<Digest, Owners>>,
    asking: Mutex<()>,
    scratch: AtomicU64,
}

/// Who keeps a copy.
#[derive(Debug, Default)]
struct Owners {
    count: usize,
    /// It was made for one of them, and none has come to anything yet.
    is_new: bool,
    /// It is new, and one of them came to nothing: it goes with the last.
    is_given_up: bool,
}

/// A bootstrap that stays where it is while this lives.
#[derive(Debug)]
pub struct KeptBootstrap {
    owner: Arc<Bootstraps>,
    digest: Digest,
    path: PathBuf,
}

/// How the name of a note ends that says which bootstrap was made of something: the digest of that
/// comes before it, the digest of the bootstrap is in it.
const MADE: &str = ".made";

impl KeptBootstrap {
    /// SHA-256 of the bootstrap, which is its name.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Where it lies: complete, and never written again.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns when it is on stable storage: a kernel must not have it mounted before, for it could lose pages that the
    /// disk refuses.
    pub fn sync(&self) -> Result<(), StoreError> {
        File::open(&self.path).and_then(|file| file.sync_data()).map_err(at(&self.path))
    }

    /// The same once more.
    #[must_use]
    pub fn again(&self) -> Self {
        self.owner.keep_known(self.digest)
    }

    /// Notes that what it is kept for has come to something: the copy stays when nobody keeps it any more.
    pub fn settle(&self) {
        if let Some(owners) = self.owner.kept.lock().unwrap().get_mut(&self.digest) {
            (owners.is_new, owners.is_given_up) = (false, false);
        }
    }

    /// Notes that what it was kept for has come to nothing. If that is so for all who keep it, and it was made for
    /// one of them, it goes with the last.
    pub fn give_up(self) {
        if let Some(owners) = self.owner.kept.lock().unwrap().get_mut(&self.digest) {
            owners.is_given_up = owners.is_new;
        }
    }
}

/// One copy of a bootstrap as it was when it was seen to be sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapStamp {
    digest: Digest,
    facts: FileFacts,
}

impl KeptBootstrap {
    /// What tells the copy, as it is now, from one that somebody changed.
    pub fn stamp(&self) -> io::Result<BootstrapStamp> {
        let meta = fs::symlink_metadata(&self.path)?;
        Ok(BootstrapStamp { digest: self.digest, facts: FileFacts::from(meta) })
    }
}

impl Drop for KeptBootstrap {
    fn drop(&mut self) {
        let mut kept = self.owner.kept.lock().unwrap();
        let mut is_given_up = false;
        if let Some(owners) = kept.get_mut(&self.digest) {
            owners.count -= 1;
            if owners.count == 0 {
                is_given_up = owners.is_given_up;
                kept.remove(&self.digest);
            }
        }
        drop(kept);
        if !is_given_up {
            note_use(&self.path);
        } else if let Err(error) = self.owner.remove(&self.digest.to_string()) {
            tracing::warn!(%error, "the copy of a bootstrap that nobody needs stays until the next gc");
        }
    }
}

impl Bootstraps {
    pub(super) fn new(dir: PathBuf) -> Arc<Self> {
        Arc::new(Self { dir, kept: Mutex::default(), asking: Mutex::default(), scratch: AtomicU64::new(0) })
    }

    /// The directory they lie in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps a copy of `bytes`, made now unless there is a sound one. Not on stable storage before
    /// [`KeptBootstrap::sync`].
    pub fn keep(self: &Arc<Self>, bytes: &[u8]) -> Result<KeptBootstrap, StoreError> {
        match self.keep_sound(sha256(bytes)) {
            Ok(kept) => Ok(kept),
            Err(kept) => self.fill(kept, self.write(bytes)?),
        }
    }

    /// Keeps a copy of all of `file`, which is at `path`, as [`Bootstraps::keep`] does. No more of it is in memory at a time
    /// than a piece.
    ///
    /// # Errors
    /// `Io` with the path of whichever file fails.
    pub fn keep_file(self: &Arc<Self>, file: &File, path: &Path) -> Result<KeptBootstrap, StoreError> {
        let len = file.metadata().map_err(at(path))?.len();
        // Where it may be there already, that is found out first, and nothing is written.
        if self.has_of_len(len)
            && let Ok(kept) = self.keep_sound(read_through(file, path, |_| Ok(()))?)
        {
            return Ok(kept);
        }
        let mut scratch = self.scratch()?;
        let digest = read_through(file, path, |piece| scratch.write(piece))?;
        self.keep_sound(digest).or_else(|kept| self.fill(kept, scratch))
    }

    /// Whether there is any file of so many bytes.
    fn has_of_len(&self, len: u64) -> bool {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).any(|meta| meta.len() == len)
    }

    /// Keeps the copy with this digest, which is used only if it is still what its name says. If it is not, or not there,
    /// gives back what is to be filled.
    fn keep_sound(self: &Arc<Self>, digest: Digest) -> Result<KeptBootstrap, KeptBootstrap> {
        // Kept before it is looked for: from here on nobody removes it.
        let kept = self.keep_known(digest);
        let there = File::open(&kept.path).map_err(at(&kept.path));
        let there = there.and_then(|file| read_through(&file, &kept.path, |_| Ok(())));
        if there.is_ok_and(|there| there == digest) {
            note_use(&kept.path);
            return Ok(kept);
        }
        Err(kept)
    }

    fn fill(&self, kept: KeptBootstrap, scratch: Scratch) -> Result<KeptBootstrap, StoreError> {
        scratch.rename(&kept.path)?;
        self.kept.lock().unwrap().entry(kept.digest).or_default().is_new = true;
        Ok(kept)
    }

    /// Keeps the copy that `stamp` was taken of, unless it has gone or was changed since.
    pub fn keep_unchanged(self: &Arc<Self>, stamp: &BootstrapStamp) -> Option<KeptBootstrap> {
        let kept = self.keep_known(stamp.digest);
        (kept.stamp().ok()? == *stamp).then_some(kept)
    }

    /// Keeps a copy of what `make` makes of something that has the digest `source`. It is asked only if
    /// what it made before is not there any more. Waits for the disk.
    ///
    /// # Errors
    /// What `make` says, or the store.
    pub fn keep_made<E: From<StoreError>>(
        self: &Arc<Self>,
        source: Digest,
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<KeptBootstrap, E> {
        let note = self.dir.join(format!("{source}{MADE}"));
        let made = fs::read_to_string(&note).ok().and_then(|text| Digest::from_hex(text.trim_end()));
        if let Some(digest) = made
            && let Ok(kept) = self.keep_sound(digest)
        {
            return Ok(kept);
        }
        let kept = self.keep(&make()?)?;
        let noted = self.write(format!("{}\n", kept.digest).as_bytes()).and_then(|scratch| scratch.rename(&note));
        if let Err(error) = noted {
            kept.give_up();
            return Err(error.into());
        }
        Ok(kept)
    }

    /// Removes the notes of what bootstrap `digest` was made from.
    fn forget_made(&self, digest: Digest) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let is_note = entry.file_name().as_encoded_bytes().ends_with(MADE.as_bytes());
            let names = |text: String| Digest::from_hex(text.trim_end()) == Some(digest);
            if is_note && fs::read_to_string(entry.path()).is_ok_and(names) {
                // One that stays leads to nothing, and is written anew.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Keeps the copy with this digest, which a predecessor made and nobody looks at again.
    pub fn keep_known(self: &Arc<Self>, digest: Digest) -> KeptBootstrap {
        self.kept.lock().unwrap().entry(digest).or_default().count += 1;
        KeptBootstrap { owner: Arc::clone(self), digest, path: self.dir.join(digest.to_string()) }
    }

    fn write(&self, bytes: &[u8]) -> Result<Scratch, StoreError> {
        let mut scratch = self.scratch()?;
        scratch.write(bytes)?;
        Ok(scratch)
    }

    fn scratch(&self) -> Result<Scratch, StoreError> {
        let dir = &self.dir;
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
        let number = self.scratch.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".new-{}-{number}", std::process::id()));
        let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        Ok(Scratch { file: open.map_err(at(&path))?, path })
    }

    fn is_held(&self, kept: &HashMap<Digest, Owners>, digest: Digest) -> bool {
        kept.contains_key(&digest)
            || super::shelves::is_open(&self.asking, || HostDisk.is_open(&self.dir.join(digest.to_string())))
    }

    /// All of them, as what takes room.
    pub(super) fn lots(&self) -> Vec<Lot> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let lot = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let digest = Digest::from_hex(&name)?;
            let meta = entry.metadata().ok()?;
            let held = self.is_held(&self.kept.lock().unwrap(), digest);
            let last_used = fs::metadata(used(&entry.path())).map_or(meta.mtime(), |used| used.mtime());
            let last_used = u64::try_from(last_used).unwrap_or(0);
            Some(Lot { name, kind: LotKind::Bootstrap, bytes: meta.blocks() * 512, last_used, held })
        };
        entries.filter_map(lot).collect()
    }

    /// Whether there is a copy with this name.
    pub(super) fn has(&self, name: &str) -> bool {
        Digest::from_hex(name).is_some_and(|digest| fs::metadata(self.dir.join(digest.to_string())).is_ok())
    }

    /// The one copy whose name begins with `text`.
    pub fn find(&self, text: &str) -> Result<String, StockError> {
        let names = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let mut begin = names.filter(|name| Digest::from_hex(name).is_some() && name.starts_with(text));
        match (begin.next().filter(|_| !text.is_empty()), begin.next()) {
            (Some(name), None) => Ok(name),
            (Some(_), Some(_)) => Err(StockError::Ambiguous(text.to_owned())),
            (None, _) => Err(StockError::Unknown(text.to_owned())),
        }
    }

    /// Removes one that nobody keeps; tells whether it did.
    pub(super) fn remove(&self, name: &str) -> Result<bool, StoreError> {
        let Some(digest) = Digest::from_hex(name) else { return Ok(false) };
        let kept = self.kept.lock().unwrap();
        if self.is_held(&kept, digest) {
            return Ok(false);
        }
        let path = self.dir.join(digest.to_string());
        match fs::remove_file(&path) {
            Ok(()) => {
                // One that stays is a date and nothing else.
                let _ = fs::remove_file(used(&path));
                let _ = fs::remove_file(verified(&path));
                self.forget_made(digest);
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(cause) => Err(at(&path)(cause)),
        }
    }
}

/// The empty file whose time of change is when a copy was last used. The copy itself is left as it is, so that
/// every change of it shows.
fn used(path: &Path) -> PathBuf {
    path.with_extension("used")
}

/// The empty file whose time of change is when a copy was last verified.
pub(super) fn verified(path: &Path) -> PathBuf {
    path.with_extension("verified")
}

/// Notes that a copy is used, if it is there.
fn note_use(path: &Path) {
    if path.exists() {
        super::shelves::stamp(&used(path));
    }
}

/// SHA-256 of all of a file, which is at `path`. Each piece of it is given to `take` as well.
fn read_through(
    file: &File,
    path: &Path,
    mut take: impl FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<Digest, StoreError> {
    let (mut hasher, mut buffer, mut from) = (Sha256::new(), vec![0; 1 << 18], 0);
    loop {
        let len = match file.read_at(&mut buffer, from) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(len) => len,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
            Err(cause) => return Err(at(path)(cause)),
        };
        hasher.update(&buffer[..len]);
        take(&buffer[..len])?;
        from += len as u64;
    }
}

/// A file that has no name yet which anybody looks for; it goes if it never gets one.
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(at(&self.path))
    }

    fn rename(self, to: &Path) -> Result<(), StoreError> {
        fs::rename(&self.path, to).map_err(at(to))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Gone already when it was renamed.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_made_again_only_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let bootstraps = Bootstraps::new(dir.path().join("bootstraps"));
        let (source, another) = (Digest([1; 32]), Digest([2; 32]));
        let keep = |source, made: &[u8]| {
            let mut asked = false;
            let kept = bootstraps.keep_made(source, || {
                asked = true;
                Ok::<_, StoreError>(made.to_vec())
            });
            (fs::read(kept.unwrap().path()).unwrap(), asked)
        };
        let made = |text: &[u8], asked| (text.to_vec(), asked);
        assert_eq!(keep(source, b"one"), made(b"one", true));
        assert_eq!(keep(source, b"lost"), made(b"one", false));
        assert_eq!(keep(another, b"two"), made(b"two", true));

        // One that was spoilt, and one that went.
        let path = |text: &[u8]| bootstraps.dir().join(sha256(text).to_string());
        fs::write(path(b"one"), b"spoilt").unwrap();
        assert_eq!(keep(source, b"one"), made(b"one", true));
        assert!(bootstraps.remove(&sha256(b"one").to_string()).unwrap());
        let names: Vec<_> = fs::read_dir(bootstraps.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let notes = names.iter().filter(|name| name.as_encoded_bytes().ends_with(b".made"));
        assert_eq!((notes.count(), names.len()), (1, 3), "the notes went with it: {names:?}");
        assert_eq!(keep(source, b"new"), made(b"new", true));
        fs::write(bootstraps.dir().join(format!("{another}{MADE}")), "nonsense").unwrap();
        assert_eq!(keep(another, b"two"), made(b"two", true));
        assert_eq!(keep(another, b""), made(b"two", false));
        assert_eq!(bootstraps.lots().len(), 2, "notes are nothing that can go alone");
    }

    #[test]
    fn a_file_is_copied_as_its_bytes_are() {
        let dir = tempfile::tempdir().unwrap();
        let bootstraps = Bootstraps::new(dir.path().join("bootstraps"));
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0u32..300_000).flat_map(u32::to_le_bytes).collect();
        fs::write(&path, &bytes).unwrap();
        let keep = |file: File| bootstraps.keep_file(&file, &path).unwrap();
        let kept = keep(File::open(&path).unwrap());
        assert_eq!((kept.digest(), fs::read(kept.path()).unwrap() == bytes), (sha256(&bytes), true));

        let inode = || fs::metadata(kept.path()).unwrap().ino();
        let first = inode();
        assert_eq!(keep(File::open(&path).unwrap()).digest(), kept.digest());
        assert_eq!(bootstraps.keep(&bytes).unwrap().digest(), kept.digest());
        assert_eq!(inode(), first, "it was there");
        fs::write(kept.path(), &bytes[1..]).unwrap();
        keep(File::open(&path).unwrap());
        assert_eq!(fs::read(kept.path()).unwrap(), bytes, "another length is another file");
        fs::write(kept.path(), [&bytes[1..], &[0]].concat()).unwrap();
        keep(File::open(&path).unwrap()).sync().unwrap();
        assert_eq!(fs::read(kept.path()).unwrap(), bytes, "other bytes of the same length are");

        let unreadable = File::options().write(true).open(&path).unwrap();
        let error = bootstraps.keep_file(&unreadable, &path).unwrap_err();
        assert!(matches!(&error, StoreError::Io { path: at, .. } if *at == path), "{error:?}");
        let names = fs::read_dir(bootstraps.dir()).unwrap().map(|entry| entry.unwrap().file_name());
        let names: Vec<_> = names.filter(|name| name.as_encoded_bytes().starts_with(b".")).collect();
        assert!(names.is_empty(), "{names:?}");
    }

    #[test]
    fn what_is_kept_stays_and_a_spoilt_copy_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let bootstraps = Bootstraps::new(dir.path().join("bootstraps"));
        let first = bootstraps.keep(b"a bootstrap").unwrap();
        let second = bootstraps.keep(b"a bootstrap").unwrap();
        let (name, path, stamp) = (first.digest().to_string(), first.path().to_owned(), first.stamp().unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"a bootstrap");

        for kept in [first, second] {
            assert!(!bootstraps.remove(&name).unwrap(), "somebody keeps it");
            assert!(bootstraps.lots()[0].held);
            drop(kept);
        }
        fs::write(&path, b"another thing").unwrap();
        drop(bootstraps.keep(b"a bootstrap").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"a bootstrap");
        assert!(!bootstraps.lots()[0].held);

        let again = bootstraps.keep_unchanged(&stamp).map(|kept| kept.stamp().unwrap());
        assert_eq!(again, None, "it was made anew");
        let stamp = bootstraps.keep(b"a bootstrap").unwrap().stamp().unwrap();
        assert_eq!(bootstraps.keep_unchanged(&stamp).unwrap().stamp().unwrap(), stamp);
        assert!(bootstraps.remove(&name).unwrap());
        assert!(bootstraps.keep_unchanged(&stamp).is_none() && !bootstraps.lots().iter().any(|lot| lot.held));
        assert!(!path.exists());
        assert!(!bootstraps.remove(&name).unwrap() && !bootstraps.remove("../lock").unwrap());
        assert_eq!(bootstraps.lots(), []);
    }

    #[test]
    fn what_was_made_for_nothing_goes_with_the_last_who_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let bootstraps = Bootstraps::new(dir.path().join("bootstraps"));
        let keep = || bootstraps.keep_made(Digest([1; 32]), || Ok::<_, StoreError>(b"a bootstrap".to_vec())).unwrap();
        let is_there = || fs::read_dir(bootstraps.dir()).unwrap().next().is_some();
        let (first, second) = (keep(), keep());
        first.give_up();
        assert!(is_there(), "somebody keeps it");
        second.give_up();
        assert!(!is_there(), "notes included");

        let (first, second) = (keep(), keep());
        first.again().settle();
        second.give_up();
        drop(first);
        assert!(is_there(), "it was good for something");
        keep().give_up();
        assert!(is_there(), "it was there before");
    }
}
