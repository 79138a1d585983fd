//! The image that everything is measured on, its place in a registry, and what is known of it beforehand.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use bytes::Bytes;
use rafsd::base::{ByteRange, ByteSize};
use rafsd::blob::{BlobTables, Unit, UnitMap};
use rafsd::codec::sha256;
use rafsd::image::{Extent, Inode};

use super::corpus::Corpus;
use super::measure::Rng;
use super::nydusform;
use super::registry::{Content, Registry};

const LAYERS: u64 = 3;

/// The name of the image in its registry.
pub(crate) const REPOSITORY: &str = "bench/app";

/// One blob, in memory.
pub(crate) struct Blob {
    pub(crate) stored: Bytes,
    pub(crate) map: UnitMap,
}

/// An image of several layers.
pub(crate) struct Image {
    /// Regular files with content that can be seen, and their lengths, in the order of their paths.
    pub(crate) files: Vec<(PathBuf, u64)>,
    pub(crate) blobs: Vec<Blob>,
    pub(crate) bootstrap: PathBuf,
    parsed: rafsd::image::Image,
    inodes: HashMap<PathBuf, Inode>,
    seed: u64,
}

/// A part of a file.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) path: PathBuf,
    pub(crate) at: u64,
    pub(crate) len: u64,
}

impl Image {
    /// Builds one of `size` bytes of files of `source`, below `dir`.
    pub(crate) fn make(
        source: &Path,
        size: u64,
        chunk_size: Option<ByteSize>,
        seed: u64,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        let mut build = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        build.arg("build");
        build.args(chunk_size.map(|size| format!("--chunk-size={}", size.0)));
        for layer in 0..LAYERS {
            let seed = seed * LAYERS + layer;
            let corpus = Corpus::sample(source, size / LAYERS, seed, &dir.join(format!("files{layer}")))?;
            build.arg(&corpus.dir);
            // Upper layers hide what is below them.
            files.extend(corpus.files.into_iter().filter(|(_, len)| *len > 0));
        }
        let out = dir.join("image");
        run(build.arg("-o").arg(&out))?;
        Self::open(&out.join("bootstrap"), &[out.join("blobs")], files.into_iter().collect(), seed)
    }

    /// The same with a hot blob of what `trace` names, made below `dir`.
    pub(crate) fn optimized(&self, trace: &Path, dir: &Path) -> anyhow::Result<Self> {
        let out = dir.join("optimized");
        let mut optimize = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        run(optimize.arg("optimize").arg(&self.bootstrap).arg("--paths").arg(trace).arg("-o").arg(&out))?;
        let before = self.bootstrap.with_file_name("blobs");
        Self::open(&out.join("bootstrap"), &[out.join("blobs"), before], self.files.clone(), self.seed)
    }

