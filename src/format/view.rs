use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A record or table that does not fit in the bytes it should be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at} does not fit in {len} bytes")]
pub struct Truncated {
    /// Which record or table.
    pub what: &'static str,
    /// Where it should start.
    pub at: u64,
    /// How many bytes there are.
    pub len: u64,
}

/// The record of type `T` at byte `at`.
pub fn record_at<'a, T>(bytes: &'a [u8], at: u64, what: &'static str) -> Result<&'a T, Truncated>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    array_at::<T>(bytes, at, 1, what).map(|rows| &rows[0])
}

/// `count` records of type `T` from byte `at`, without copying.
pub fn array_at<'a, T>(bytes: &'a [u8], at: u64, count: u64, what: &'static str) -> Result<&'a [T], Truncated>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    let truncated = || Truncated { what, at, len: bytes.len() as u64 };
    let from = usize::try_from(at).map_err(|_| truncated())?;
    let count = usize::try_from(count).map_err(|_| truncated())?;
    let size = count.checked_mul(size_of::<T>()).ok_or_else(truncated)?;
    let to = from.checked_add(size).ok_or_else(truncated)?;
    let bytes = bytes.get(from..to).ok_or_else(truncated)?;
    <[T]>::ref_from_bytes(bytes).map_err(|_| truncated())
}

/// The same, for writing.
pub fn array_at_mut<'a, T>(
    bytes: &'a mut [u8],
    at: u64,
    count: u64,
    what: &'static str,
) -> Result<&'a mut [T], Truncated>
where
    T: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned,
{
    let truncated = Truncated { what, at, len: bytes.len() as u64 };
    array_at::<T>(bytes, at, count, what)?;
    let from = usize::try_from(at).map_err(|_| truncated)?;
    let count = usize::try_from(count).map_err(|_| truncated)?;
    let (rows, _) = <[T]>::mut_from_prefix_with_elems(&mut bytes[from..], count).map_err(|_| truncated)?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::little_endian::U32;

    #[test]
    fn nothing_outside_the_bytes_is_ever_viewed() {
        let bytes = [1u8, 0, 0, 0, 2, 0, 0, 0];
        assert_eq!(array_at::<U32>(&bytes, 0, 2, "t").unwrap()[1].get(), 2);
        assert_eq!(array_at::<U32>(&bytes, 8, 0, "t").unwrap().len(), 0);
        for (at, count) in [(0, 3), (5, 1), (9, 0), (u64::MAX, 1), (0, u64::MAX), (0, u64::MAX / 4 + 1)] {
            assert!(array_at::<U32>(&bytes, at, count, "t").is_err(), "{at} {count}");
        }
    }
}
