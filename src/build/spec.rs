//! What to build, from what, and how.

use std::fs;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use super::base::Base;
use super::chunk::Compression;
use super::error::BuildError;
use super::prefetch::PrefetchHints;
use super::selection::Selection;
use crate::codec::xts::BlobKey;
use crate::format::rafs::DigestAlgorithm;

/// What an image is made from.
pub enum Source {
    /// A directory with everything below it.
    Directory(PathBuf),
    /// A tar archive, plain or gzip; which one is found out from its first bytes.
    Archive {
        /// Named in errors only.
        name: PathBuf,
        stream: Box<dyn Read>,
    },
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) => f.debug_tuple("Directory").field(path).finish(),
            Self::Archive { name, .. } => f.debug_struct("Archive").field("name", name).finish_non_exhaustive(),
        }
    }
}

impl Source {
    /// What to call it in messages.
    pub(super) fn name(&self) -> &Path {
        match self {
            Self::Directory(path) | Self::Archive { name: path, .. } => path,
        }
    }

    /// The directory or archive at `path`.
    pub fn open(path: &Path) -> Result<Self, BuildError> {
        let read = |source| BuildError::Read { path: path.to_owned(), source };
        let meta = fs::metadata(path).map_err(read)?;
        if meta.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if !meta.is_file() {
            let what = "neither a directory nor a regular file; an archive from elsewhere goes through standard input";
            return Err(read(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        let stream = Box::new(fs::File::open(path).map_err(read)?);
        Ok(Self::Archive { name: path.to_owned(), stream })
    }
}

/// What to build, and how.
#[derive(Debug)]
pub struct BuildSpec {
    /// At least one; of several, each is a layer over those before it.
    pub sources: Vec<Source>,
    /// Whether the data of several sources goes into one blob, not each source's into its own.
    pub one_blob: bool,
    /// Made if it is not there. Gets `bootstrap` and `blobs/`.
    pub out_dir: PathBuf,
    pub version: Version,
    pub compression: Compression,
    pub digest: DigestAlgorithm,
    /// Bytes: a power of two between 4 KiB and 16 MiB.
    pub chunk_size: u64,
    pub batching: Batching,
    pub encryption: Encryption,
    /// Whether the blob ends with a table of contents, and carries the digests of its chunks.
    pub blob_toc: bool,
    /// Whether the bootstrap lies in the blob, and nowhere else. There can be only one then.
    pub inline_bootstrap: bool,
    /// Files whose data goes in front, if the source is a directory, and that the image lists.
    pub prefetch: PrefetchHints,
    pub selection: Selection,
    /// Images that the sources are put over or that have some of their chunks.
    pub base: Base,
    /// Whether everything is read again and checked before it is published.
    pub verify: bool,
    /// Threads that compress, at most 256 of them. One more reads and one writes. The image does not
    /// depend on it.
    pub threads: NonZeroUsize,
}

/// Version of the format, with what only that version leaves to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// EROFS metadata, which the kernel reads.
    #[default]
    V6,
    /// Metadata of its own, for readers in user space. It knows no batches, no encryption and no table
    /// of contents, and one compression and one digest for all blobs.
    V5 {
        /// Whether chunks start on 4 KiB in the decoded space, as version 6 has it, and do not
        /// follow each other without gaps.
        aligned: bool,
    },
}

/// Which files share stored pieces of the blob with their neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Batching {
    /// As with [`BuildSpec::DEFAULT_BATCH_SIZE`], or with the chunk size if that is less; not at
    /// all with chunks of 16 MiB.
    #[default]
    Default,
    /// None.
    Off,
    /// Files shorter than half of this share pieces of less than this: a power of two from 4 KiB to
    /// the chunk size.
    Size(u64),
}

/// Whether a blob is encrypted. The key lies in the bootstrap, in clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    #[default]
    None,
    /// Each blob with a new key. Nobody can build such an image again.
    Random,
    /// With this key: for whoever must build the same bytes again. Using a key for two contents
    /// shows which of their parts are equal.
    Key(BlobKey),
}

impl BuildSpec {
    /// 1 MiB, the default of the format.
    pub const DEFAULT_CHUNK_SIZE: u64 = 1 << 20;
    /// 512 KiB: the least with which the blobs of /usr/share/perl, /usr/lib/python3.11, /etc and
    /// /usr/share/zoneinfo were smaller than `tar | gzip -6` (2 to 25 %; with 256 KiB one was 0.6 %
    /// larger, without batches up to 91 %). A cold read of a small file fetches some 130 KiB then.
    pub const DEFAULT_BATCH_SIZE: u32 = 512 << 10;

