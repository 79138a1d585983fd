//! Two images that list different chunks of one blob, in one cache.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rafsd::base::{BlobId, ByteRange};
use rafsd::blob::{BlobTables, Check, UnitMap};
use rafsd::build::lift;
use rafsd::cache::{Device, Fill, Store, StoreOptions, fill_blocking};
use rafsd::image::v5::Bootstrap;
use rafsd::image::{Extent, Image};
use rafsd::reader::{Mapped, maps};
use rafsd::source::LocalSource;
use tempfile::TempDir;

use crate::everything;
use crate::support::v5::{Tree, Writer};

struct Shared {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
    blob: BlobId,
    /// Images that list some of the chunks, and all.
    some: Image,
    others: Image,
}

impl Shared {
    fn new() -> Self {
        let mut writer = Writer::default();
        // The blob with everything, as it is before anything is left out.
        writer.image(&everything());
        let mut part = |names: [&str; 2]| {
            let part: Tree =
                everything().into_iter().filter(|(name, _)| names.iter().any(|n| n.as_bytes() == name)).collect();
            let written = writer.image(&part);
            Image::parse(lift(&Bootstrap::parse(&written.bytes).unwrap()).unwrap()).unwrap()
        };
        let (some, others) = (part(["\u{e9}", "one"]), part(["zeros", "one"]));
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("blobs")).unwrap();
        fs::write(dir.path().join("blobs").join(writer.id()), &writer.blob).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        Self { dir, runtime, blob: writer.id().parse().unwrap(), some, others }
    }

    fn store(&self) -> Arc<Store> {
        Store::open(&self.dir.path().join("cache"), StoreOptions::default(), self.runtime.handle().clone()).unwrap()
    }

    fn source(&self) -> Arc<LocalSource> {
        Arc::new(LocalSource::new(self.dir.path().join("blobs")).unwrap())
    }

    fn map(&self, image: &Image) -> UnitMap {
        let tables = BlobTables::new(&image.devices()[0].entry).unwrap();
        let source = self.source();
        let stored = maps::fetch([&tables], &*source, self.runtime.handle()).next().unwrap().unwrap();
        Mapped::new(&tables, &stored, image).unwrap().map
    }
}

/// The ranges of the device behind a file.
fn ranges(image: &Image, path: &str) -> Vec<ByteRange> {
    let inode = image.lookup(path.as_bytes()).unwrap().unwrap();
    let mut ranges = Vec::new();
    image
        .extents(&inode, &mut |extent| {
            if let Extent::Device { decoded, .. } = extent {
                ranges.push(decoded);
            }
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    ranges
}

/// What the cache has of a file, which is all there.
fn content(device: &Device, image: &Image, path: &str) -> Vec<u8> {
    let file = device.open_data().unwrap();
    let mut content = Vec::new();
    for range in ranges(image, path) {
        assert!(device.present(range), "{range} of {path}");
        let mut piece = vec![0; usize::try_from(range.len()).unwrap()];
        file.read_exact_at(&mut piece, range.start()).unwrap();
        content.extend_from_slice(&piece);
    }
    content
}

fn fill(device: &Device, image: &Image, path: &str) {
    ranges(image, path).into_iter().for_each(|range| fill_blocking(device, range).unwrap());
}

#[test]
fn images_that_list_different_chunks_share_one_directory_while_it_is_open_and_later() {
    let shared = Shared::new();
    let all = crate::contents(&everything());
    let (some, others) = (shared.map(&shared.some), shared.map(&shared.others));
    assert!(some.is_listed() && some != others && some.count() == others.count());
    let e = "\u{e9}";
    {
        let store = shared.store();
        let first = store.device(some.clone(), shared.source()).unwrap();
        fill(&first, &shared.some, e);
        assert!(!first.present(ranges(&shared.others, "zeros")[0]), "nobody knows that yet");
        assert!(fill_blocking(&*first, ranges(&shared.others, "zeros")[0]).is_err());

        let second = store.device(others.clone(), shared.source()).unwrap();
        assert!(Arc::ptr_eq(&first, &second), "one device for both");
        fill(&first, &shared.others, "zeros");
        for (image, path) in [(&shared.some, e), (&shared.others, "zeros")] {
            assert!(content(&first, image, path) == all[path.as_bytes()], "{path}");
        }
        assert_eq!(store.directories(), [shared.blob.to_string()]);
        store.close().unwrap();
    }
    // Whoever comes first now, what was there is there.
    for map in [others, some] {
        let store = shared.store();
        let device = store.device(map, shared.source()).unwrap();
        for (image, path) in [(&shared.some, e), (&shared.others, "zeros")] {
            assert!(content(&device, image, path) == all[path.as_bytes()], "{path}");
        }
        assert_eq!(store.directories(), [shared.blob.to_string()]);
        store.say_uses_are_known();
        let report = store.shelves().verify(shared.blob.as_str(), &mut |_| true).unwrap();
        assert!(report.spoilt.is_empty(), "{:?}", report.spoilt);
    }
}

#[test]
fn a_complete_device_is_incomplete_again_when_another_image_lists_more() {
    let shared = Shared::new();
    let store = shared.store();
    let device = store.device(shared.map(&shared.some), shared.source()).unwrap();
    ["\u{e9}", "one"].into_iter().for_each(|path| fill(&device, &shared.some, path));
    device.flush().unwrap();
    assert!(device.is_complete_durable());

    assert!(device.learn(shared.map(&shared.others), shared.source()));

    assert!(!device.is_complete_durable());
    fill(&device, &shared.others, "zeros");
    device.flush().unwrap();
    assert!(device.is_complete_durable());
}

#[test]
fn an_image_that_places_a_chunk_elsewhere_gets_a_directory_of_its_own() {
    let shared = Shared::new();
    let store = shared.store();
    let honest = store.device(shared.map(&shared.some), shared.source()).unwrap();
    let lying = |change: fn(&mut rafsd::blob::Unit)| {
        let map = shared.map(&shared.others);
        let units = (0..).zip(map.units().iter().copied()).filter(|(_, unit)| !unit.is_vacant());
        let units = units.map(|(index, mut unit)| {
            change(&mut unit);
            (index, unit)
        });
        UnitMap::listed(map.blob().clone(), map.decoded_len(), map.count(), units).unwrap()
    };
    let digests = lying(|unit| unit.check = Check::Blake3([9; 32]));
    let places = lying(|unit| unit.stored = ByteRange::at(unit.stored.start() + 1, unit.stored.len()).unwrap());
    for (number, map) in [digests, places].into_iter().enumerate() {
        // They agree about `one` with nobody.
        let device = store.device(map, shared.source()).unwrap();
        assert!(!Arc::ptr_eq(&honest, &device));
        assert_eq!(store.directories().len(), number + 2);
    }
    assert!(honest.learn(shared.map(&shared.others), shared.source()));
}
