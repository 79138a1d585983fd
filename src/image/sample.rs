//! A small sound image for tests of this folder, and a way to damage it.

use std::io::Cursor;
use std::num::NonZeroUsize;
use std::sync::OnceLock;

use super::Image;
// Said once more for the scanner of the layers: tests may build their input with a higher one.
#[cfg(test)]
use crate::build::{BuildSpec, Compression, Source, build};

/// Files of one and of several chunks (twice the same, and one whose chunks lie apart), a hard
/// link, a directory of several blocks, short and long symlinks, a device, a FIFO and an xattr.
pub(super) fn bytes() -> Vec<u8> {
    static BUILT: OnceLock<Vec<u8>> = OnceLock::new();
    BUILT.get_or_init(built).clone()
}

fn built() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let noise: Vec<u8> = (0..5000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    add(&mut tar, "file", b"some content");
    add(&mut tar, "large", &noise);
    add(&mut tar, "scattered", &[&noise[4096..8192], &noise[..100]].concat());
    add(&mut tar, "twin", &noise);
    add(&mut tar, "empty", b"");
    add(&mut tar, "dir/sub/leaf", b"leaf");
    tar.append_pax_extensions([("SCHILY.xattr.user.one", b"first value".as_slice())]).unwrap();
    add(&mut tar, "xattrs", b"attributes");
    for number in 0..300 {
        add(&mut tar, &format!("wide/a-rather-long-name-{number:03}"), b"");
    }
    let target = "t".repeat(4095);
    for (name, kind, target) in [
        ("short", tar::EntryType::Symlink, "file"),
        ("long", tar::EntryType::Symlink, target.as_str()),
        ("second", tar::EntryType::Link, "file"),
        ("null", tar::EntryType::Char, ""),
        ("fifo", tar::EntryType::Fifo, ""),
    ] {
        let mut header = header(0);
        header.set_entry_type(kind);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        match target {
            "" => tar.append_data(&mut header, name, std::io::empty()).unwrap(),
            _ => tar.append_link(&mut header, name, target).unwrap(),
        }
    }
    let out = tempfile::tempdir().unwrap();
    let stream = Box::new(Cursor::new(tar.into_inner().unwrap()));
    let mut spec = BuildSpec::new(Source::Archive { name: "sample.tar".into(), stream }, out.path());
    (spec.compression, spec.chunk_size, spec.threads) = (Compression::None, 4096, NonZeroUsize::MIN);
    std::fs::read(build(spec, &()).unwrap().bootstrap).unwrap()
}

fn header(len: usize) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(len as u64);
    header.set_mode(0o644);
    header
}

fn add(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    tar.append_data(&mut header(content.len()), path, content).unwrap();
}

/// The image of [`bytes`].
pub(super) fn image() -> Image {
    Image::parse(bytes()).unwrap()
}

/// The sample while it is being damaged.
pub(super) struct Patch {
    pub(super) bytes: Vec<u8>,
}

impl Patch {
    pub(super) fn new() -> Self {
        Self { bytes: bytes() }
    }

    /// Writes `new` at byte `at`.
    pub(super) fn put(&mut self, at: u64, new: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.bytes[at..at + new.len()].copy_from_slice(new);
    }

    /// The image as it is now.
    pub(super) fn image(&self) -> Image {
        Image::parse(self.bytes.clone()).unwrap()
    }
}
