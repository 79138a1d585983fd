//! The parts of a blob file, found from its end as a reader finds them. An input is such a file; its
//! last header gets a right checksum, since no mutation would keep one.

use rafsd::base::ByteRange;
use rafsd::blob::toc::{HEADER_LEN, LastPart, Toc, TocError, Trailer};

/// Longest part that is opened.
const MOST: u64 = 1 << 20;
/// Place of the checksum in a header.
const CHECKSUM: std::ops::Range<usize> = 148..156;

pub fn run(input: &[u8]) {
    let _ = parts(input);
}

/// The plain bytes of every part that the file's table of contents names and whose place is right.
pub fn parts(input: &[u8]) -> Result<Vec<Vec<u8>>, TocError> {
    let mut file = input.to_vec();
    let header = usize::try_from(HEADER_LEN).expect("512");
    let at = file.len().saturating_sub(header);
    if let Some(last) = file.get_mut(at..).filter(|last| last.len() == header) {
        last[CHECKSUM].fill(b' ');
        let sum: u32 = last.iter().map(|byte| u32::from(*byte)).sum();
        last[CHECKSUM].copy_from_slice(format!("{sum:07o}\0").as_bytes());
    }
    let trailer = Trailer::parse(&file[at..], file.len() as u64)?;
    assert!(trailer.stored.end() + HEADER_LEN == file.len() as u64);
    let stored = cut(&file, trailer.stored).expect("a part lies in front of its header");
    if trailer.part == LastPart::Bootstrap {
        return Ok(vec![stored.to_vec()]);
    }
    let toc = Toc::parse(stored, trailer.stored)?;
    let mut opened = Vec::new();
    for part in toc.parts() {
        assert_eq!(toc.find(&part.name), Some(part), "names are there once");
        let Some(stored) = cut(&file, part.stored) else {
            assert_eq!(part.name, "image.blob", "only this one may lie anywhere");
            continue;
        };
        if part.name == "image.blob" {
            // Nobody opens it as a part.
            let _ = part.open(stored, MOST);
            continue;
        }
        let plain = part.open(stored, MOST)?;
        assert!(plain.len() as u64 == part.plain_len && part.plain_len <= MOST);
        opened.push(plain);
    }
    Ok(opened)
}

fn cut(file: &[u8], range: ByteRange) -> Option<&[u8]> {
    file.get(usize::try_from(range.start()).ok()?..usize::try_from(range.end()).ok()?)
}
