//! Where bootstrap and devices lie when they are one disk (`rafs-v6.md` sections 4 and 14).

use zerocopy::IntoBytes;

use super::ExportError;
use crate::base::{BLOCK, ByteRange};
use crate::format::array_at;
use crate::format::erofs::DeviceSlot;
use crate::format::rafs::DEVICE_TABLE_OFFSET;
use crate::image::{Image, ImageError};

/// Devices of recomputed disks start on multiples of this many bytes, as builders place them.
const ALIGNMENT: u64 = 0x8_0000;

/// A disk before it is written.
#[derive(Debug)]
pub(super) struct Placement {
    /// Where each device lies, in the order of the image.
    pub devices: Vec<ByteRange>,
    /// Length of the disk in bytes, whole blocks.
    pub len: u64,
    /// New bytes for the bootstrap's device table, if its own say no usable places.
    pub table: Option<Vec<u8>>,
}

/// Places the devices where the image says. An image of an old builder, which does not say, or one
/// that puts two devices in one place, gets the places that a builder of today would give.
pub(super) fn place(image: &Image) -> Result<Placement, ExportError> {
    let block = image.summary().block_size;
    let count = image.devices().len() as u64;
    let slots: &[DeviceSlot] = array_at(image.bytes(), DEVICE_TABLE_OFFSET, count, "device table")
        .map_err(|error| ExportError::Image(ImageError::from(error)))?;
    let stored = slots.iter().zip(image.devices()).map(|(slot, device)| {
        let at = u64::from(slot.mapped_blkaddr.get());
        ByteRange::at(at * block, device.len).filter(|_| at != 0)
    });
    let end = image.summary().bootstrap_len.next_multiple_of(BLOCK);
    if let Some(devices) = stored.collect::<Option<Vec<_>>>().filter(|devices| are_apart(devices, end)) {
        let len = devices.iter().map(|device| device.end()).fold(end, u64::max);
        return Ok(Placement { devices, len: len.next_multiple_of(BLOCK), table: None });
    }
    let (mut devices, mut table, mut end) = (Vec::new(), Vec::new(), end);
    for (slot, device) in slots.iter().zip(image.devices()) {
        let range = end.checked_next_multiple_of(ALIGNMENT).and_then(|at| ByteRange::at(at, device.len));
        let range = range.ok_or(ExportError::TooLong)?;
        let mut slot = *slot;
        slot.mapped_blkaddr = u32::try_from(range.start() / block).map_err(|_| ExportError::TooLong)?.into();
        table.extend_from_slice(slot.as_bytes());
        devices.push(range);
        end = range.end();
    }
    Ok(Placement { devices, len: end.next_multiple_of(BLOCK), table: Some(table) })
}

/// Whether no two of `devices` share a byte, and none lies below `end`.
fn are_apart(devices: &[ByteRange], end: u64) -> bool {
    let mut sorted = devices.to_vec();
    sorted.sort_unstable();
    sorted.iter().try_fold(end, |free, device| (device.start() >= free).then_some(device.end())).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_in_each_others_way_are_noticed() {
        let range = |start, end| ByteRange::new(start, end).unwrap();
        assert!(are_apart(&[], 4096));
        assert!(are_apart(&[range(8192, 12288), range(4096, 8192)], 4096));
        assert!(!are_apart(&[range(4096, 8193), range(8192, 12288)], 4096));
        assert!(!are_apart(&[range(0, 4096)], 4096));
    }
}
