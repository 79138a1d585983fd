//! Spoilt bootstraps: whoever looks at one gets errors or an image, at a bounded price.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rafsd::blob::BlobTables;
use rafsd::format::array_at;
use rafsd::image::{Image, ImageError, Kind};
use rafsd::tools::stat::stat;

use super::allocations::peak_of;
use super::mutation::{Mutation, flips, for_each_case, odd_value};
use super::sample::{KITS, Sample};
use super::support::tree::Random;
use super::support::{building, skip};

/// Most memory that looking at a spoilt copy of the sample may take; a sound one takes below
/// 100 KiB.
const MEMORY: usize = 4 << 20;

/// Does everything that reading an image can do, and tells whether all of it worked.
fn look_at_everything(bootstrap: Vec<u8>, stored: &[u8]) -> bool {
    let Ok(image) = Image::parse(bootstrap) else { return false };
    let report = rafsd::image::check::check(&image);
    let mut sound = report.is_sound();
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        sound &= visit.and_then(|visit| look_at_inode(&image, &visit.inode)).is_ok();
    }
    for nid in [0, 1, u64::MAX, u64::MAX / 32, image.summary().bootstrap_len / 32] {
        // Most are not inodes at all; only what else they do matters.
        let _ = image.inode(nid).and_then(|inode| look_at_inode(&image, &inode));
    }
    for device in image.devices() {
        let Ok(tables) = BlobTables::new(&device.entry) else { return false };
        let at = tables.stored();
        let Ok(bytes) = array_at::<u8>(stored, at.start(), at.len(), "tables") else { return false };
        let map = tables.geometry(bytes).and_then(|map| tables.with_digests(map, image.chunk_records().iter()));
        sound &= map.is_ok();
    }
    sound
}

fn look_at_inode(image: &Image, inode: &rafsd::image::Inode) -> Result<(), ImageError> {
    if inode.kind == Kind::Directory {
        image.list(inode, &mut |entry| {
            assert!(!entry.name.is_empty() && !entry.name.contains(&b'/') && entry.name.len() < 256);
            ControlFlow::Continue(())
        })?;
    }
    let mut next = 0;
    image.extents(inode, &mut |extent| {
        use rafsd::image::Extent::{Device, Hole, Inline};
        let (at, len) = match extent {
            Hole { at, len } => (at, len),
            Inline { at, bytes } => (at, bytes.len() as u64),
            Device { at, device, decoded } => {
                assert!(decoded.end() <= image.devices()[device].len, "{decoded} lies outside of its device");
                (at, decoded.len())
            }
        };
        assert!(at == next && len > 0, "extents leave no gap");
        next = at + len;
        ControlFlow::Continue(())
    })?;
    assert!(next == inode.size || matches!(inode.layout, rafsd::image::Layout::None), "extents cover the file");
    Ok(())
}

fn check(what: &'static str, cases: Vec<Mutation>, sample: Sample) {
    assert!(look_at_everything(sample.bootstrap.clone(), &sample.stored), "the sample itself is sound");
    for_each_case(what, cases, move |mutation| {
        let bad = mutation.of(&sample.bootstrap);
        let (_, peak) = peak_of(|| look_at_everything(bad, &sample.stored));
        assert!(peak < MEMORY, "{peak} bytes of memory");
    });
}

#[test]
fn every_bit_of_superblocks_and_tables_of_devices_may_flip() {
    let sample = Sample::new(KITS[0]);
    let heads = ["superblock", "extended superblock", "device slot", "blob entry"];
    let regions = sample.regions();
    let cases: Vec<_> =
        regions.iter().filter(|region| heads.contains(&region.name)).flat_map(|region| flips(region.bytes())).collect();
    assert_eq!(cases.len(), (128 + 256 + 128 + 256) * 8);
    check("flipped head", cases, sample);
}

#[test]
fn bits_of_all_other_structures_may_flip() {
    for (seed, kit) in (1..).zip(KITS) {
        let sample = Sample::new(kit);
        let mut random = Random::new(seed);
        let mut cases = Vec::new();
        for name in ["chunk record", "inode", "xattr", "chunk index", "directory entry"] {
            let all: Vec<_> = sample
                .regions()
                .iter()
                .filter(|region| region.name == name)
                .flat_map(|region| flips(region.bytes()))
                .collect();
            let mut pick = || all[usize::try_from(random.below(all.len() as u64)).unwrap()].clone();
            cases.extend((0..300).map(|_| pick()));
        }
        check("flipped structure", cases, sample);
    }
}

#[test]
fn fields_may_have_impossible_values_alone_and_together() {
    for (seed, kit) in (10..).zip(KITS) {
        let sample = Sample::new(kit);
        let regions = sample.regions();
        let mut random = Random::new(seed);
        let names = [
            "superblock",
            "extended superblock",
            "device slot",
            "blob entry",
            "chunk record",
            "inode",
            "xattr",
            "chunk index",
            "directory entry",
        ];
        let mut odd = |number: usize| {
            let name = names[number % names.len()];
            let of_kind: Vec<_> = regions.iter().filter(|region| region.name == name).collect();
            let region = of_kind[usize::try_from(random.below(of_kind.len() as u64)).unwrap()];
            odd_value(&mut random, region.bytes(), &sample.bootstrap)
        };
        let mut cases: Vec<_> = (0..1200).map(&mut odd).collect();
        cases.extend((0..300).map(|n| Mutation::Both(Box::new(odd(n)), Box::new(odd(n + n / 9)))));
        check("odd value", cases, sample);
    }
}

