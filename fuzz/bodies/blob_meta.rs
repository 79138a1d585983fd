//! The tables of a blob: a row of the blob table, the blob's own tables, and the chunk records.
//!
//! An input is: one byte, the number of chunk records; the row; the records; the blob's header without
//! its reserved bytes; the stored chunk-info array. Header and array of an encrypted blob are in clear
//! there, and are encrypted before they are read.

use rafsd::blob::{BlobKind, BlobTables, Recipe, TablesError, UnitMap};
use rafsd::format::blobfile::Header;
use rafsd::format::rafs::{BlobEntry, ChunkRecord};
use zerocopy::FromBytes;

use super::take;

/// Bytes of the header in front of the reserved ones. Behind those is a second magic number.
const HEADER: usize = 60;
const MAGIC2: usize = 4;
/// Stored arrays that are padded to the length which the row asks for.
const MAX_STORED: u64 = 1 << 16;

/// The input for these tables.
pub fn pack(entry: &[u8], rows: &[u8], header: &[u8], array: &[u8]) -> Vec<u8> {
    let count = u8::try_from(rows.len() / size_of::<ChunkRecord>()).expect("few rows");
    let magic2 = &header[size_of::<Header>() - MAGIC2..];
    [[count].as_slice(), entry, rows, &header[..HEADER], magic2, array].concat()
}

pub fn run(input: &[u8]) {
    let _ = tables(input);
}

/// Reads the tables of the blob, then the chunk records.
pub fn tables(mut input: &[u8]) -> Result<(), TablesError> {
    let count = usize::from(take(&mut input, 1)[0]) % 16;
    let entry = take(&mut input, size_of::<BlobEntry>());
    let rows = take(&mut input, count * size_of::<ChunkRecord>());
    let header = take(&mut input, HEADER);
    let magic2 = take(&mut input, MAGIC2);
    let entry = BlobEntry::ref_from_bytes(&entry).expect("of its length");
    let rows = <[ChunkRecord]>::ref_from_bytes(&rows).expect("of their length");

    let tables = BlobTables::new(entry)?;
    let asked = tables.stored().len();
    let stored = if asked == 0 {
        let kind = tables.kind();
        assert!(matches!(kind, BlobKind::Tarfs | BlobKind::Listed), "{kind:?} has tables");
        Vec::new()
    } else {
        let array = (asked - size_of::<Header>() as u64).min(MAX_STORED);
        let array = take(&mut input, usize::try_from(array).expect("at most 64 KiB"));
        let mut whole = header.clone();
        whole.resize(size_of::<Header>() - MAGIC2, 0);
        whole.extend_from_slice(&magic2);
        match tables.key() {
            Some(key) => [key.encrypt(&array), key.encrypt(&whole)].concat(),
            None => [array, whole].concat(),
        }
    };

    let map = tables.geometry(&stored)?;
    look_at(&tables, &map);
    let contexts = map.contexts();
    assert!(contexts.is_some() || tables.kind() != BlobKind::Zran);
    for unit in map.units().iter().filter(|unit| unit.recipe == Recipe::GzipWindow) {
        let (contexts, part) = (contexts.expect("an index"), unit.part.expect("a part of a context"));
        let context = contexts.find(unit.stored, part.whole).expect("its context is there");
        assert!(contexts.dictionary(context).len() <= 32 << 10 && context.bits < 8);
    }
    look_at(&tables, &tables.with_digests(map, rows.iter())?);
    Ok(())
}

/// What a reader of the device relies on.
fn look_at(tables: &BlobTables, map: &UnitMap) {
    let mut end = 0;
    for unit in map.units() {
        if unit.is_vacant() {
            assert!(map.is_listed());
            continue;
        }
        assert!(unit.decoded.start() >= end && unit.decoded.end() <= tables.decoded_len());
        assert!(unit.decoded.len() <= 16 << 20);
        let found = map.find(unit.decoded.start()).expect("its start belongs to it");
        assert_eq!(map.get(found).expect("a unit with this number").decoded, unit.decoded);
        end = unit.decoded.end();
        assert!(!unit.encrypted || map.key().is_some());
        let at = unit.part.map_or(0, |part| u64::from(part.at));
        assert!(at + unit.decoded.len() <= unit.whole_len() && unit.whole_len() <= 16 << 20);
    }
    let saved = UnitMap::from_bytes(&map.to_bytes()).expect("a map as it was saved");
    assert!(saved == *map);
}
