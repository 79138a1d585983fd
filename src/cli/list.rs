//! Lists that commands are given as a file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, ensure};

/// All of a list from a file, or from standard input for `-`. `what` is what to call it.
///
/// # Errors
/// If it cannot be read, or has more than `max` bytes: half of a list is another list.
pub(super) fn read(what: &str, path: &Path, max: u64) -> anyhow::Result<Vec<u8>> {
    let failed = || format!("cannot read the {what} {}", path.display());
    let stream: Box<dyn Read> =
        if path == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(path).with_context(failed)?) };
    let mut list = Vec::new();
    stream.take(max + 1).read_to_end(&mut list).with_context(failed)?;
    ensure!(list.len() as u64 <= max, "the {what} {} has more than {max} bytes", path.display());
    Ok(list)
}