#[test]
fn bootstraps_may_end_anywhere() {
    let sample = Sample::new(KITS[1]);
    let len = sample.bootstrap.len();
    let mut cuts = vec![0, 1, 511, 512, 513, len - 1, len - 512, len - 4096];
    for region in sample.regions() {
        for record in 0..=region.records {
            let boundary = region.at + record * region.size;
            cuts.extend([boundary - 1, boundary, boundary + 1]);
            // The file's length is a multiple of 512, and nothing else is looked at further.
            cuts.extend([boundary / 512 * 512, boundary.next_multiple_of(512)]);
        }
    }
    cuts.extend((0..len).step_by(512));
    cuts.retain(|cut| *cut < len);
    cuts.sort_unstable();
    cuts.dedup();
    assert!(cuts.len() > 1000, "{}", cuts.len());
    for cut in cuts.iter().filter(|cut| !cut.is_multiple_of(512)) {
        assert!(Image::parse(sample.bootstrap[..*cut].to_vec()).is_err(), "cut at {cut}");
    }
    check("cut", cuts.into_iter().map(|len| Mutation::Cut { len }).collect(), sample);
}

/// Images of several blobs, which our own builder does not make. They are not part of the project:
/// the folder is `RAFSD_INTEROP`, or `../shared/interop` beside the checkout.
#[test]
fn bootstraps_of_several_blobs_may_be_spoilt() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/interop");
    let folder = std::env::var_os("RAFSD_INTEROP").map_or(default, PathBuf::from);
    if !folder.is_dir() {
        return skip("bootstraps_of_several_blobs_may_be_spoilt", "no images of other builders");
    }
    for (seed, name) in (90..).zip(["v6-merged", "v6-dict"]) {
        let bootstrap = fs::read(folder.join(name).join("bootstrap")).unwrap();
        let devices = Image::parse(bootstrap.clone()).unwrap().devices().len();
        assert!(devices > 1, "{name}");
        let tables = 1024..1408 + devices * 128;
        let mut random = Random::new(seed);
        let mut below = |limit: usize| usize::try_from(random.below(limit as u64)).unwrap();
        let mut cases: Vec<_> =
            (0..150).map(|n| Mutation::Flip { at: tables.start + below(tables.len()), bit: n % 8 }).collect();
        cases.extend((0..150).map(|n| Mutation::Flip { at: below(bootstrap.len()), bit: n % 8 }));
        cases.extend((0..100).map(|_| odd_value(&mut random, 0..bootstrap.len(), &bootstrap)));
        for_each_case(name, cases, move |mutation| {
            let bad = mutation.of(&bootstrap);
            let (_, peak) = peak_of(|| look_at_everything(bad, &[]));
            assert!(peak < MEMORY, "{peak} bytes of memory");
        });
    }
}

#[test]
fn sizes_of_links_and_directories_are_added_up_without_overflow() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    for name in ["a", "b", "c"] {
        fs::create_dir_all(source.join("directories").join(name)).unwrap();
        std::os::unix::fs::symlink("target", source.join(name)).unwrap();
    }
    let report = building::build(&source, &dir.path().join("image")).unwrap();
    let mut bytes = fs::read(&report.bootstrap).unwrap();
    let sound = Image::parse(bytes.clone()).unwrap();
    for name in ["a", "b", "c"] {
        let inode = sound.lookup(name.as_bytes()).unwrap().unwrap();
        let size = usize::try_from(sound.summary().meta_start + inode.nid * 32 + 8).unwrap();
        bytes[size..size + 8].copy_from_slice(&i64::MAX.to_le_bytes());
    }

    let stat = stat(&[("image".into(), Image::parse(bytes).unwrap())]).unwrap();

    assert_eq!(stat.images[0].symlink_bytes, u64::MAX);
}

/// A root directory whose entries all name the same regular file or directory, over and over.
#[test]
fn directories_that_share_blocks_or_contain_themselves_end() {
    let sample = Sample::new(KITS[0]);
    let image = sample.image();
    let root = image.inode(image.summary().root).unwrap();
    let entries: Vec<_> = sample.regions().into_iter().filter(|region| region.name == "directory entry").collect();
    let mut nids = Vec::new();
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        let inode = visit.unwrap().inode;
        if inode.kind == Kind::Directory {
            nids.push(inode.nid);
        }
    }
    nids.push(root.nid);
    let mut cases = Vec::new();
    for target in nids {
        let all = entries.iter().flat_map(|region| (0..region.records).map(|record| region.at + record * region.size));
        let writes = all.map(|at| Mutation::Write { at, bytes: target.to_le_bytes().to_vec() });
        cases.extend(writes.reduce(|first, second| Mutation::Both(Box::new(first), Box::new(second))));
    }
    check("circle", cases, sample);
}
