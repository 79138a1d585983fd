//! Whether everything that the kernel can reach through an image can be checked.
//!
//! A device counts as complete when all its units with a known check are present; then the kernel
//! reads it alone. That is right only if no file leads anywhere else. A damaged or hostile image
//! can lead the kernel to units for which it names no digest, or between units, and there it would
//! find holes. Such an image is refused before it is mounted or exported.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::base::{BLOCK, BlobId, ByteRange};
use crate::blob::{Unit, UnitMap};
use crate::image::{Image, ImageError, Kind};

/// Why an image is not safe in the hands of the kernel.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReachError {
    /// The metadata makes no sense.
    #[error("the image is damaged")]
    Image(#[source] ImageError),
    /// A file leads to bytes that nobody can check.
    #[error("{} uses blob {blob} at decoded {decoded}, for which the image names no digest", path.display())]
    Uncheckable { path: PathBuf, blob: BlobId, decoded: ByteRange },
    /// A tarfs image.
    #[error("the image has blocks of {0} bytes (tarfs); those who let the kernel read it need blocks of 4096 bytes")]
    BlockSize(u64),
}

/// Fails unless the image counts in the blocks that maps, caches and pages have, which matters where the kernel
/// reads what is there without asking.
pub fn ensure_block_size(image: &Image) -> Result<(), ReachError> {
    match image.summary().block_size {
        BLOCK => Ok(()),
        other => Err(ReachError::BlockSize(other)),
    }
}

/// Fails unless every block of a device that a file leads to lies in a unit with a known check.
/// `maps` has one map for each device of `image`.
///
/// Looks at metadata only, once at each inode. Each chunk of a file has an index of 8 bytes in the
/// bootstrap, so more chunks than it has room for are a sign of indexes used twice; that bounds
/// the work.
pub fn ensure_checkable(image: &Image, maps: &[UnitMap]) -> Result<(), ReachError> {
    let mut budget = image.summary().bootstrap_len / 8;
    let mut linked = HashSet::new();
    let mut walk = image.walk();
    while let Some(step) = walk.next_visit() {
        let step = step.map_err(ReachError::Image)?;
        let inode = step.inode;
        if inode.kind != Kind::Regular || inode.nlink > 1 && !linked.insert(inode.nid) {
            continue;
        }
        let mut uncheckable = None;
        let mut visit = |device: usize, decoded: ByteRange| {
            let units = maps[device].covering(decoded);
            budget = budget.saturating_sub(units.as_ref().map_or(1, |units| u64::from(units.end - units.start)));
            let is_known = |index| maps[device].get(index).is_some_and(Unit::is_checkable);
            if !units.is_some_and(|mut units| units.all(is_known)) {
                uncheckable.get_or_insert((device, decoded));
            }
        };
        image.kernel_ranges(&inode, &mut visit).map_err(ReachError::Image)?;
        if let Some((device, decoded)) = uncheckable {
            let path = step.path.iter().map(|name| OsStr::from_bytes(name)).collect::<PathBuf>();
            return Err(ReachError::Uncheckable { path, blob: maps[device].blob().clone(), decoded });
        }
        if budget == 0 {
            return Err(ReachError::Image(ImageError::Tree("has more chunks than the bootstrap can hold")));
        }
    }
    Ok(())
}
