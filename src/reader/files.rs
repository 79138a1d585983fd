//! The bytes of regular files.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::tarfile::{self, TarFileError};
use super::units::{ReadError, UnitReader, UnitRef};
use super::{LoadError, MapError, maps};
use crate::base::ByteRange;
use crate::blob::{BlobKind, BlobTables, UnitIndex, UnitMap};
use crate::image::{Extent, Image, Inode, Kind, Walk};
use crate::source::BlobSource;

/// An image together with its blobs.
pub struct Files {
    image: Image,
    maps: Vec<UnitMap>,
    source: Arc<dyn BlobSource>,
    runtime: Handle,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files").field("image", &self.image).finish_non_exhaustive()
    }
}

/// Why the files of an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The bootstrap is not usable.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The tables of a blob cannot be had, are damaged, or are of a kind that cannot be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The blob is a plain tar layer that cannot be verified.
    #[error(transparent)]
    TarFile(#[from] TarFileError),
}

/// A part of a file, given out in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Checked bytes.
    Bytes(&'a [u8]),
    /// So many zeros, which nobody stored.
    Zeros(u64),
}

impl Files {
    /// The image at `bootstrap`, or in the blob that lies there: see [`Files::of`].
    pub fn open(bootstrap: &Path, source: Arc<dyn BlobSource>, runtime: Handle) -> Result<Self, OpenError> {
        Self::of(super::bootstrap::open(bootstrap)?, source, runtime)
    }

    /// Fetches the tables of an image's blobs from `source`. Plain tar layers have none, and are read as a whole instead: nothing
    /// else tells whether their units are right. Blocks; runs all its reads on `runtime` and must not be called from a thread of it.
    pub fn of(image: Image, source: Arc<dyn BlobSource>, runtime: Handle) -> Result<Self, OpenError> {
        let tables = image.devices().iter().map(|device| BlobTables::new(&device.entry));
        let tables = tables.collect::<Result<Vec<_>, _>>().map_err(MapError::Tables)?;
        let mut maps = Vec::new();
        for (tables, stored) in tables.iter().zip(maps::fetch(&tables, source.as_ref(), &runtime)) {
            let mut mapped = maps::mapped(tables, &stored?, &image, source.as_ref(), &runtime)?;
            if mapped.kind == BlobKind::Tarfs {
                mapped.map = tarfile::digested(&mapped.map, source.as_ref(), &runtime, &|_| ())?;
            }
            maps.push(mapped.map);
        }
        Ok(Self { image, maps, source, runtime })
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// One map for each of the image's devices.
    pub fn maps(&self) -> &[UnitMap] {
        &self.maps
    }

    /// A reader for all regular files in the order of [`Image::walk`], a file with several names
    /// once. It fetches ahead in that order.
    pub fn reader(&self) -> FileReader<'_> {
        self.reader_of(Box::new(RegularFiles { walk: self.image.walk(), linked: HashSet::new() }))
    }

    /// A reader for the regular files `coming`, which it fetches ahead in that order.
    pub fn reader_of<'a>(&'a self, coming: Box<dyn Iterator<Item = Inode> + 'a>) -> FileReader<'a> {
        let coming = ComingUnits { files: self, coming, file: None, units: (0, 0..0) };
        FileReader { image: &self.image, units: self.units(Box::new(coming)) }
    }

    /// A reader for whole units, which it fetches ahead in the order of `coming`.
    pub fn units<'a>(&'a self, coming: Box<dyn Iterator<Item = UnitRef> + 'a>) -> UnitReader<'a> {
        UnitReader::new(&self.maps, Arc::clone(&self.source), self.runtime.clone(), coming)
    }

    /// Writes the content of one regular file to `out`. For many files, [`Files::reader`] asks
    /// for less.
    ///
    /// # Errors
    /// A [`ReadError`] inside the I/O error, or what `out` returned.
    pub fn read_into(&self, inode: &Inode, out: &mut dyn io::Write) -> io::Result<()> {
        let mut reader = self.reader_of(Box::new(std::iter::once(*inode)));
        reader.read(inode, &mut |piece| match piece {
            Piece::Bytes(bytes) => out.write_all(bytes).map_err(ReadIntoError::Write),
            Piece::Zeros(len) => {
                let written = io::copy(&mut io::Read::take(io::repeat(0), len), out);
                written.map(|_| ()).map_err(ReadIntoError::Write)
            }
        })?;
        Ok(())
    }
}

/// The two ways in which [`Files::read_into`] fails.
enum ReadIntoError {
    Read(ReadError),
    Write(io::Error),
}

impl From<ReadError> for ReadIntoError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl From<ReadIntoError> for io::Error {
    fn from(error: ReadIntoError) -> Self {
        match error {
            ReadIntoError::Read(error) => Self::other(error),
            ReadIntoError::Write(error) => error,
        }
    }
}

/// Reads regular files of one image, best in the order that was announced.
#[derive(Debug)]
pub struct FileReader<'a> {
    image: &'a Image,
    units: UnitReader<'a>,
}

