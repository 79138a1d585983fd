//! The bootstrap in the last layer of an image: a tar, compressed or not, in which it is `image/image.boot`, or
//! `image.boot` in old images.
//!
//! The layer must have been checked before it comes here. It is hostile all the same: whoever made the image
//! chose its digest too.

use std::io::{self, BufRead, BufReader, Read};

/// Longest layer with a bootstrap that is fetched, in bytes.
pub const MAX_LAYER: u64 = 512 << 20;

/// Longest bootstrap that is taken out of one, in bytes.
const MAX_BOOTSTRAP: u64 = 512 << 20;

/// Most bytes that a layer may unfold to: the bootstrap, and what else may lie beside it.
const MAX_UNPACKED: u64 = 2 << 30;

/// Most entries that are looked at.
const MOST_ENTRIES: usize = 65_536;

const PATH: &str = "image/image.boot";
const OLD_PATH: &str = "image.boot";

/// Why a layer gives no bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("it has {size} bytes; a layer with a bootstrap has at most 512 MiB")]
    TooLong { size: u64 },
    #[error("it cannot be kept while it is looked at")]
    Scratch(#[source] io::Error),
    #[error("it is damaged, or no tar")]
    Damaged(#[source] io::Error),
    #[error("it has no image/image.boot")]
    Missing,
    #[error("its bootstrap has {size} bytes; at most 512 MiB are taken")]
    LongBootstrap { size: u64 },
    #[error("it has more than 65536 entries")]
    TooMany,
}

/// Takes the bootstrap out of a layer. How it is compressed is seen from its first bytes, whatever its media type.
pub fn unpack(layer: impl Read) -> Result<Vec<u8>, LayerError> {
    let mut layer = BufReader::with_capacity(1 << 16, layer);
    let magic: [u8; 4] = {
        let start = layer.fill_buf().map_err(LayerError::Damaged)?;
        let mut magic = [0; 4];
        let len = start.len().min(4);
        magic[..len].copy_from_slice(&start[..len]);
        magic
    };
    match magic {
        [0x1f, 0x8b, ..] => find(flate2::bufread::MultiGzDecoder::new(layer)),
        [0x28, 0xb5, 0x2f, 0xfd] => find(zstd::stream::read::Decoder::with_buffer(layer).map_err(LayerError::Damaged)?),
        _ => find(layer),
    }
}

fn find(plain: impl Read) -> Result<Vec<u8>, LayerError> {
    // What is cut off here shows as a damaged tar.
    let mut archive = tar::Archive::new(plain.take(MAX_UNPACKED));
    let mut old = None;
    // Raw: extensions, which the library would read whole into memory, are entries like others and passed over. Both
    // names fit into a plain header.
    let entries = archive.entries().map_err(LayerError::Damaged)?.raw(true);
    for (number, entry) in entries.enumerate() {
        if number >= MOST_ENTRIES {
            return Err(LayerError::TooMany);
        }
        let mut entry = entry.map_err(LayerError::Damaged)?;
        let path = entry.path_bytes().into_owned();
        let path = path.strip_prefix(b"./").unwrap_or(&path);
        let is_old = path == OLD_PATH.as_bytes();
        if !(is_old && old.is_none()) && path != PATH.as_bytes() || !entry.header().entry_type().is_file() {
            continue;
        }
        let size = entry.size();
        if size > MAX_BOOTSTRAP {
            return Err(LayerError::LongBootstrap { size });
        }
        // Of two only one is in memory.
        drop(old.take());
        // Grows with what comes; nobody has vouched for the length.
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(LayerError::Damaged)?;
        if bytes.len() as u64 != size {
            return Err(LayerError::Damaged(io::ErrorKind::UnexpectedEof.into()));
        }
        if !is_old {
            return Ok(bytes);
        }
        old = Some(bytes);
    }
    old.ok_or(LayerError::Missing)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn tar_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o444);
            builder.append_data(&mut header, path, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_bootstrap_is_found_however_the_layer_is_compressed() {
        let layer = tar_of(&[
            ("image.boot", b"old"),
            ("image/aa.blob.meta", b"tables"),
            ("./image/image.boot", b"the bootstrap"),
        ]);
        for layer in [layer.clone(), gzip(&layer), zstd::encode_all(&layer[..], 1).unwrap()] {
            assert_eq!(unpack(&layer[..]).unwrap(), b"the bootstrap");
        }
        assert_eq!(unpack(&tar_of(&[("image.boot", b"old"), ("x", b"")])[..]).unwrap(), b"old");
    }

    #[test]
    fn what_a_library_would_read_whole_is_passed_over() {
        // A long name that is announced with 1 TiB, of which nothing comes.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        assert!(matches!(unpack(&header.as_bytes()[..]), Err(LayerError::Damaged(_) | LayerError::Missing)));

        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        let record = b"17 path=elsewhere\n";
        header.set_size(record.len() as u64);
        builder.append_data(&mut header, "pax", &record[..]).unwrap();
        let mut layer = builder.into_inner().unwrap();
        layer.truncate(1024);
        layer.extend(tar_of(&[("image/image.boot", b"the bootstrap")]));
        assert_eq!(unpack(&layer[..]).unwrap(), b"the bootstrap");
    }

    #[test]
    fn what_holds_none_is_refused() {
        assert!(matches!(unpack(&tar_of(&[("other", b"x")])[..]), Err(LayerError::Missing)));
        assert!(matches!(unpack(&b""[..]), Err(LayerError::Missing)));
        let mut link = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        link.append_link(&mut header, PATH, "/etc/shadow").unwrap();
        assert!(matches!(unpack(&link.into_inner().unwrap()[..]), Err(LayerError::Missing)));
    }

    #[test]
    fn what_is_cut_or_damaged_is_refused() {
        let layer = tar_of(&[(PATH, &[7; 5000])]);
        for len in [100, 513, 4000, 5511] {
            assert!(matches!(unpack(&layer[..len]), Err(LayerError::Damaged(_))), "{len}");
        }
        let packed = gzip(&layer);
        assert!(matches!(unpack(&packed[..packed.len() / 2]), Err(LayerError::Damaged(_))));
        assert!(matches!(unpack(&[9; 2000][..]), Err(LayerError::Damaged(_))));
    }

    #[test]
    fn a_length_that_lies_takes_no_room() {
        let mut header = tar::Header::new_ustar();
        header.set_path(PATH).unwrap();
        header.set_size(MAX_BOOTSTRAP);
        header.set_cksum();
        assert!(matches!(unpack(&header.as_bytes()[..]), Err(LayerError::Damaged(_))));
        header.set_size(MAX_BOOTSTRAP + 1);
        header.set_cksum();
        assert!(matches!(unpack(&header.as_bytes()[..]), Err(LayerError::LongBootstrap { .. })));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_answer(mut layer in proptest::collection::vec(proptest::num::u8::ANY, 0..2048), kind in 0usize..3) {
            let magic: &[u8] = [&[0x1f, 0x8b, 8, 0][..], &[0x28, 0xb5, 0x2f, 0xfd], &[]][kind];
            let len = magic.len().min(layer.len());
            layer[..len].copy_from_slice(&magic[..len]);
            let _ = unpack(&layer[..]);
        }
    }
}
