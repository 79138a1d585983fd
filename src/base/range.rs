use std::fmt;

/// A half-open range of bytes, `start..end`.
///
/// Always well-formed: `start <= end`. Which space it lies in (stored or decoded) is said by the
/// name of the field or parameter that holds it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range `start..end`, or `None` if `end` lies before `start`.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start <= end { Some(Self { start, end }) } else { None }
    }

    /// The range of `len` bytes from `start`, or `None` if its end does not fit in 64 bits.
    pub const fn at(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// First byte of the range.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First byte after the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The part of the range that lies below `limit`.
    #[must_use]
    pub fn clamp_end(self, limit: u64) -> Self {
        Self { start: self.start.min(limit), end: self.end.min(limit) }
    }

    /// The smallest range with both ends on multiples of `align` (a power of two) that contains
    /// this one; `None` if its end does not fit in 64 bits.
    pub fn align_out(self, align: u64) -> Option<Self> {
        debug_assert!(align.is_power_of_two());
        let end = self.end.checked_next_multiple_of(align)?;
        Some(Self { start: self.start & !(align - 1), end })
    }

    /// Whether the two ranges share at least one byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether every byte of `other` is in this range.
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The smallest range that contains both.
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).expect("ordered")
    }

    #[test]
    fn reversed_and_overflowing_ranges_do_not_exist() {
        assert_eq!(ByteRange::new(2, 1), None);
        assert_eq!(ByteRange::at(u64::MAX, 1), None);
        assert_eq!(r(1, u64::MAX).align_out(4096), None);
    }

    #[test]
    fn aligning_out_never_loses_a_byte() {
        assert_eq!(r(1, 4097).align_out(4096), Some(r(0, 8192)));
        assert_eq!(r(4096, 8192).align_out(4096), Some(r(4096, 8192)));
    }

    #[test]
    fn clamping_behind_the_limit_gives_an_empty_range() {
        assert!(r(10, 20).clamp_end(5).is_empty());
        assert_eq!(r(10, 20).clamp_end(15), r(10, 15));
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        assert!(!r(0, 4).overlaps(r(4, 8)));
        assert!(r(0, 5).overlaps(r(4, 8)));
    }
}
