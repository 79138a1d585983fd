//! A GUID partition table: bytes to partitions.
//!
//! The disk may be anybody's, so that nothing is believed: both checksums must fit, sizes are bounded before
//! anything is read by them, and a partition lies inside the disk. Where the first table is broken, the copy at the end
//! of the disk counts.

use flate2::Crc;

/// Most bytes of partition entries that are read: a table has 16 KiB as a rule.
const MAX_ENTRIES: u64 = 1 << 20;
/// Length of a header without its padding, and the least that one may claim.
const HEADER: usize = 92;
/// Least length of an entry.
const ENTRY: usize = 128;
/// Lengths of a sector that disks have.
const SECTORS: [u64; 2] = [512, 4096];

/// A GUID as it lies on disk, the first three numbers little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guid(pub(super) [u8; 16]);

/// Microsoft's basic data, EBD0A0A2-B9E5-4433-87C0-68B6B72699C7.
pub(super) const BASIC_DATA: Guid =
    Guid([0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7]);

impl Guid {
    /// 32 lower-case hex digits, in the order in which people write them.
    pub(super) fn simple(self) -> String {
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        order.into_iter().map(|at| format!("{:02x}", self.0[at])).collect()
    }
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    pub(super) kind: Guid,
    pub(super) id: Guid,
    pub(super) name: String,
    /// In bytes.
    pub(super) start: u64,
    /// In bytes; not 0.
    pub(super) len: u64,
}

/// Why there is no table to be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTable {
    #[error("it has no partition table")]
    NoTable,
    #[error("the partition table is damaged, and so is its copy at the end: {0}")]
    Damaged(&'static str),
    #[error("partition {number} does not lie inside the disk")]
    Outside { number: usize },
    #[error("it cannot be read: {0}")]
    Read(String),
}

/// Reads exactly so many bytes at an offset.
pub(super) trait ReadAt {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<()>;
}

/// The partitions of a disk of `len` bytes, in the order of their numbers; and whether they are from the copy.
pub(super) fn read(disk: &impl ReadAt, len: u64) -> Result<(Vec<Partition>, bool), BadTable> {
    let mut worst = BadTable::NoTable;
    for copy in [false, true] {
        for sector in SECTORS {
            let sectors = len / sector;
            if sectors < 3 {
                continue;
            }
            match read_table(disk, sector, if copy { sectors - 1 } else { 1 }, sectors) {
                Ok(partitions) => return Ok((partitions, copy)),
                Err(BadTable::NoTable) => {}
                // Checksums fit: no copy would say otherwise.
                Err(error @ BadTable::Outside { .. }) => return Err(error),
                Err(error) => worst = error,
            }
        }
    }
    Err(worst)
}

/// What a header says of its entries.
struct Header {
    entries_lba: u64,
    entry_len: usize,
    count: usize,
    crc: u32,
}

fn read_table(disk: &impl ReadAt, sector: u64, lba: u64, sectors: u64) -> Result<Vec<Partition>, BadTable> {
    let fetch = |lba: u64, len: u64| {
        let damaged = BadTable::Damaged("it leads outside of the disk");
        let at = lba.checked_mul(sector).ok_or_else(|| damaged.clone())?;
        if at.checked_add(len).is_none_or(|end| end > sectors * sector) {
            return Err(damaged);
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| damaged)?];
        disk.read_at(&mut bytes, at).map_err(|error| BadTable::Read(error.to_string()))?;
        Ok(bytes)
    };
    let header = header(&fetch(lba, sector)?, lba)?;
    // Bounded by `header`.
    let entries = fetch(header.entries_lba, (header.entry_len * header.count) as u64)?;
    if checksum(&[&entries]) != header.crc {
        return Err(BadTable::Damaged("the checksum of its entries is wrong"));
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(header.entry_len)) {
        if entry[..16] != [0; 16] {
            partitions.push(partition(entry, sector, sectors).ok_or(BadTable::Outside { number })?);
        }
    }
    Ok(partitions)
}

fn header(block: &[u8], lba: u64) -> Result<Header, BadTable> {
    if !block.starts_with(b"EFI PART") || block.len() < HEADER {
        return Err(BadTable::NoTable);
    }
    let len = word(block, 12) as usize;
    if !(HEADER..=block.len()).contains(&len) {
        return Err(BadTable::Damaged("the length of its header is wrong"));
    }
    if checksum(&[&block[..16], &[0; 4], &block[20..len]]) != word(block, 16) {
        return Err(BadTable::Damaged("the checksum of its header is wrong"));
    }
    if word(block, 8) >> 16 != 1 {
        return Err(BadTable::Damaged("its version is unknown"));
    }
    if long(block, 24) != lba {
        return Err(BadTable::Damaged("its header lies somewhere else"));
    }
    let (count, entry_len) = (word(block, 80), word(block, 84) as usize);
    let bytes = u64::from(count).saturating_mul(entry_len as u64);
    if entry_len < ENTRY || !entry_len.is_power_of_two() || bytes > MAX_ENTRIES {
        return Err(BadTable::Damaged("the number or length of its entries is out of range"));
    }
    Ok(Header { entries_lba: long(block, 72), entry_len, count: count as usize, crc: word(block, 88) })
}

fn partition(entry: &[u8], sector: u64, sectors: u64) -> Option<Partition> {
    let (first, last) = (long(entry, 32), long(entry, 40));
    if first > last || last >= sectors {
        return None;
    }
    let units: Vec<u16> = entry[56..ENTRY].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    let end = units.iter().position(|unit| *unit == 0).unwrap_or(units.len());
    Some(Partition {
        kind: guid(entry, 0),
        id: guid(entry, 16),
        name: String::from_utf16_lossy(&units[..end]),
        // Both products are at most the length of the disk.
        start: first * sector,
        len: (last - first + 1) * sector,
    })
}

