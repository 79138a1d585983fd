use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;

use super::{BlobSource, BoxFuture, OpenError, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange};

/// Files kept open between reads. An image has a few blobs; a host has a few images.
const OPEN_FILES: usize = 32;

/// A directory of blobs, each a file named by its id.
///
/// Blobs never change, so a file stays open after a read, up to a small number of files. Needs a
/// tokio runtime: the disk is read on its blocking threads.
#[derive(Debug)]
pub struct LocalSource {
    dir: PathBuf,
    open: Arc<Mutex<OpenFiles>>,
}

impl LocalSource {
    /// A source for the blobs in `dir`.
    ///
    /// # Errors
    /// [`OpenError::Directory`] if `dir` is not a directory that can be looked into.
    pub fn new(dir: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let dir = dir.into();
        let checked = std::fs::metadata(&dir)
            .and_then(|metadata| if metadata.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) });
        match checked {
            Ok(()) => Ok(Self { dir, open: Arc::default() }),
            Err(cause) => Err(OpenError::Directory { dir, cause: Arc::new(cause) }),
        }
    }

    /// Runs `work` on the blob's file and its length, away from the runtime's own threads.
    async fn with_file<T: Send + 'static>(
        &self,
        blob: &BlobId,
        range: ByteRange,
        ctx: ReadCtx,
        work: impl FnOnce(&File, u64) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, SourceError> {
        let (open, path, id) = (Arc::clone(&self.open), self.dir.join(blob.as_str()), blob.clone());
        let task = spawn_blocking(move || {
            let file = OpenFiles::get(&open, id, path)?;
            let len = file.metadata()?.len();
            work(&file, len)
        });
        match timeout_at(ctx.deadline.into(), task).await {
            Ok(Ok(result)) => result.map_err(|failure| self.error(blob, range, failure)),
            Ok(Err(join)) => Err(self.error(blob, range, Failure::Io(io::Error::other(join)))),
            Err(_) => Err(SourceError::Deadline { blob: blob.clone(), place: self.describe(), range }),
        }
    }

    fn error(&self, blob: &BlobId, range: ByteRange, failure: Failure) -> SourceError {
        let (blob, place) = (blob.clone(), self.describe());
        match failure {
            Failure::TooShort(len) => SourceError::OutOfRange { blob, place, range, len },
            Failure::Io(cause) if cause.kind() == io::ErrorKind::NotFound => SourceError::NotFound { blob, place },
            Failure::Io(cause) => SourceError::Io { blob, place, cause: Arc::new(cause) },
        }
    }
}

impl BlobSource for LocalSource {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(self.with_file(blob, ByteRange::default(), ctx, |_, len| Ok(len)))
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(self.with_file(blob, stored, ctx, move |file, len| {
            // Before the buffer is made, so that its size is bounded by a file that exists.
            if stored.end() > len {
                return Err(Failure::TooShort(len));
            }
            let mut bytes = vec![0; usize::try_from(stored.len()).map_err(io::Error::other)?];
            file.read_exact_at(&mut bytes, stored.start())?;
            Ok(Bytes::from(bytes))
        }))
    }

    fn describe(&self) -> String {
        self.dir.display().to_string()
    }
}

