//! A tar archive up to the laid-out tree: headers, PAX records, long names, sparse maps.
//!
//! An input is an archive without header checksums and without end mark: both are added, since no
//! mutation would keep them right. Each block that has the ustar magic is taken for a header.

use rafsd::build::{self, BuildError, BuildReport};

const BLOCK: usize = 512;

pub fn run(input: &[u8]) {
    if let Ok(read) = read(input) {
        assert!(read.directories > 0, "there is always a root");
    }
}

/// Reads the archive that `input` stands for.
pub fn read(input: &[u8]) -> Result<BuildReport, BuildError> {
    let mut archive = input.to_vec();
    archive.resize(archive.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    for header in archive.chunks_exact_mut(BLOCK).filter(|block| block[257..262] == *b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    build::read_archive(archive)
}

/// The input for a whole archive: without the end mark.
pub fn pack(mut archive: Vec<u8>) -> Vec<u8> {
    while archive.last() == Some(&0) {
        archive.pop();
    }
    archive
}