fn checksum(parts: &[&[u8]]) -> u32 {
    let mut crc = Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}

/// A number inside of a record whose length was checked.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn guid(bytes: &[u8], at: usize) -> Guid {
    Guid(bytes[at..at + 16].try_into().expect("sixteen bytes"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    impl ReadAt for Vec<u8> {
        fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
            let at = usize::try_from(offset).unwrap();
            let from = self.get(at..at + bytes.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
            bytes.copy_from_slice(from);
            Ok(())
        }
    }

    /// Type, id, first and last sector, name.
    pub(in super::super) type Row<'a> = ([u8; 16], [u8; 16], u64, u64, &'a str);

    fn seal(disk: &mut [u8], sector: usize, lba: usize, entries: usize, alternate: usize) {
        let crc = checksum(&[&disk[entries * sector..entries * sector + 4 * ENTRY]]);
        let header = &mut disk[lba * sector..lba * sector + HEADER];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
        header[16..24].fill(0);
        header[24..32].copy_from_slice(&(lba as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(alternate as u64).to_le_bytes());
        header[72..80].copy_from_slice(&(entries as u64).to_le_bytes());
        header[80..88].copy_from_slice(&[4, 0, 0, 0, 128, 0, 0, 0]);
        header[88..92].copy_from_slice(&crc.to_le_bytes());
        let crc = checksum(&[header]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
    }

    /// A disk of 64 sectors with a table at both ends.
    pub(in super::super) fn disk(sector: usize, rows: &[Row<'_>]) -> Vec<u8> {
        let mut disk = vec![0; 64 * sector];
        for base in [2 * sector, 62 * sector] {
            for (number, (kind, id, first, last, name)) in rows.iter().enumerate() {
                let entry = &mut disk[base + number * ENTRY..][..ENTRY];
                entry[..16].copy_from_slice(kind);
                entry[16..32].copy_from_slice(id);
                entry[32..40].copy_from_slice(&first.to_le_bytes());
                entry[40..48].copy_from_slice(&last.to_le_bytes());
                for (at, unit) in name.encode_utf16().enumerate() {
                    entry[56 + 2 * at..58 + 2 * at].copy_from_slice(&unit.to_le_bytes());
                }
            }
        }
        seal(&mut disk, sector, 1, 2, 63);
        seal(&mut disk, sector, 63, 62, 1);
        disk
    }

    const ROWS: [Row<'_>; 2] = [([7; 16], [9; 16], 4, 7, "one"), (BASIC_DATA.0, [8; 16], 8, 8, "two")];

    fn told(disk: &Vec<u8>) -> Result<(usize, bool), String> {
        read(disk, disk.len() as u64).map(|(found, copy)| (found.len(), copy)).map_err(|error| error.to_string())
    }

    #[test]
    fn partitions_are_found_whatever_the_length_of_a_sector() {
        for sector in [512, 4096] {
            let disk = disk(sector, &ROWS);
            let (found, copy) = read(&disk, disk.len() as u64).unwrap();
            let sector = sector as u64;
            assert!(!copy);
            assert_eq!(
                found,
                [
                    Partition {
                        kind: Guid([7; 16]),
                        id: Guid([9; 16]),
                        name: "one".into(),
                        start: 4 * sector,
                        len: 4 * sector
                    },
                    Partition {
                        kind: BASIC_DATA,
                        id: Guid([8; 16]),
                        name: "two".into(),
                        start: 8 * sector,
                        len: sector
                    },
                ]
            );
        }
    }

    #[test]
    fn the_copy_counts_where_the_first_table_is_damaged() {
        let whole = disk(512, &ROWS);
        for at in [512, 512 + 20, 512 + 16, 1024 + 40] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert_eq!(told(&damaged), Ok((2, true)), "byte {at}");
            damaged[63 * 512 + 80] ^= 1;
            let error = told(&damaged).unwrap_err();
            assert!(error.starts_with("the partition table is damaged, and so is its copy"), "{error}");
        }
    }

    #[test]
    fn a_partition_that_leaves_the_disk_is_refused() {
        for (first, last) in [(4, 64), (5, 4), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            let disk = disk(512, &[([7; 16], [9; 16], first, last, "x")]);
            assert_eq!(told(&disk), Err("partition 1 does not lie inside the disk".into()));
        }
    }

    #[test]
    fn hostile_sizes_take_no_memory() {
        let lies: [(usize, &[u8]); 5] = [
            (12, &u32::MAX.to_le_bytes()),
            (72, &u64::MAX.to_le_bytes()),
            (80, &u32::MAX.to_le_bytes()),
            (84, &[0, 0, 0, 0]),
            (84, &(1_u32 << 31).to_le_bytes()),
        ];
        for (at, lie) in lies {
            let mut disk = disk(512, &ROWS);
            for header in [512, 63 * 512] {
                disk[header + at..header + at + lie.len()].copy_from_slice(lie);
                disk[header + 16..header + 20].fill(0);
                let crc = checksum(&[&disk[header..header + HEADER]]);
                disk[header + 16..header + 20].copy_from_slice(&crc.to_le_bytes());
            }
            let error = told(&disk).unwrap_err();
            assert!(error.starts_with("the partition table is damaged"), "{at}: {error}");
        }
    }

    #[test]
    fn what_is_no_table_is_said_so() {
        for len in [0, 1, 511, 512, 1024, 100_000] {
            assert_eq!(told(&vec![0; len]), Err("it has no partition table".into()));
        }
    }

    #[test]
    fn guids_are_written_as_people_write_them() {
        assert_eq!(BASIC_DATA.simple(), "ebd0a0a2b9e5443387c068b6b72699c7");
    }
}