impl FileReader<'_> {
    /// Gives the content of `inode` to `visit`, in order and without gaps, until it returns an
    /// error. No byte is given out before its unit was checked.
    ///
    /// # Errors
    /// A [`ReadError`], or what `visit` returned.
    pub fn read<E: From<ReadError>>(
        &mut self,
        inode: &Inode,
        visit: &mut dyn FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut outcome = Ok(());
        let (image, units) = (self.image, &mut self.units);
        let walked = image.extents(inode, &mut |extent| {
            outcome = match extent {
                Extent::Hole { len, .. } => visit(Piece::Zeros(len)),
                Extent::Inline { bytes, .. } => visit(Piece::Bytes(bytes)),
                Extent::Device { device, decoded, .. } => read_device(units, device, decoded, visit),
            };
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        outcome.and(walked.map_err(|error| ReadError::Image(error).into()))
    }
}

/// Gives a range of a device to `visit`, out of however many units it lies in.
fn read_device<E: From<ReadError>>(
    units: &mut UnitReader<'_>,
    device: usize,
    decoded: ByteRange,
    visit: &mut dyn FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let map = units.map(device);
    let indexes = map.covering(decoded).ok_or_else(|| ReadError::NoUnit { blob: map.blob().clone(), decoded })?;
    for index in indexes {
        let blocks = map.get(index).expect("covering() names units of the map").blocks();
        let bytes = units.unit(UnitRef { device, index })?;
        let from = decoded.start().max(blocks.start()) - blocks.start();
        let to = decoded.end().min(blocks.end()) - blocks.start();
        let within = |at: u64| usize::try_from(at).expect("a unit has at most 16 MiB");
        visit(Piece::Bytes(&bytes[within(from)..within(to)]))?;
    }
    Ok(())
}

/// The units of coming files, for reading ahead. Damage is passed over: whoever reads the file
/// will meet it.
struct ComingUnits<'a> {
    files: &'a Files,
    coming: Box<dyn Iterator<Item = Inode> + 'a>,
    /// The file that is being gone through, and from where on.
    file: Option<(Inode, u64)>,
    /// Device and units of its last piece that are still to be given out.
    units: (usize, std::ops::Range<UnitIndex>),
}

impl Iterator for ComingUnits<'_> {
    type Item = UnitRef;

    fn next(&mut self) -> Option<UnitRef> {
        loop {
            if let Some(index) = self.units.1.next() {
                return Some(UnitRef { device: self.units.0, index });
            }
            let (inode, from) = match self.file.take() {
                Some(file) => file,
                None => (self.coming.next()?, 0),
            };
            let mut found = None;
            let walked = self.files.image.extents_from(&inode, from, &mut |extent| match extent {
                Extent::Device { at, device, decoded } => {
                    found = Some((at + decoded.len(), device, decoded));
                    ControlFlow::Break(())
                }
                Extent::Hole { .. } | Extent::Inline { .. } => ControlFlow::Continue(()),
            });
            if let (Ok(()), Some((behind, device, decoded))) = (walked, found) {
                self.file = Some((inode, behind)).filter(|_| behind < inode.size);
                self.units = (device, self.files.maps[device].covering(decoded).unwrap_or(0..0));
            }
        }
    }
}

/// Every regular file of a walk, a file with several names once.
struct RegularFiles<'a> {
    walk: Walk<'a>,
    linked: HashSet<crate::image::Nid>,
}

