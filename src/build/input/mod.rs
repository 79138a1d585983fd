//! Where trees come from. Each input reads its source once, front to back.

mod archive;
mod directory;
mod pax;
mod sparse;
mod tarheader;
mod walk;

pub(super) use archive::archive;
pub(super) use directory::directory;

use super::error::Unfit;
use super::tree::Tree;

/// What an input makes of a source, besides the content it sends down the pipeline.
#[derive(Debug)]
pub(super) struct Read {
    pub tree: Tree,
    pub skipped_xattrs: u64,
    /// Length of the source, if it is a gzip archive.
    pub gzip_bytes: Option<u64>,
}

/// Longest target that the kernel can follow: a path with its NUL has at most 4096 bytes.
const MAX_TARGET: usize = 4095;

/// Fails unless a link can have this target.
pub(in crate::build) fn check_target(target: &[u8]) -> Result<(), Unfit> {
    if target.is_empty() || target.len() > MAX_TARGET { Err(Unfit::SymlinkLength(target.len())) } else { Ok(()) }
}

/// A device number as the format keeps it: 12 bits of major, 20 bits of minor
/// (`rafs-v6.md` section 8.4).
fn device_number(major: u64, minor: u64) -> Result<u32, Unfit> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(Unfit::DeviceNumber { major, minor });
    }
    let (major, minor) = (u32::try_from(major).expect("12 bits"), u32::try_from(minor).expect("20 bits"));
    Ok(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_decodes_them() {
        assert_eq!(device_number(1, 3), Ok(0x103));
        assert_eq!(device_number(259, 300), Ok(0x2c | 259 << 8 | 0x100 << 12));
        assert_eq!(device_number(4095, 1_048_575), Ok(u32::MAX));
        assert!(device_number(4096, 0).is_err() && device_number(0, 1 << 20).is_err());
    }
}
