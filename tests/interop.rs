//! Images made by Nydus's own builder open here, and every chunk of theirs decodes.
//!
//! Without them (`support/interop.rs`) the tests say that they skip.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use rafsd::base::BlobId;
use rafsd::blob::{BlobKind, BlobTables, Check, DecodeError, Decoder, UnitMap, decode};
use rafsd::codec;
use rafsd::format::rafs::{BlobEntry, ExtSuperblock};
use rafsd::format::{array_at, rafs5, record_at};
use rafsd::image::check::{Code, Severity, check};
use rafsd::image::v5::Bootstrap;
use rafsd::image::{Extent, Image, Kind, Origin};
use rafsd::reader::bootstrap;
use rafsd::tools::check::v5;
use support::interop::{SERVED, V5, folder};
use zerocopy::little_endian::U32;

/// The image in `dir`, by its bootstrap or by the blob that holds it.
fn open(dir: &Path) -> Image {
    let file = dir.join("bootstrap");
    let file = if file.exists() {
        file
    } else {
        let mut blobs = fs::read_dir(dir.join("blobs")).expect("blobs");
        blobs.next().expect("one blob").expect("readable").path()
    };
    let loaded = bootstrap::load(&file).unwrap_or_else(|e| panic!("{}: {e:?}", dir.display()));
    Image::parse(loaded.bytes).unwrap_or_else(|e| panic!("{}: {e:?}", dir.display()))
}

fn cut(bytes: &[u8], range: rafsd::base::ByteRange) -> &[u8] {
    &bytes[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
}

/// The map of each device and the stored bytes behind it.
fn devices(image: &Image, read: &dyn Fn(&BlobId) -> Vec<u8>) -> Vec<(UnitMap, Vec<u8>)> {
    let map = |device: &rafsd::image::Device| {
        let tables = BlobTables::new(&device.entry).expect("tables");
        let home = read(tables.home());
        let map = tables.geometry(cut(&home, tables.stored())).expect("geometry");
        let map = tables.with_digests(map, image.chunk_records().iter()).expect("digests");
        (map, read(&device.blob))
    };
    image.devices().iter().map(map).collect()
}

/// A path as the listings write it: bytes that are no UTF-8 as `\xNN`.
fn escaped(path: &[u8]) -> String {
    let mut out = String::new();
    for chunk in path.utf8_chunks() {
        out.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
    }
    out
}

/// Reads all files of an image, through the same tables and checks that serving uses, and gives the
/// SHA-256 of each.
fn read_all(image: &Image, blobs: &Path) -> BTreeMap<String, String> {
    let read = |blob: &BlobId| fs::read(blobs.join(blob.as_str())).expect("blob");
    let devices = devices(image, &read);
    let mut decoders: Vec<_> = devices.iter().map(|_| Decoder::new()).collect();
    let mut out = BTreeMap::new();
    let mut walk = image.walk();
    while let Some(step) = walk.next_visit() {
        let step = step.expect("sound inode");
        if step.inode.kind != Kind::Regular {
            continue;
        }
        let mut content = Vec::new();
        let mut visit = |extent: Extent<'_>| {
            match extent {
                Extent::Inline { bytes, .. } => content.extend_from_slice(bytes),
                Extent::Hole { .. } => panic!("RAFS writes no holes"),
                Extent::Device { device, decoded, .. } => {
                    let (map, stored) = &devices[device];
                    let unit = map.get(map.find(decoded.start()).expect("mapped")).unwrap();
                    assert_ne!(unit.check, Check::Unknown, "every chunk of a file has a digest");
                    let mut plain = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
                    let bytes = cut(stored, unit.stored);
                    decoders[device].decode(map.key(), unit, bytes, &mut plain).expect("decodes");
                    content.extend_from_slice(&plain[..usize::try_from(decoded.len()).unwrap()]);
                }
            };
            ControlFlow::Continue(())
        };
        image.extents(&step.inode, &mut visit).expect("extents");
        assert_eq!(content.len() as u64, step.inode.size);
        out.insert(escaped(&step.path.join(&b"/"[..])), codec::sha256(&content).to_string());
    }
    out
}