/// Why a file could not be read, before anyone has put names to it.
enum Failure {
    TooShort(u64),
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The files used last, most recent at the end.
#[derive(Debug, Default)]
struct OpenFiles(Vec<(BlobId, Arc<File>)>);

impl OpenFiles {
    /// The open file of `blob`, opened at `path` if need be. The lock is not held meanwhile.
    fn get(files: &Mutex<Self>, blob: BlobId, path: PathBuf) -> io::Result<Arc<File>> {
        if let Some(file) = files.lock().unwrap().recall(&blob) {
            return Ok(file);
        }
        // A FIFO of that name must not make a blocking thread wait for a writer for ever.
        let file = Arc::new(OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        files.lock().unwrap().keep(blob, Arc::clone(&file));
        Ok(file)
    }

    fn recall(&mut self, blob: &BlobId) -> Option<Arc<File>> {
        let at = self.0.iter().position(|(id, _)| id == blob)?;
        self.0[at..].rotate_left(1);
        self.0.last().map(|(_, file)| Arc::clone(file))
    }

    fn keep(&mut self, blob: BlobId, file: Arc<File>) {
        // Two readers may have opened the same file at once; the second one replaces the first.
        self.0.retain(|(id, _)| *id != blob);
        if self.0.len() >= OPEN_FILES {
            self.0.remove(0);
        }
        self.0.push((blob, file));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::base::Class;

    fn soon() -> ReadCtx {
        ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60))
    }

    fn id(text: &str) -> BlobId {
        text.parse().unwrap()
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    /// A source with the blob `a`, which holds `0123456789`, and the directory `d`.
    fn source() -> (tempfile::TempDir, LocalSource) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "0123456789").unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        let source = LocalSource::new(dir.path()).unwrap();
        (dir, source)
    }

    #[tokio::test]
    async fn a_fifo_in_place_of_a_blob_is_an_error_at_once() {
        let (dir, source) = source();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();

        let error = source.read(&id("fifo"), range(0, 1), soon()).await.unwrap_err();

        assert!(matches!(error, SourceError::Io { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn reads_give_exactly_the_bytes_of_the_range() {
        let (_dir, source) = source();

        assert_eq!(source.len(&id("a"), soon()).await.unwrap(), 10);
        for (start, end) in [(0, 10), (3, 4), (9, 10), (5, 5)] {
            let bytes = source.read(&id("a"), range(start, end), soon()).await.unwrap();
            assert_eq!(bytes, &b"0123456789"[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]);
        }
    }

    #[tokio::test]
    async fn ranges_behind_the_end_are_refused_before_memory_is_taken() {
        let (_dir, source) = source();

        for end in [11, u64::MAX] {
            let error = source.read(&id("a"), range(9, end), soon()).await.unwrap_err();
            assert!(matches!(error, SourceError::OutOfRange { len: 10, .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn missing_blobs_and_directories_are_told_apart() {
        let (_dir, source) = source();

        let missing = source.len(&id("b"), soon()).await.unwrap_err();
        assert!(matches!(missing, SourceError::NotFound { .. }), "{missing:?}");
        let directory = source.read(&id("d"), range(0, 1), soon()).await.unwrap_err();
        assert!(matches!(directory, SourceError::Io { .. }), "{directory:?}");
    }

    #[tokio::test]
    async fn a_blob_that_appears_later_is_found() {
        let (dir, source) = source();
        source.len(&id("b"), soon()).await.unwrap_err();

        std::fs::write(dir.path().join("b"), "xyz").unwrap();

        assert_eq!(source.len(&id("b"), soon()).await.unwrap(), 3);
    }

    #[tokio::test]
    async fn the_files_kept_open_are_the_last_ones_used() {
        let (dir, source) = source();
        for n in 0..OPEN_FILES {
            source.len(&id("a"), soon()).await.unwrap();
            std::fs::write(dir.path().join(format!("b{n}")), "x").unwrap();
            source.len(&id(&format!("b{n}")), soon()).await.unwrap();
        }

        let open = source.open.lock().unwrap();
        let names: Vec<_> = open.0.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(names.len(), OPEN_FILES);
        assert!(names.contains(&"a") && !names.contains(&"b0"), "{names:?}");
    }

    #[test]
    fn a_source_needs_a_directory() {
        let (dir, _) = source();

        assert!(matches!(LocalSource::new(dir.path().join("a")), Err(OpenError::Directory { .. })));
        assert!(matches!(LocalSource::new(dir.path().join("nowhere")), Err(OpenError::Directory { .. })));
    }
}
