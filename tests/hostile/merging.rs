//! Spoilt bootstraps as layers, parents and dictionaries: an error or an image that can be read.

use std::fs;

use rafsd::build::{Layer, MergeSpec, MergeVersion, Whiteouts, merge};
use rafsd::image::Image;

use super::allocations::peak_of;
use super::mutation::{Mutation, for_each_case, odd_value};
use super::sample::{KITS, Sample};
use super::support::tree::Random;

/// Most memory that a merge with a spoilt copy of the sample may take; a sound one takes below
/// 1 MiB.
const MEMORY: usize = 16 << 20;

fn layer(name: &str, bootstrap: Vec<u8>) -> Option<Layer> {
    Some(Layer { name: name.into(), image: Image::parse(bootstrap).ok()?, id: None })
}

/// Whether the merge worked. If it did, what came out is sound as far as the library can tell.
fn merges(spoilt: &[u8], sound: &[u8], role: u64, out: &std::path::Path) -> bool {
    let (Some(spoilt), Some(sound)) = (layer("spoilt", spoilt.to_vec()), layer("sound", sound.to_vec())) else {
        return false;
    };
    let mut spec = MergeSpec {
        layers: vec![sound],
        parent: None,
        dictionary: None,
        whiteouts: [Whiteouts::Oci, Whiteouts::Overlayfs, Whiteouts::None][usize::try_from(role % 3).unwrap()],
        prefetch: None,
        facts: Vec::new(),
        version: MergeVersion::V6,
        out: out.to_owned(),
    };
    match role % 4 {
        0 => spec.layers.push(spoilt),
        1 => spec.parent = Some(spoilt),
        2 => spec.dictionary = Some(spoilt),
        _ => spec.layers = vec![spoilt],
    }
    if merge(spec, &()).is_err() {
        return false;
    }
    let image = Image::open(out).expect("a merge writes what can be read");
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        let inode = visit.expect("sound inodes").inode;
        image.extents(&inode, &mut |_| std::ops::ControlFlow::Continue(())).expect("sound extents");
        image.xattrs(&inode, &mut |_| std::ops::ControlFlow::Continue(())).expect("sound xattrs");
    }
    true
}

#[test]
fn spoilt_bootstraps_are_refused_or_merged_into_sound_ones() {
    for (seed, kit) in (700..).zip(KITS) {
        let sample = Sample::new(kit);
        // In memory if possible: every merge syncs what it wrote.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let out = dir.path().join("merged");
        for role in 0..4 {
            assert!(merges(&sample.bootstrap, &sample.bootstrap, role, &out), "the sample itself merges");
        }
        let len = sample.bootstrap.len();
        let mut random = Random::new(seed);
        let mut regions = sample.regions();
        regions.retain(|region| !region.bytes().is_empty());
        let mut cases = Vec::new();
        for case in 0..1500 {
            let below = |random: &mut Random, limit: usize| usize::try_from(random.below(limit as u64)).unwrap();
            let region = &regions[below(&mut random, regions.len())];
            let mutation = match case % 5 {
                0 => Mutation::Flip { at: below(&mut random, len), bit: u8::try_from(random.below(8)).unwrap() },
                1 => {
                    let bytes = region.bytes();
                    let at = bytes.start + below(&mut random, bytes.len());
                    Mutation::Flip { at, bit: u8::try_from(random.below(8)).unwrap() }
                }
                _ => odd_value(&mut random, region.bytes(), &sample.bootstrap),
            };
            cases.push((mutation, random.next()));
        }
        let bootstrap = sample.bootstrap.clone();
        for_each_case("merge", cases, move |(mutation, role)| {
            let bad = mutation.of(&bootstrap);
            let (_, peak) = peak_of(|| merges(&bad, &bootstrap, *role, &out));
            assert!(peak < MEMORY, "{peak} bytes of memory");
            let left = fs::read_dir(out.parent().unwrap()).unwrap().count();
            assert!(left <= 1, "nothing half-written is left");
        });
    }
}
