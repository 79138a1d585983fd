//! The guest's first file system: a cpio archive in the "newc" form the kernel unpacks.
//!
//! Not compressed: the archive is made and read on the same machine, and an emulated processor takes
//! longer to inflate it than the emulator to load it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    out: W,
    count: u32,
    /// Paths that are in the archive already.
    known: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, count: 0, known: BTreeSet::new() }
    }

    /// Adds a directory, and those above it, unless they are there.
    pub(crate) fn dir(&mut self, path: &str) -> io::Result<()> {
        let above: Vec<_> = Path::new(path).ancestors().filter(|dir| dir.parent().is_some()).collect();
        for dir in above.into_iter().rev() {
            if self.known.insert(dir.into()) {
                self.entry(dir, DIRECTORY | 0o755, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// Adds an executable file, and the directories above it, unless it is there.
    pub(crate) fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        if let Some(dir) = Path::new(path).parent().and_then(Path::to_str) {
            self.dir(dir)?;
        }
        if self.known.insert(path.into()) {
            self.entry(Path::new(path), REGULAR | 0o755, (0, 0), bytes)?;
        }
        Ok(())
    }

    /// Adds a character device.
    pub(crate) fn character(&mut self, path: &str, number: (u32, u32)) -> io::Result<()> {
        self.entry(Path::new(path), CHARACTER | 0o600, number, &[])
    }

    /// Adds the host's program `from` as `path`, with the shared libraries it is linked with.
    pub(crate) fn program(&mut self, path: &str, from: &Path) -> anyhow::Result<()> {
        let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(path, &bytes)?;
        for library in libraries(from)? {
            let bytes = fs::read(&library).with_context(|| format!("read {library}"))?;
            self.file(&library, &bytes)?;
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.entry(Path::new("/TRAILER!!!"), 0, (0, 0), &[])?;
        self.out.flush()
    }

    fn entry(&mut self, path: &Path, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        let name = path.to_string_lossy();
        let name = name.trim_start_matches('/');
        let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        self.count += 1;
        // Inode, mode, owner, group, links, time, size, device, device of a node, length of the name, checksum.
        let fields =
            [self.count, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0].map(|v| format!("{v:08X}"));
        let mut head = format!("070701{}{name}\0", fields.concat()).into_bytes();
        head.resize(head.len().next_multiple_of(4), 0);
        self.out.write_all(&head)?;
        self.out.write_all(bytes)?;
        self.out.write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
    }
}

/// Paths of the shared libraries `program` is linked with, the loader included, by `ldd`.
fn libraries(program: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let is_static = said.contains("not a dynamic executable") || text.contains("not a dynamic executable");
        anyhow::ensure!(is_static, "ldd {}: {}", program.display(), said.trim());
        return Ok(Vec::new());
    }
    // "libc.so.6 => /lib/…/libc.so.6 (0x…)", "/lib64/ld-linux… (0x…)", "linux-vdso.so.1 (0x…)", "statically linked".
    let missing = text.lines().find(|line| line.contains("not found"));
    anyhow::ensure!(missing.is_none(), "{}: {}", program.display(), missing.unwrap_or_default().trim());
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}
