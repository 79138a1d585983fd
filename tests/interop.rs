//! Images made by Nydus's own builder open here, and every chunk of theirs decodes.
//!
//! The images are not part of the project: the folder is `RAFSD_INTEROP`, or `../shared/interop`
//! beside the checkout. Without it the tests say that they skip.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rafsd::blob::{BlobTables, Check, decode};
use rafsd::image::check::{Code, Severity, check};
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
fn every_bootstrap_of_the_reference_builder_is_sound() {
    let Some(folder) = folder() else { return };
    let names = [
        "v6-none",
        "v6-zstd",
        "v6-lz4_block",
        "v6-sha256-1m",
        "v6-prefetch",
        "v6-tar",
        "v6-merged",
        "v6-dict",
        "v6-batch",
        "v6-encrypt",
        "v6-zran",
        "v6-tarfs",
    ];
    for name in names {
        let image = Image::open(&folder.join(name).join("bootstrap")).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let report = check(&image);
        let errors = report.findings.iter().filter(|finding| finding.severity == Severity::Error);
        assert_eq!(errors.map(ToString::to_string).collect::<Vec<_>>(), [] as [String; 0], "{name}");
        let remarks: BTreeSet<_> = report.findings.iter().map(|finding| finding.code).collect();
        // The reference writer spoils long link targets in blocks of 512 bytes.
        let known: &[Code] = if name == "v6-tarfs" { &[Code::TarfsSymlink] } else { &[] };
        assert!(remarks.iter().eq(known), "{name}: {remarks:?}");
        assert_eq!(report.paths, image.summary().paths, "{name}");
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
    assert!(refused("v6-tarfs").unwrap_err().contains("plain tar layer"));
    assert!(refused("v5-zstd").is_err());
}

#[test]
fn bootstraps_whose_data_is_a_tar_layer_list_the_same_tree() {
    let Some(folder) = folder() else { return };
    let tree = |name: &str| {
        let image = Image::open(&folder.join(name).join("bootstrap")).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let entries = image.walk().map(|entry| entry.unwrap_or_else(|e| panic!("{name}: {e}")));
        let facts = entries.map(|entry| {
            let inode = entry.inode;
            let mut rest = Vec::new();
            image
                .xattrs(&inode, &mut |xattr| {
                    rest.push((xattr.name(), xattr.value.to_vec()));
                    ControlFlow::Continue(())
                })
                .unwrap();
            rest.sort();
            // The reference writer damages targets of more than one block of 512 bytes.
            if inode.kind == Kind::Symlink && inode.size <= 512 {
                rest.push((b"-> ".to_vec(), image.symlink(&inode).unwrap().into_owned()));
            }
            let mut bytes = 0;
            let mut visit = |extent: Extent<'_>| {
                if let Extent::Device { decoded, .. } = extent {
                    bytes += decoded.len();
                }
                ControlFlow::Continue(())
            };
            image.extents(&inode, &mut visit).unwrap();
            assert!(inode.kind != Kind::Regular || bytes == inode.size, "{name}");
            assert_eq!(image.lookup(&entry.path).unwrap(), Some(inode), "{name}");
            // Sizes of directories depend on the block size, time and owner of the root on the source.
            let size = if inode.kind == Kind::Directory { 0 } else { inode.size };
            (entry.path, (inode.kind, inode.permissions, inode.nlink, size, inode.rdev, rest))
        });
        facts.filter(|(path, _)| !path.is_empty()).collect::<BTreeMap<_, _>>()
    };
    let native = tree("v6-tar");
    for name in ["v6-zran", "v6-tarfs"] {
        let found = tree(name);
        let differ = native.iter().find(|(path, facts)| found.get(*path) != Some(facts));
        let path = differ.map(|(path, _)| path.escape_ascii().to_string());
        assert_eq!((path, found.len()), (None, native.len()), "{name}");
    }
}
