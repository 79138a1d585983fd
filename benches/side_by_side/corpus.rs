//! The files that everything is measured on: a copy of a sample of real ones.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::measure::Rng;

/// No file of the sample is larger: one file alone would not show what many do.
const LARGEST: u64 = 64 << 20;

/// A directory of files, all of them in the page cache when it has just been made.
#[derive(Debug)]
pub(crate) struct Corpus {
    pub(crate) dir: PathBuf,
    /// Regular files with their lengths, below `dir`, in the order a sorted walk meets them.
    pub(crate) files: Vec<(PathBuf, u64)>,
    pub(crate) symlinks: usize,
    /// Sum of the lengths.
    pub(crate) bytes: u64,
    pub(crate) seed: u64,
    pub(crate) source: PathBuf,
}

impl Corpus {
    /// Copies files of `source` to `dir` until there are `size` bytes of them. Which ones depends
    /// on the seed and the names alone.
    pub(crate) fn sample(source: &Path, size: u64, seed: u64, dir: &Path) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        list(source, Path::new(""), &mut all).with_context(|| format!("cannot list {}", source.display()))?;
        all.sort();
        let mut rng = Rng::new(seed);
        for last in (1..all.len()).rev() {
            let other = usize::try_from(rng.below(last as u64 + 1)).expect("an index");
            all.swap(last, other);
        }
        let mut corpus =
            Self { dir: dir.to_owned(), files: Vec::new(), symlinks: 0, bytes: 0, seed, source: source.to_owned() };
        for path in all {
            if corpus.bytes >= size {
                break;
            }
            corpus.copy(source, path).context("cannot copy the sample")?;
        }
        if corpus.bytes == 0 {
            bail!("there are no files with content in {}", source.display());
        }
        corpus.files.sort();
        Ok(corpus)
    }

    fn copy(&mut self, source: &Path, path: PathBuf) -> io::Result<()> {
        let (from, to) = (source.join(&path), self.dir.join(&path));
        let meta = fs::symlink_metadata(&from)?;
        if meta.is_file() && meta.len() > LARGEST {
            return Ok(());
        }
        fs::create_dir_all(to.parent().expect("below our directory"))?;
        if meta.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
            self.symlinks += 1;
        } else {
            // Not fs::copy, which may share blocks and then leaves the page cache as it is.
            let len = io::copy(&mut File::open(&from)?.take(meta.len()), &mut File::create(&to)?)?;
            self.bytes += len;
            self.files.push((path, len));
        }
        Ok(())
    }

    /// Bytes per second, in MB/s, of going through everything in `seconds`.
    #[expect(clippy::cast_precision_loss, reason = "printed with few digits")]
    pub(crate) fn rate(&self, seconds: f64) -> f64 {
        self.bytes as f64 / seconds / 1e6
    }

    /// Checks that every file has the same bytes below `root`.
    pub(crate) fn compare(&self, root: &Path) -> anyhow::Result<()> {
        for (path, len) in &self.files {
            let want = fs::read(self.dir.join(path))?;
            let got = fs::read(root.join(path)).with_context(|| format!("cannot read {}", path.display()))?;
            if got != want || got.len() as u64 != *len {
                bail!("{} below {} has other bytes than its source", path.display(), root.display());
            }
        }
        Ok(())
    }

    /// 4 KiB reads at random, as file numbers and offsets: every block is as likely as any other.
    pub(crate) fn positions(&self, count: usize) -> Vec<(usize, u64)> {
        let ends: Vec<u64> = self
            .files
            .iter()
            .scan(0, |sum, (_, len)| {
                *sum += len.div_ceil(4096);
                Some(*sum)
            })
            .collect();
        let blocks = ends.last().copied().unwrap_or(0);
        let mut rng = Rng::new(self.seed);
        let mut position = || {
            let block = rng.below(blocks);
            let file = ends.partition_point(|&end| end <= block);
            let start = file.checked_sub(1).map_or(0, |before| ends[before]);
            (file, (block - start) * 4096)
        };
        (0..count).map(|_| position()).collect()
    }
}

/// All regular files and symlinks below `root`.
fn list(root: &Path, below: &Path, out: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let (entry, kind) = entry.and_then(|entry| entry.file_type().map(|kind| (entry, kind)))?;
        let path = below.join(entry.file_name());
        if kind.is_dir() {
            list(root, &path, out)?;
        } else if kind.is_file() || kind.is_symlink() {
            out.push(path);
        }
    }
    Ok(())
}

/// Reads 4 KiB, or what there is up to the end of the file.
pub(crate) fn read_block(file: &File, at: u64) -> io::Result<()> {
    match file.read_at(&mut [0; 4096], at)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Reads the whole file in 128 KiB pieces, as `cp` and `cat` do, and tells its length.
pub(crate) fn read_through(path: &Path, buffer: &mut [u8; 128 << 10]) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut sum = 0;
    loop {
        match file.read(buffer)? {
            0 => return Ok(sum),
            len => sum += len as u64,
        }
    }
}

/// Looks at every name below `dir` as `find -ls` does, and tells how many there are.
pub(crate) fn walk(dir: &Path) -> io::Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        count += 1;
        if meta.is_dir() {
            count += walk(&path)?;
        } else if meta.is_symlink() {
            fs::read_link(&path)?;
        }
    }
    Ok(count)
}
