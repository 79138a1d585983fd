//! A finished image, read again before anybody is told of it.
//!
//! The bootstrap is opened as a reader opens it, and everything in it compared with the tree it
//! was made from. The blob is read from its file through its own tables, and every chunk decoded
//! and digested. So a fault of the builder, of memory or of the disk ends a build, not a mount.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::blobwriter::FinishedBlob;
use super::chunk::{Chunk, Content};
use super::error::BuildError;
use super::layout::Layout;
use super::tree::{Kind, NodeId, Tree};
use crate::base::ByteRange;
use crate::blob::{BlobTables, Check, DecodeError, Decoder, TablesError, Unit, UnitMap};
use crate::format::rafs::{BlobEntry, DigestAlgorithm};
use crate::image::v5::BootstrapError;
use crate::image::{Extent, Image, ImageError, Inode};

/// What is wrong with an image that was just made.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the bootstrap cannot be read")]
    Image(#[from] ImageError),
    #[error("the RAFS v5 bootstrap cannot be read")]
    V5(#[from] BootstrapError),
    #[error("the RAFS v5 image cannot be mounted")]
    Lift(#[from] super::LiftError),
    #[error("{what} of /{path} is not that of the source")]
    Node { path: String, what: &'static str },
    #[error("the bootstrap has {got} names, the source {want}")]
    Names { got: u64, want: u64 },
    #[error("the blob cannot be read")]
    Read(#[from] io::Error),
    #[error("the tables of the blob cannot be used")]
    Tables(#[from] TablesError),
    #[error("chunk {chunk} is not where it was stored")]
    Place { chunk: usize },
    #[error("chunk {chunk}, stored at byte {at} of the blob, is damaged")]
    Chunk {
        chunk: usize,
        at: u64,
        #[source]
        cause: DecodeError,
    },
}

/// What an image was made from.
#[derive(Debug)]
pub(super) struct Expected<'a> {
    pub tree: &'a Tree,
    pub layout: &'a Layout,
    pub chunks: &'a [Chunk],
    pub chunk_of_cut: &'a [u32],
    pub digest: DigestAlgorithm,
}

/// Checks the complete image: its bootstrap, and the blobs that were made with it.
pub(super) fn image(
    bootstrap: Vec<u8>,
    expected: &Expected<'_>,
    blobs: &[FinishedBlob],
    threads: NonZeroUsize,
) -> Result<(), BuildError> {
    let image = Image::parse(bootstrap).map_err(VerifyError::from)?;
    metadata(&image, expected)?;
    for blob in blobs {
        self::blob(&image, blob, expected.digest, threads)?;
    }
    Ok(())
}

/// Checks a blob that was made with an image, through its own tables and what the image says of it.
pub(super) fn blob(
    image: &Image,
    blob: &FinishedBlob,
    digest: DigestAlgorithm,
    threads: NonZeroUsize,
) -> Result<(), VerifyError> {
    let Some(entry) = &blob.entry else { return Ok(()) };
    let device = image.devices().iter().find(|device| device.blob == blob.id);
    let map = map(image, device.map_or(entry, |device| &device.entry), blob, digest)?;
    data(&map, &blob.file, threads)
}

/// Compares every name of the image with the tree.
pub(super) fn metadata(image: &Image, expected: &Expected<'_>) -> Result<(), VerifyError> {
    let mut walk = image.walk();
    // The nodes from the root to the one visited last.
    let mut above: Vec<NodeId> = Vec::new();
    let mut names = 0;
    while let Some(visit) = walk.next_visit() {
        let visit = visit?;
        names += 1;
        above.truncate(visit.path.len());
        let node = match visit.path.last() {
            None => Some(NodeId::ROOT),
            Some(name) => expected.tree.child(above[visit.path.len() - 1], name),
        };
        let wrong = |what| VerifyError::Node { path: visit.path.join(&b'/').escape_ascii().to_string(), what };
        let node = node.ok_or_else(|| wrong("the name"))?;
        above.push(node);
        if let Some(what) = difference(image, expected, &visit.inode, node)? {
            return Err(wrong(what));
        }
    }
    let want = expected.layout.names.into();
    if names == want { Ok(()) } else { Err(VerifyError::Names { got: names, want }) }
}

/// The first thing in which an inode is not what the tree says.
fn difference(
    image: &Image,
    expected: &Expected<'_>,
    inode: &Inode,
    id: NodeId,
) -> Result<Option<&'static str>, ImageError> {
    let (node, place) = (expected.tree.node(id), expected.layout.place(id));
    let meta = &node.meta;
    let mut xattrs = meta.xattrs.iter();
    let mut same_xattrs = true;
    image.xattrs(inode, &mut |got| {
        same_xattrs &= xattrs.next().is_some_and(|(name, value)| *got.name() == **name && *got.value == **value);
        ControlFlow::Continue(())
    })?;
    same_xattrs &= xattrs.next().is_none();
    let content = match &node.kind {
        Kind::Symlink(target) => *image.symlink(inode)? == **target,
        Kind::Character(device) | Kind::Block(device) => inode.rdev == *device,
        Kind::Regular(content) => inode.size == content.size && same_chunks(image, expected, inode, content)?,
        Kind::Directory(_) | Kind::Fifo | Kind::Socket => true,
    };
    let checks = [
        (inode.kind == node.kind.in_images(), "the kind"),
        (inode.nid == place.nid() && inode.ino == place.ino, "the number"),
        (inode.permissions == meta.permissions, "the mode"),
        ((inode.uid, inode.gid) == (meta.uid, meta.gid), "the owner"),
        (inode.mtime == (meta.mtime, meta.mtime_nsec), "the time"),
        (inode.nlink == place.links, "the link count"),
        (same_xattrs, "an xattr"),
        (content, "the content"),
    ];
    Ok(checks.into_iter().find(|(same, _)| !same).map(|(_, what)| what))
}

/// Whether the extents of a file are the chunks its content was cut into.
fn same_chunks(image: &Image, expected: &Expected<'_>, inode: &Inode, content: &Content) -> Result<bool, ImageError> {
    let mut cuts = content.cuts();
    let mut same = true;
    image.extents(inode, &mut |extent| {
        let cut = cuts.next().and_then(|cut| usize::try_from(cut).ok());
        let chunk = cut.and_then(|cut| expected.chunks.get(*expected.chunk_of_cut.get(cut)? as usize));
        same = match (extent, chunk) {
            (Extent::Device { device, decoded, .. }, Some(chunk)) => {
                // Images of others may have files that use less than all of a chunk.
                let whole = ByteRange::at(chunk.decoded_offset, chunk.plain_len.into());
                let is_start = |whole: ByteRange| whole.start() == decoded.start() && decoded.end() <= whole.end();
                device == usize::from(chunk.blob) && whole.is_some_and(is_start)
            }
            _ => false,
        };
        if same { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(same && cuts.next().is_none())
}

/// The units of the blob, from its own tables and the records of the image, with the digest of
/// every chunk that was stored: also of those that no file uses any more.
fn map(image: &Image, entry: &BlobEntry, blob: &FinishedBlob, digest: DigestAlgorithm) -> Result<UnitMap, VerifyError> {
    let tables = BlobTables::new(entry)?;
    let range = tables.stored();
    let mut stored = vec![0; usize::try_from(range.len()).expect("tables of 2^24 chunks fit in memory")];
    blob.file.read_exact_at(&mut stored, range.start())?;
    let map = tables.with_digests(tables.geometry(&stored)?, image.chunk_records().iter())?;
    let mut units = map.units().to_vec();
    if units.len() != blob.chunks.len() {
        return Err(VerifyError::Place { chunk: units.len().min(blob.chunks.len()) });
    }
    for (number, (unit, chunk)) in units.iter_mut().zip(&blob.chunks).enumerate() {
        let want = Check::of(digest, chunk.digest.0);
        let is_named = matches!(unit.check, Check::Blake3(_) | Check::Sha256(_));
        let place = ByteRange::at(chunk.decoded_offset, chunk.plain_len.into());
        if Some(unit.decoded) != place || is_named && unit.check != want {
            return Err(VerifyError::Place { chunk: number });
        }
        unit.check = want;
    }
    UnitMap::with_key(blob.id.clone(), map.decoded_len(), units, map.key().cloned())
        .map_err(|cause| TablesError::Map { blob: blob.id.clone(), cause }.into())
}

/// Units that a thread takes at once: enough that taking does not count, and that few batches are
/// decompressed twice because two threads share them.
const STRETCH: usize = 256;

/// Decodes and digests every unit.
pub(super) fn data(map: &UnitMap, file: &File, threads: NonZeroUsize) -> Result<(), VerifyError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let first: Mutex<Option<(usize, VerifyError)>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads.get() {
            scope.spawn(|| {
                let mut checker =
                    Checker { map, file, decoder: Decoder::new(), held: None, stored: Vec::new(), out: Vec::new() };
                while !failed.load(Ordering::Relaxed) {
                    let from = next.fetch_add(STRETCH, Ordering::Relaxed);
                    let units = map.units().iter().enumerate().skip(from).take(STRETCH);
                    if units.len() == 0 {
                        return;
                    }
                    for (number, unit) in units {
                        let Err(error) = checker.check(number, unit) else { continue };
                        failed.store(true, Ordering::Relaxed);
                        let mut first = first.lock().unwrap();
                        if first.as_ref().is_none_or(|(before, _)| number < *before) {
                            *first = Some((number, error));
                        }
                        return;
                    }
                }
            });
        }
    });
    first.into_inner().unwrap().map_or(Ok(()), |(_, error)| Err(error))
}

/// One thread's view of the blob.
struct Checker<'a> {
    map: &'a UnitMap,
    file: &'a File,
    decoder: Decoder,
    /// What `stored` holds: members of a batch come one behind the other.
    held: Option<ByteRange>,
    stored: Vec<u8>,
    out: Vec<u8>,
}

impl Checker<'_> {
    fn check(&mut self, number: usize, unit: &Unit) -> Result<(), VerifyError> {
        let len = |range: ByteRange| usize::try_from(range.len()).expect("a unit map bounds it");
        if self.held != Some(unit.stored) {
            self.held = None;
            self.stored.resize(len(unit.stored), 0);
            self.file.read_exact_at(&mut self.stored, unit.stored.start())?;
            self.held = Some(unit.stored);
        }
        self.out.resize(len(unit.blocks()), 0);
        let decoded = self.decoder.decode(self.map.key(), unit, &self.stored, &mut self.out);
        decoded.map_err(|cause| VerifyError::Chunk { chunk: number, at: unit.stored.start(), cause })
    }
}