    /// The defaults of the command line, with as many threads as there are cores.
    pub fn new(source: Source, out_dir: impl Into<PathBuf>) -> Self {
        Self {
            sources: vec![source],
            one_blob: false,
            out_dir: out_dir.into(),
            version: Version::default(),
            compression: Compression::default(),
            digest: DigestAlgorithm::Blake3,
            chunk_size: Self::DEFAULT_CHUNK_SIZE,
            batching: Batching::default(),
            encryption: Encryption::default(),
            blob_toc: false,
            inline_bootstrap: false,
            prefetch: PrefetchHints::default(),
            selection: Selection::default(),
            base: Base::default(),
            verify: true,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }

    /// The chunk size, if the format has it.
    pub(super) fn checked_chunk_size(&self) -> Result<u32, BuildError> {
        let size = u32::try_from(self.chunk_size).ok();
        size.filter(|size| size.is_power_of_two() && (1 << 12..=LARGEST_CHUNK).contains(size))
            .ok_or(BuildError::ChunkSize(self.chunk_size))
    }

    /// Fails if something is asked for that the version of the format does not have.
    pub(super) fn ensure_version_has_it(&self) -> Result<(), BuildError> {
        if self.version == Version::V6 {
            return Ok(());
        }
        let is_batched = matches!(self.batching, Batching::Size(_));
        let asked = [
            (is_batched, "batches (--batch-size)"),
            (self.encryption != Encryption::None, "encryption (--encrypt)"),
            (self.blob_toc, "table of contents (--blob-toc)"),
            (self.base.parent.is_some(), "build over a parent (--parent)"),
            (self.base.dictionary.is_some(), "chunk dictionary (--chunk-dict)"),
        ];
        match asked.into_iter().find(|(is_asked, _)| *is_asked) {
            Some((_, what)) => Err(BuildError::NotInVersion5(what)),
            None => Ok(()),
        }
    }

    /// The batch size, 0 for none.
    pub(super) fn checked_batch_size(&self, chunk_size: u32) -> Result<u32, BuildError> {
        let fits = |size: u64| size.is_power_of_two() && size >= 1 << 12 && size <= u64::from(chunk_size);
        let size = match self.batching {
            Batching::Off => 0,
            Batching::Default if self.version != Version::V6 => 0,
            Batching::Default => default_batch_size(chunk_size).into(),
            Batching::Size(size) if !fits(size) => return Err(BuildError::BatchSize { size, chunk_size }),
            Batching::Size(size) => size,
        };
        let is_long = size > 0 || self.encryption != Encryption::None;
        if is_long && chunk_size == LARGEST_CHUNK {
            return Err(BuildError::LongEntries);
        }
        Ok(u32::try_from(size).expect("at most the chunk size"))
    }
}

/// The batch size if nobody says otherwise, 0 for none.
pub(super) fn default_batch_size(chunk_size: u32) -> u32 {
    // Entries that know of batches cannot say that such a chunk is stored as it is.
    if chunk_size == LARGEST_CHUNK { 0 } else { chunk_size.min(BuildSpec::DEFAULT_BATCH_SIZE) }
}

/// More threads than this only cost memory.
pub(super) const MAX_THREADS: NonZeroUsize = NonZeroUsize::new(256).unwrap();

const LARGEST_CHUNK: u32 = 1 << 24;

impl Encryption {
    /// The key to use, made now if there is none yet.
    pub(super) fn key(&self) -> Result<Option<BlobKey>, BuildError> {
        match self {
            Self::None => Ok(None),
            Self::Key(key) => Ok(Some(key.clone())),
            Self::Random => loop {
                let (mut key, mut iv) = ([0; 32], [0; 16]);
                let random = ring::rand::SystemRandom::new();
                let filled = |bytes: &mut [u8]| ring::rand::SecureRandom::fill(&random, bytes);
                filled(&mut key).and_then(|()| filled(&mut iv)).map_err(|_| BuildError::Random)?;
                // Equal halves are as likely as guessing a key.
                if let Ok(key) = BlobKey::new(key, iv) {
                    return Ok(Some(key));
                }
            },
        }
    }
}

/// Somebody who watches a build. Called from the thread that called [`build`](super::build()).
pub trait Progress {
    /// Whether [`Progress::total`] is worth a walk through the source before the build.
    fn wants_total(&self) -> bool {
        false
    }

    /// How much there is to do; called at most once, before anything advances.
    fn total(&self, _entries: u64, _bytes: u64) {}

    /// So many entries and bytes of content have been read since the last call.
    fn advance(&self, _entries: u64, _bytes: u64) {}

    /// Everything is written and about to be checked; this is where a blob lies until it has its
    /// name. Called for each blob, or once if there is none.
    fn verifying(&self, _blob: Option<&Path>) {}
}

/// Nobody watches.
impl Progress for () {}
