//! Images made by Nydus's own builder open here, and every chunk of theirs decodes.
//!
//! The images are not part of the project: the folder is `RAFSD_INTEROP`, or `../shared/interop`
//! beside the checkout. Without it the tests say that they skip.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rafsd::blob::{BlobTables, Check, decode};
use rafsd::image::{Extent, Image, Kind};

fn folder() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/interop");
    let folder = std::env::var_os("RAFSD_INTEROP").map_or(default, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: no images of other builders at {}", folder.display());
    None
}

/// Reads a whole image file by file, through the same tables and checks that serving uses, and
/// gives path, kind, size and content digest of each entry.
fn read_all(image: &Image, blobs: &Path) -> BTreeMap<Vec<u8>, (Kind, u64, String)> {
    let devices: Vec<_> = image
        .devices()
        .iter()
        .map(|device| {
            let stored = fs::read(blobs.join(device.blob.as_str())).expect("blob");
            let tables = BlobTables::new(&device.entry).expect("tables");
            let at = tables.stored();
            let ci = &stored[usize::try_from(at.start()).unwrap()..usize::try_from(at.end()).unwrap()];
            let map = tables.geometry(ci).expect("geometry");
            let map = tables.with_digests(&map, image.chunk_records().iter()).expect("digests");
            (map, stored)
        })
        .collect();
    let mut out = BTreeMap::new();
    let mut walk = image.walk();
    while let Some(step) = walk.next_visit() {
        let step = step.expect("sound inode");
        let path = step.path.join(&b"/"[..]);
        let mut content = blake3::Hasher::new();
        let mut read = 0;
        let mut visit = |extent: Extent<'_>| {
            match extent {
                // The blocks of a directory hold inode numbers, which depend on the layout.
                Extent::Inline { .. } if step.inode.kind == Kind::Directory => &mut content,
                Extent::Inline { bytes, .. } => content.update(bytes),
                Extent::Hole { .. } => panic!("RAFS writes no holes"),
                Extent::Device { device, decoded, .. } => {
                    let (map, stored) = &devices[device];
                    let unit = map.get(map.find(decoded.start()).expect("mapped")).unwrap();
                    assert_ne!(unit.check, Check::Unknown, "every chunk of a file has a digest");
                    let from = usize::try_from(unit.stored.start()).unwrap();
                    let to = usize::try_from(unit.stored.end()).unwrap();
                    let mut plain = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
                    decode(unit, map.key(), &stored[from..to], &mut plain).expect("decodes");
                    read += decoded.len();
                    content.update(&plain[..usize::try_from(decoded.len()).unwrap()])
                }
            };
            ControlFlow::Continue(())
        };
        image.extents(&step.inode, &mut visit).expect("extents");
        if step.inode.kind == Kind::Regular {
            assert_eq!(read, step.inode.size);
        }
        out.insert(path, (step.inode.kind, step.inode.size, content.finalize().to_string()));
    }
    out
}

#[test]
fn native_images_of_every_codec_and_digest_hold_the_same_tree() {
    let Some(folder) = folder() else { return };
    let lines = fs::read_to_string(folder.join("tree.jsonl")).unwrap().lines().count();
    let mut first: Option<BTreeMap<_, _>> = None;
    for name in ["v6-none", "v6-zstd", "v6-lz4_block", "v6-sha256-1m", "v6-prefetch", "v6-tar"] {
        let dir = folder.join(name);
        let image = Image::open(&dir.join("bootstrap")).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let mut tree = read_all(&image, &dir.join("blobs"));
        // Directory sizes depend on nothing but names; the root's own entry is the same everywhere.
        assert!(tree.len().abs_diff(lines) <= 1, "{name}: {} entries, the listing has {lines}", tree.len());
        tree.retain(|_, (kind, ..)| *kind != Kind::Socket);
        match &first {
            None => first = Some(tree),
            Some(first) => assert!(*first == tree, "{name} differs from the first image"),
        }
    }
}

#[test]
fn images_of_several_blobs_are_read_whole() {
    let Some(folder) = folder() else { return };
    for name in ["v6-merged", "v6-dict"] {
        let dir = folder.join(name);
        let image = Image::open(&dir.join("bootstrap")).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert!(image.devices().len() > 1, "{name} has several blobs");
        assert!(read_all(&image, &dir.join("blobs")).len() > 10, "{name}");
    }
}

#[test]
fn kinds_that_cannot_be_served_yet_are_refused_by_name() {
    let Some(folder) = folder() else { return };
    let refused = |name: &str| {
        let image = Image::open(&folder.join(name).join("bootstrap")).map_err(|e| format!("{e:?}"))?;
        let tables = image.devices().iter().map(|d| BlobTables::new(&d.entry)).collect::<Result<Vec<_>, _>>();
        tables.map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(refused("v6-zran").unwrap_err().contains("gzip layer"));
    assert!(refused("v6-batch").unwrap_err().contains("batched"));
    assert!(refused("v6-encrypt").unwrap_err().contains("encrypted"));
    assert!(refused("v6-tarfs").unwrap_err().contains("tarfs"));
    assert!(refused("v5-zstd").is_err());
}