/// Path and SHA-256 of every file in a listing.
fn listed(listing: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(listing).expect("listing");
    let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let field = |row: &serde_json::Value, name: &str| row[name].as_str().map(str::to_owned);
    rows.filter_map(|row| Some((field(&row, "path")?, field(&row, "sha256")?))).collect()
}

#[test]
fn every_file_of_every_kind_of_image_is_what_the_listing_says() {
    let Some(folder) = folder("every_file_of_every_kind_of_image_is_what_the_listing_says") else { return };
    for name in SERVED {
        let dir = folder.join(name);
        let image = open(&dir);
        let expected = fs::read_to_string(dir.join("expect")).expect("what it must show");
        let (want, got) = (listed(&folder.join(expected.trim())), read_all(&image, &dir.join("blobs")));
        let first = want.iter().zip(&got).find(|(want, got)| want != got);
        assert!(want.len() > 10 && first.is_none() && want.len() == got.len(), "{name} differs: {first:?}");
        for device in image.devices() {
            let tables = BlobTables::new(&device.entry).expect("tables");
            assert_eq!(tables.ensure_servable(), Ok(()), "{name}");
        }
    }
}

#[test]
fn every_bootstrap_of_the_reference_builder_is_sound() {
    let Some(folder) = folder("every_bootstrap_of_the_reference_builder_is_sound") else { return };
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
fn the_kinds_are_what_their_names_say() {
    let Some(folder) = folder("the_kinds_are_what_their_names_say") else { return };
    let devices = |name: &str| {
        let dir = folder.join(name);
        devices(&open(&dir), &|blob| fs::read(dir.join("blobs").join(blob.as_str())).expect("blob"))
    };
    assert!(devices("v6-merged").len() > 1 && devices("v6-dict").len() > 1, "several blobs");

    let (batched, _) = devices("v6-batch").remove(0);
    let members = batched.units().iter().filter(|unit| unit.part.is_some()).count();
    assert!(members > 100 && members < batched.units().len(), "{members} members");
    assert!(batched.key().is_none());

    let (encrypted, stored) = devices("v6-encrypt").remove(0);
    assert!(encrypted.units().iter().all(|unit| unit.encrypted) && encrypted.key().is_some());
    let unit = encrypted.units()[0];
    let mut room = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
    assert_eq!(decode(&unit, None, cut(&stored, unit.stored), &mut room), Err(DecodeError::NoKey));
}

#[test]
fn the_index_of_a_gzip_layer_is_checked() {
    let Some(folder) = folder("the_index_of_a_gzip_layer_is_checked") else { return };
    let dir = folder.join("v6-zran");
    let image = open(&dir);
    let layer = fs::read(dir.join("layer.tar.gz")).expect("layer");
    let device = &image.devices()[0];
    let tables = BlobTables::new(&device.entry).expect("tables");
    assert_eq!(tables.kind(), BlobKind::Zran);
    assert_eq!(codec::sha256(&layer).to_string(), device.blob.as_str(), "the layer is the blob");

    let home = fs::read(dir.join("blobs").join(tables.home().as_str())).expect("a file of its own has the tables");
    let map = tables.geometry(cut(&home, tables.stored())).expect("geometry");
    let map = tables.with_digests(map, image.chunk_records().iter()).expect("digests");
    assert!(map.units().len() > 100 && map.units().iter().all(|unit| matches!(unit.check, Check::Sha256(_))));
    assert!(map.units().iter().all(|unit| unit.stored.end() <= layer.len() as u64));
    let contexts = map.contexts().expect("an index has contexts");
    assert!(contexts.all().iter().skip(1).all(|context| contexts.dictionary(context).len() == 32 << 10));

    tables.ensure_servable().expect("every unit has a digest and a way in");
    let saved = UnitMap::from_bytes(&map.to_bytes()).expect("what was saved");
    assert!(saved == map && saved.merge(&map).is_some());
    assert!(saved.clone().entered(None).merge(&map).is_none(), "another way in");
    let unit = &map.units()[100];
    let mut room = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
    saved.decoder().decode(None, unit, cut(&layer, unit.stored), &mut room).expect("a chunk in the middle");
    for at in 0..tables.stored().len().min(4096) {
        let mut bad = cut(&home, tables.stored()).to_vec();
        bad[usize::try_from(at).unwrap()] ^= 1;
        // A flip in compressed tables is damage; whatever decompresses all the same is checked.
        let _ = tables.geometry(&bad).map(|map| tables.with_digests(map, image.chunk_records().iter()));
    }
}

#[test]
fn a_tar_layer_has_a_map_without_digests() {
    let Some(folder) = folder("a_tar_layer_has_a_map_without_digests") else { return };
    // The table alone: the rest of the bootstrap has blocks of another size.
    let bytes = fs::read(folder.join("v6-tarfs/bootstrap")).expect("bootstrap");
    let ext: &ExtSuperblock = record_at(&bytes, 1152, "extended superblock").unwrap();
    let row = &array_at::<BlobEntry>(&bytes, ext.blob_table_offset.get(), 1, "blob table").unwrap()[0];
    let tables = BlobTables::new(row).expect("tables");
    assert_eq!(tables.kind(), BlobKind::Tarfs);
    assert!(tables.stored().is_empty());

    let map = tables.geometry(&[]).expect("geometry");
    let end = map.units().last().unwrap().decoded.end();
    assert_eq!(end, row.uncompressed_size.get());
    assert!(map.covering(rafsd::base::ByteRange::new(0, end).unwrap()).is_some(), "no gaps");
    assert!(map.units().iter().all(|unit| unit.decoded == unit.stored && unit.check == Check::Unknown));
    // Its own name is what it is checked by.
    tables.ensure_servable().unwrap();
}

#[test]
fn images_of_version_5_are_sound_and_so_is_what_they_are_lifted_to() {
    let Some(folder) = folder("images_of_version_5_are_sound_and_so_is_what_they_are_lifted_to") else { return };
    for name in V5 {
        let path = folder.join(name).join("bootstrap");
        let found = bootstrap::find(&path, None).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let before = v5::check(&found.v5().unwrap());
        let image = Image::parse(found.load().unwrap().bytes).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let after = check(&image);
        assert_eq!((&before.findings[..], &after.findings[..]), (&[][..], &[][..]), "{name}");
        assert!(before.paths > 1000 && before.paths == after.paths, "{name}: {} paths", before.paths);
        assert_eq!((before.inodes, before.chunks), (after.inodes, after.chunks), "{name}");
        assert_eq!(image.summary().origin, Origin::V5);
        let lifted = bootstrap::open(&path).unwrap();
        assert_eq!(lifted.bytes(), image.bytes(), "{name}: lifted twice, it is the same");
    }
}

#[test]
fn the_digest_of_every_inode_of_version_5_is_checked() {
    let Some(folder) = folder("the_digest_of_every_inode_of_version_5_is_checked") else { return };
    for name in ["v5-none", "v5-aligned-sha256"] {
        let bytes = fs::read(folder.join(name).join("bootstrap")).unwrap();
        let sb: &rafs5::Superblock = record_at(&bytes, 0, "superblock").unwrap();
        let rows: &[U32] =
            array_at(&bytes, sb.inode_table_offset.get(), sb.inode_table_entries.get().into(), "").unwrap();
        for number in (1..=rows.len()).step_by(7) {
            let mut bytes = bytes.clone();
            bytes[rows[number - 1].get() as usize * 8 + 5] ^= 0x40;
            let report = v5::check(&Bootstrap::parse(&bytes).unwrap());
            let found: Vec<_> = report.findings.iter().map(|finding| (finding.code, &*finding.place)).collect();
            // The digest of a directory is over those of its children, and no further up.
            let own = (Code::InodeDigest, &*format!("inode {number}"));
            assert!(found.contains(&own) && found.len() == if number == 1 { 1 } else { 2 }, "{name}: {found:?}");
            assert!(found.iter().all(|(code, _)| *code == Code::InodeDigest), "{name}: {found:?}");
        }
    }
}

#[test]
fn bootstraps_whose_data_is_a_tar_layer_list_the_same_tree() {
    let Some(folder) = folder("bootstraps_whose_data_is_a_tar_layer_list_the_same_tree") else { return };
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
