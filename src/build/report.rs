//! What a build tells when it is done.

use std::path::Path;

use serde::Serialize;

use super::chunk::Content;
use super::input::Read;
use super::tree::{Kind, Tree};

/// What was made. The same for every build of the same source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BuildReport {
    /// Path of the file that holds the bootstrap.
    pub bootstrap: String,
    /// Whether that file is the blob.
    pub bootstrap_in_blob: bool,
    /// Length of the bootstrap.
    pub bootstrap_bytes: u64,
    /// The new ones: at most one for each source; none if no file has content, unless it holds the
    /// bootstrap.
    pub blobs: Vec<BlobReport>,
    /// The sources, the lowest first. All other numbers are about all of them together, as they
    /// were read, whether or not another hides an entry.
    pub layers: Vec<LayerReport>,
    /// Ids of blobs of the parent and of the dictionary that the image names.
    pub base_blobs: Vec<String>,
    pub directories: u64,
    /// Regular files by content: a file with several names counts once.
    pub files: u64,
    pub symlinks: u64,
    /// Devices, FIFOs and sockets.
    pub specials: u64,
    /// Names beyond the first of their files.
    pub hard_links: u64,
    /// Bytes of all regular files, each counted once.
    pub source_bytes: u64,
    /// Of these, bytes that were read and whose chunk was stored already, be it for a member of the
    /// archive that a later one replaced.
    pub deduplicated_bytes: u64,
    /// Of these, bytes in holes of sparse files, which were not even read.
    pub hole_bytes: u64,
    /// Length of the sources, if all are gzip archives: what to compare the blobs with.
    pub gzip_bytes: Option<u64>,
    /// Whether the blobs are encrypted, with keys that lie in the bootstrap in clear.
    pub encrypted: bool,
    /// Entries of the image's list of what to fetch first.
    pub prefetch_entries: u64,
    /// Whether everything was read again and checked.
    pub verified: bool,
    /// Xattrs left out because the format has no place for their namespace.
    pub skipped_xattrs: u64,
}

/// One source of a [`BuildReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// What the source is called.
    pub source: String,
    /// Id of the blob that holds what the source adds; none if files of the image need none of it.
    pub blob: Option<String>,
    /// Length of the source, if it is a gzip archive.
    pub gzip_bytes: Option<u64>,
}

/// One blob of a [`BuildReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlobReport {
    /// SHA-256 of the file, but for the digests of its chunks.
    pub id: String,
    /// Path of the file.
    pub path: String,
    /// Length of the file.
    pub stored_bytes: u64,
    /// Length of the device it expands to.
    pub decoded_bytes: u64,
    pub chunks: u64,
    /// Stored pieces that hold several chunks.
    pub batches: u64,
}

/// The part of the report that follows from the tree.
pub(super) fn count(tree: &Tree) -> BuildReport {
    let mut report = BuildReport::default();
    report.count(tree);
    report
}

impl BuildReport {
    /// Adds a source that was read.
    pub(super) fn add(&mut self, source: &Path, read: &Read) {
        let is_first = self.layers.is_empty();
        let before = if is_first { Some(0) } else { self.gzip_bytes };
        self.gzip_bytes = before.zip(read.gzip_bytes).map(|(before, bytes)| before + bytes);
        let source = source.display().to_string();
        self.layers.push(LayerReport { source, blob: None, gzip_bytes: read.gzip_bytes });
        self.count(&read.tree);
        self.skipped_xattrs += read.skipped_xattrs;
    }

    fn count(&mut self, tree: &Tree) {
        let mut met = vec![false; tree.len()];
        let walked = tree.walk(|id| {
            if std::mem::replace(&mut met[id.index()], true) {
                self.hard_links += 1;
                return Ok(());
            }
            match &tree.node(id).kind {
                Kind::Directory(_) => self.directories += 1,
                Kind::Regular(content) => {
                    self.files += 1;
                    self.source_bytes += content.size;
                }
                Kind::Symlink(_) => self.symlinks += 1,
                Kind::Character(_) | Kind::Block(_) | Kind::Fifo | Kind::Socket => self.specials += 1,
            }
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(()) = walked;
    }
}

/// [`BuildReport::hole_bytes`] of a tree whose files were cut into chunks of `chunk_size` bytes.
pub(super) fn holes(tree: &Tree, chunk_size: u32) -> u64 {
    sum(tree, |content| content.hole_bytes(chunk_size))
}

/// [`BuildReport::deduplicated_bytes`] of a tree whose cuts of at most `chunk_size` bytes became these
/// chunks, behind the first `known` of them.
pub(super) fn deduplicated(tree: &Tree, chunk_size: u32, chunk_of_cut: &[u32], known: u32) -> u64 {
    // Chunks are numbered as they are stored, so whatever gives no new number was stored before.
    let mut next = known;
    let mut is_repeated = vec![true; chunk_of_cut.len()];
    for (is_repeated, chunk) in is_repeated.iter_mut().zip(chunk_of_cut).skip(known as usize) {
        if *chunk == next {
            *is_repeated = false;
            next += 1;
        }
    }
    let is_repeated = |cut: u64| usize::try_from(cut).is_ok_and(|cut| is_repeated[cut]);
    sum(tree, |content| content.read_bytes(chunk_size, &is_repeated))
}

/// The sum of something over all regular files, a file with several names once.
fn sum(tree: &Tree, of: impl Fn(&Content) -> u64) -> u64 {
    let (mut met, mut sum) = (vec![false; tree.len()], 0);
    let walked = tree.walk(|id| {
        if let Kind::Regular(content) = &tree.node(id).kind
            && !std::mem::replace(&mut met[id.index()], true)
        {
            sum += of(content);
        }
        Ok::<(), std::convert::Infallible>(())
    });
    let Ok(()) = walked;
    sum
}
