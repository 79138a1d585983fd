use std::fmt;
use std::str::FromStr;

/// A number of bytes as people write it: `4096`, `64KiB`, `1MiB`, `2GiB` (also `K`, `M`, `G`, `1m`).
///
/// All units are powers of 1024. Printed with the largest unit that keeps at least one digit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Text that is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size; write a number of bytes, or one with KiB, MiB or GiB")]
pub struct InvalidSize(String);

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl FromStr for ByteSize {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, InvalidSize> {
        let wrong = || InvalidSize(text.to_owned());
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text[digits.len()..].to_ascii_lowercase();
        let shift = match unit.as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.trim().parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(wrong)
    }
}

impl ByteSize {
    /// The same number as text that is read as exactly this many bytes: `64MiB`, `1000`.
    pub fn exact(self) -> String {
        match UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift) {
            Some((unit, shift)) => format!("{}{unit}", self.0 >> shift),
            None => self.0.to_string(),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, shift)| self.0 >> shift > 0) {
            #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
            Some((unit, shift)) => write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("64KiB", 65536), ("1m", 1 << 20), ("2 GiB", 2 << 30)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "KiB", "1.5M", "-1", "1XB", "99999999999T"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_printed_with_a_fitting_unit() {
        assert_eq!(ByteSize(512).to_string(), "512 B");
        assert_eq!(ByteSize(1536 << 10).to_string(), "1.5 MiB");
    }

    #[test]
    fn exact_sizes_are_read_as_the_same_number() {
        for (bytes, text) in [(0, "0"), (1000, "1000"), (64 << 10, "64KiB"), (1536 << 10, "1536KiB"), (2 << 40, "2TiB")]
        {
            assert_eq!(ByteSize(bytes).exact(), text);
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
    }
}
