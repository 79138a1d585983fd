//! A bootstrap of RAFS v5: looked at by number, checked, lifted, and what was lifted read as any other. An
//! input describes it as for `bootstrap`: pieces of 32 bytes with their places.

use rafsd::blob::{BlobTables, UnitMap};
use rafsd::build::lift;
use rafsd::image::v5::{Bootstrap, Inode};
use rafsd::image::{Image, Kind, Origin, check};
use rafsd::reader::ensure_checkable;
use rafsd::tools::check::v5;

use super::bootstrap::unpack;

/// Paths that are looked at.
const MAX_VISITS: u32 = 300;

pub fn run(input: &[u8]) {
    let bytes = unpack(input);
    let Ok(image) = Bootstrap::parse(&bytes) else { return };
    for number in 0..=image.paths().min(MAX_VISITS) {
        if let Ok(inode) = image.inode(number) {
            look_at(&image, &inode);
        }
    }
    let found = v5::check(&image);
    let Ok(bytes) = lift(&image) else { return };
    assert!(lift(&image).expect("as before") == bytes, "the same every time");
    let lifted = Image::parse(bytes).expect("what was lifted opens");
    assert_eq!(lifted.summary().origin, Origin::V5);
    let after = check::check(&lifted);
    assert!(after.is_sound(), "{:?}", after.findings);
    assert!(after.paths <= u64::from(image.paths()) && after.paths <= found.paths);
    served(&lifted);
}

/// Everything that can be asked about one inode.
fn look_at(image: &Bootstrap<'_>, inode: &Inode<'_>) {
    assert!(inode.nlink > 0 && inode.permissions <= 0o7777 && (1..=inode.number).contains(&inode.ino));
    assert!((1..=256).contains(&inode.name.len()) && (inode.number == 1 || !inode.name.contains(&b'/')));
    assert!(inode.len <= image.bytes().len() as u64 + 8);
    let mut before: &[u8] = b"";
    for child in image.children(inode).take(MAX_VISITS as usize) {
        let Ok(child) = child else { break };
        assert!(child.number > inode.number && child.name > before && inode.kind == Kind::Directory);
        before = child.name;
    }
    let mut left = inode.len;
    for pair in inode.xattrs() {
        let Ok((name, value)) = pair else { break };
        assert!(!name.is_empty() && !name.contains(&0));
        left = left.checked_sub((name.len() + value.len()) as u64).expect("they lie in the inode");
    }
    let mut size = 0;
    for position in 0u32.. {
        match image.chunk(inode, position) {
            None if size == inode.size || inode.kind != Kind::Regular => break,
            None => panic!("the chunks are the whole file"),
            Some(Err(_)) => break,
            Some(Ok(chunk)) => {
                assert!(chunk.blob < image.blobs().len() && !chunk.stored.is_empty());
                assert!(chunk.index.is_none_or(|index| index < 1 << 24));
                size += chunk.packed.len();
            }
        }
    }
}

/// Whether the image can be served, and if so, that no file leads out of its units.
fn served(image: &Image) {
    let map = |device: &rafsd::image::Device| -> Option<UnitMap> {
        let tables = BlobTables::new(&device.entry).ok()?;
        assert!(tables.stored().is_empty(), "it has none");
        tables.with_digests(tables.geometry(&[]).ok()?, image.chunk_records().iter()).ok()
    };
    let Some(maps) = image.devices().iter().map(map).collect::<Option<Vec<_>>>() else { return };
    for map in &maps {
        assert_eq!(UnitMap::from_bytes(&map.to_bytes()).as_ref(), Ok(map), "a map comes back");
        assert_eq!(map.merge(map).as_ref(), Some(map), "a map goes with itself");
    }
    let named = image.chunk_records().iter().all(|record| record.digest != [0; 32]);
    let checkable = ensure_checkable(image, &maps);
    assert!(checkable.is_ok() || !named, "{checkable:?}");
}