impl Iterator for RegularFiles<'_> {
    type Item = Inode;

    fn next(&mut self) -> Option<Inode> {
        loop {
            let inode = self.walk.next_visit()?.ok()?.inode;
            if inode.kind == Kind::Regular && (inode.nlink == 1 || self.linked.insert(inode.nid)) {
                return Some(inode);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::num::NonZeroUsize;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::base::BlobId;
    use crate::blob::{Check, Recipe, Unit};
    use crate::build::{Batching, BuildSpec, Compression, Source, build};
    use crate::codec;
    use crate::source::{BoxFuture, LocalSource, ReadCtx, SourceError};

    /// A directory of blobs that counts its reads.
    struct Counting(LocalSource, AtomicUsize);

    impl BlobSource for Counting {
        fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
            self.0.len(blob, ctx)
        }

        fn read<'a>(
            &'a self,
            blob: &'a BlobId,
            stored: ByteRange,
            ctx: ReadCtx,
        ) -> BoxFuture<'a, Result<bytes::Bytes, SourceError>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.read(blob, stored, ctx)
        }

        fn describe(&self) -> String {
            self.0.describe()
        }
    }

    struct Fixture {
        dir: tempfile::TempDir,
        runtime: tokio::runtime::Runtime,
        files: Files,
        source: Arc<Counting>,
    }

    /// An image of files with these contents, named in this order.
    fn fixture(contents: &[Vec<u8>], compression: Compression) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("source");
        fs::create_dir(&from).unwrap();
        for (number, content) in contents.iter().enumerate() {
            fs::write(from.join(format!("{number:05}")), content).unwrap();
        }
        let mut spec = BuildSpec::new(Source::open(&from).unwrap(), dir.path());
        (spec.compression, spec.chunk_size, spec.threads) = (compression, 4096, NonZeroUsize::MIN);
        spec.batching = Batching::Off;
        build(spec, &()).unwrap();
        let local = LocalSource::new(dir.path().join("blobs")).unwrap();
        let source = Arc::new(Counting(local, AtomicUsize::new(0)));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let files = Files::open(&dir.path().join("bootstrap"), source.clone(), runtime.handle().clone()).unwrap();
        Fixture { dir, runtime, files, source }
    }

    fn regular(image: &Image) -> Vec<Inode> {
        RegularFiles { walk: image.walk(), linked: HashSet::new() }.collect()
    }

    fn contents(files: &Files) -> Vec<Vec<u8>> {
        let mut reader = files.reader();
        let content = |inode: &Inode| {
            let mut out = Vec::new();
            let mut visit = |piece: Piece<'_>| {
                match piece {
                    Piece::Bytes(bytes) => out.extend_from_slice(bytes),
                    Piece::Zeros(_) => panic!("no holes here"),
                }
                Ok::<(), ReadError>(())
            };
            reader.read(inode, &mut visit).unwrap();
            out
        };
        regular(files.image()).iter().map(content).collect()
    }

    fn samples() -> Vec<Vec<u8>> {
        (0..400u32).map(|i| (0..i * 40).flat_map(|j| (i * 7919 + j).to_le_bytes()).collect()).collect()
    }

    #[test]
    fn whole_image_is_read_with_few_reads() {
        let want = samples();
        let fixture = fixture(&want, Compression::None);
        let before = fixture.source.1.load(Ordering::Relaxed);

        assert!(contents(&fixture.files) == want);

        let (reads, bytes) = (fixture.source.1.load(Ordering::Relaxed) - before, want.concat().len());
        assert!(reads <= bytes / (2 << 20) + 3, "{reads} reads for {bytes} bytes");
    }

    #[test]
    fn files_out_of_turn_are_read_right() {
        let want = samples();
        let fixture = fixture(&want, Compression::default());
        let mut inodes = regular(fixture.files.image());
        let mut reader = fixture.files.reader();
        inodes.reverse();
        for (inode, want) in inodes.iter().zip(want.iter().rev()) {
            let mut got = Vec::new();
            fixture.files.read_into(inode, &mut got).unwrap();
            assert!(got == *want);
            let mut len = 0;
            let mut count = |piece: Piece<'_>| {
                if let Piece::Bytes(bytes) = piece {
                    len += bytes.len();
                }
                Ok::<(), ReadError>(())
            };
            reader.read(inode, &mut count).unwrap();
            assert_eq!(len, want.len());
        }
    }

    #[test]
    fn chunks_that_are_parts_of_larger_units_are_read_right() {
        let want = samples();
        let mut fixture = fixture(&want, Compression::None);
        let map = &fixture.files.maps[0];
        let blob = fs::read(fixture.dir.path().join("blobs").join(map.blob().as_str())).unwrap();
        let bytes =
            |range: ByteRange| &blob[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()];
        // Whole chunks lie next to each other in both spaces; two of them make one unit.
        let mut units: Vec<Unit> = Vec::new();
        for unit in map.units() {
            match units.last_mut() {
                Some(last)
                    if last.decoded.len() == 4096
                        && last.decoded.end() == unit.decoded.start()
                        && last.stored.end() == unit.stored.start() =>
                {
                    last.decoded = last.decoded.hull(unit.decoded);
                    last.stored = last.stored.hull(unit.stored);
                    last.check = Check::Blake3(codec::blake3(bytes(last.stored)).0);
                }
                _ => units.push(Unit { recipe: Recipe::Plain, ..*unit }),
            }
        }
        assert!(units.len() < map.units().len() * 3 / 4);
        fixture.files.maps = vec![UnitMap::new(map.blob().clone(), map.decoded_len(), units).unwrap()];

        assert!(contents(&fixture.files) == want);
    }

    #[test]
    fn damaged_chunk_is_named_and_nothing_of_it_is_given_out() {
        let content: Vec<u8> = (0..5000u32).flat_map(u32::to_le_bytes).collect();
        let fixture = fixture(std::slice::from_ref(&content), Compression::None);
        let blob = fixture.files.maps[0].blob().clone();
        let path = fixture.dir.path().join("blobs").join(blob.as_str());
        let mut stored = fs::read(&path).unwrap();
        stored[4096 * 2 + 77] ^= 1;
        fs::write(&path, stored).unwrap();
        let inode = regular(fixture.files.image())[0];
        let mut got = Vec::new();

        let error = fixture.files.read_into(&inode, &mut got).unwrap_err();

        assert_eq!(error.to_string(), format!("chunk 2 of blob {blob} is damaged"));
        assert!(got == content[..8192]);
        drop(fixture.runtime);
    }
}