    /// The image of `bootstrap`, each of whose blobs is in one of `dirs`.
    fn open(bootstrap: &Path, dirs: &[PathBuf], files: Vec<(PathBuf, u64)>, seed: u64) -> anyhow::Result<Self> {
        let parsed = rafsd::image::Image::open(bootstrap)?;
        let mut blobs = Vec::new();
        for device in parsed.devices() {
            let mut places = dirs.iter().map(|dir| dir.join(device.blob.as_str()));
            let place = places.find(|place| place.exists()).with_context(|| format!("no blob {}", device.blob))?;
            let stored = Bytes::from(fs::read(place)?);
            let tables = BlobTables::new(&device.entry)?;
            let geometry = tables.geometry(slice(&stored, tables.stored()))?;
            blobs.push(Blob { map: tables.with_digests(geometry, parsed.chunk_records().iter())?, stored });
        }
        let mut inodes = HashMap::new();
        for entry in parsed.walk() {
            let entry = entry?;
            inodes.insert(PathBuf::from(String::from_utf8_lossy(&entry.path).into_owned()), entry.inode);
        }
        Ok(Self { files, blobs, bootstrap: bootstrap.to_owned(), parsed, inodes, seed })
    }

    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, len)| len).sum()
    }

    /// Bytes of all blobs.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.stored.len() as u64).sum()
    }

    /// The unit that has the byte of a file, and the blob it is in. `None` for what is not in a blob.
    pub(crate) fn unit(&self, path: &Path, at: u64) -> anyhow::Result<Option<(usize, Unit)>> {
        Ok(self.units(path, at, 1)?.into_iter().next())
    }

    fn units(&self, path: &Path, at: u64, len: u64) -> anyhow::Result<Vec<(usize, Unit)>> {
        let inode = self.inodes.get(path).with_context(|| format!("{} is not in the image", path.display()))?;
        let mut units = Vec::new();
        self.parsed.extents_from(inode, at, &mut |extent| {
            let Extent::Device { at: begin, device, decoded } = extent else { return ControlFlow::Continue(()) };
            if begin >= at + len {
                return ControlFlow::Break(());
            }
            let from = decoded.start() + at.saturating_sub(begin);
            let end = decoded.end().min(decoded.start() + (at + len - begin));
            let map = &self.blobs[device].map;
            let numbers = ByteRange::new(from, end).and_then(|range| map.covering(range));
            units.extend(numbers.into_iter().flatten().filter_map(|number| Some((device, *map.get(number)?))));
            ControlFlow::Continue(())
        })?;
        Ok(units)
    }

    /// The pieces that a trace names.
    pub(crate) fn traced(&self, trace: &str) -> anyhow::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for line in trace.lines().filter(|line| line.starts_with('/')) {
            let (path, ranges) = line.rsplit_once(':').context("a line of a trace")?;
            for range in ranges.split(',') {
                let (at, len) = range.split_once('+').context("a range of a trace")?;
                pieces.push(Piece { path: path.trim_start_matches('/').into(), at: at.parse()?, len: len.parse()? });
            }
        }
        Ok(pieces)
    }

    /// Stored bytes without which `pieces` cannot be read.
    pub(crate) fn needed(&self, pieces: &[Piece]) -> anyhow::Result<u64> {
        let mut stored = HashSet::new();
        for piece in pieces {
            let units = self.units(&piece.path, piece.at, piece.len)?;
            stored.extend(units.into_iter().map(|(blob, unit)| (blob, unit.stored)));
        }
        Ok(stored.iter().map(|(_, range)| range.len()).sum())
    }

    /// What a program might read at its start: a sixth of the image, small files whole and of larger ones the
    /// beginning and something further on, in an order that has nothing to do with theirs.
    pub(crate) fn startup_set(&self) -> Vec<Piece> {
        let (mut rng, mut pieces, mut sum) = (Rng::new(self.seed), Vec::new(), 0);
        let mut left: Vec<_> = self.files.iter().collect();
        while sum < self.bytes() / 6 && !left.is_empty() {
            let chosen = usize::try_from(rng.below(left.len() as u64)).expect("an index");
            let (path, len) = left.swap_remove(chosen);
            let mut add = |at: u64, len: u64| {
                pieces.push(Piece { path: path.clone(), at, len });
                sum += len;
            };
            add(0, (*len).min(1 << 20));
            if *len > 4 << 20 {
                add(rng.below(len / 4096 - 300) * 4096, 1 << 20);
            }
        }
        pieces
    }

    /// A registry on this host that has the image, as nydusify would have put it there.
    pub(crate) fn registry(&self) -> anyhow::Result<Registry> {
        let mut content = Content::default();
        let mut layers = Vec::new();
        for blob in &self.blobs {
            layers.push(nydusform::blob_layer(content.blob(REPOSITORY, blob.stored.clone())));
        }
        let bootstrap = nydusform::bootstrap_tar(&fs::read(&self.bootstrap)?)?;
        layers.push(nydusform::bootstrap_layer(content.blob(REPOSITORY, bootstrap.into())));
        let config = content.blob(REPOSITORY, nydusform::config().into());
        let manifest = nydusform::manifest(config, &layers).to_string();
        content.manifest(REPOSITORY, "latest", nydusform::MANIFEST, manifest.into());
        Ok(Registry::start(content)?)
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let done = command.output()?;
    if !done.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}

/// What the registry at `host` calls the image.
pub(crate) fn reference(host: std::net::SocketAddr) -> String {
    format!("docker://{host}/{REPOSITORY}:latest")
}

/// The bytes of `stored` at `range`, which lies in it.
pub(crate) fn slice(stored: &[u8], range: ByteRange) -> &[u8] {
    let place = |at: u64| usize::try_from(at).expect("it is in memory");
    &stored[place(range.start())..place(range.end())]
}

/// `sha256:` and the digits.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}
