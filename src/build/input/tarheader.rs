//! One header block of a tar archive (`pax(5)`, `tar(5)`): fields to values, nothing else.

/// Bytes of a header, and the unit in which archives are padded.
pub(super) const BLOCK: usize = 512;

/// What a header says the member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member {
    Regular,
    /// Old GNU sparse file: the map is in the header and behind it.
    Sparse,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
    /// PAX records for the next member.
    Extended,
    /// PAX records for all that follow.
    Global,
    /// GNU: the content is the path of the next member.
    LongName,
    /// GNU: the content is the link target of the next member.
    LongLink,
}

/// A header with a right checksum.
pub(super) struct TarHeader<'a>(&'a [u8; BLOCK]);

impl<'a> TarHeader<'a> {
    /// Checks the checksum of `block`.
    pub(super) fn parse(block: &'a [u8; BLOCK]) -> Result<Self, String> {
        let header = Self(block);
        let stated = header.number(148..156, "checksum")?;
        // The field itself counts as spaces. Some writers added up signed characters.
        let others = || block[..148].iter().chain(&block[156..]);
        let unsigned: u64 = others().map(|b| u64::from(*b)).sum::<u64>() + 8 * 32;
        let signed: i64 = others().map(|b| i64::from(b.cast_signed())).sum::<i64>() + 8 * 32;
        if stated == unsigned || i64::try_from(stated) == Ok(signed) {
            Ok(header)
        } else {
            Err("wrong header checksum".into())
        }
    }

    /// What the header describes. `is_named` says whether its whole name is told elsewhere.
    pub(super) fn member(&self, is_named: bool) -> Result<Member, String> {
        Ok(match self.0[156] {
            // Archives older than the type field mark directories by their name only. A name that
            // was cut to fit says nothing, wherever it was cut.
            0 | b'0' if !is_named && self.path().ends_with(b"/") => Member::Directory,
            // Contiguous files are files.
            0 | b'0' | b'7' => Member::Regular,
            b'1' => Member::HardLink,
            b'2' => Member::Symlink,
            b'3' => Member::Character,
            b'4' => Member::Block,
            b'5' => Member::Directory,
            b'6' => Member::Fifo,
            b'S' => Member::Sparse,
            b'x' => Member::Extended,
            b'g' => Member::Global,
            b'L' => Member::LongName,
            b'K' => Member::LongLink,
            other => return Err(format!("unknown member type '{}'", other.escape_ascii())),
        })
    }

    /// The path, the ustar prefix included.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let is_ustar = self.0[257..263] == *b"ustar\0";
        let prefix = if is_ustar { text(&self.0[345..500]) } else { b"" };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> &'a [u8] {
        text(&self.0[157..257])
    }

    pub(super) fn mode(&self) -> Result<u64, String> {
        self.number(100..108, "mode")
    }

    pub(super) fn uid(&self) -> Result<u64, String> {
        self.number(108..116, "uid")
    }

    pub(super) fn gid(&self) -> Result<u64, String> {
        self.number(116..124, "gid")
    }

    /// Bytes of content that follow.
    pub(super) fn size(&self) -> Result<u64, String> {
        self.number(124..136, "size")
    }

    pub(super) fn mtime(&self) -> Result<i64, String> {
        number(&self.0[136..148]).ok_or_else(|| "mtime is not a number".into())
    }

    /// Major and minor number. Only sensible for devices: others leave anything there.
    pub(super) fn device(&self) -> Result<(u64, u64), String> {
        Ok((self.number(329..337, "device major")?, self.number(337..345, "device minor")?))
    }

    /// The part of an old GNU sparse map that is in the header, whether more follows, and the
    /// size of the file with its holes.
    pub(super) fn sparse(&self) -> Result<(&'a [u8], bool, u64), String> {
        Ok((&self.0[386..482], self.0[482] != 0, self.number(483..495, "real size")?))
    }

    fn number(&self, field: std::ops::Range<usize>, what: &str) -> Result<u64, String> {
        let value = number(&self.0[field]).and_then(|value| u64::try_from(value).ok());
        value.ok_or_else(|| format!("{what} is not a number"))
    }
}

/// The bytes before the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// A numeric field: octal digits between blanks, nothing at all for 0, or if the first bit is set
/// a big-endian two's complement number (GNU).
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Bit 6 is the sign.
        let negative = first & 0x40 != 0;
        let mut value = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        for byte in rest {
            value = value.checked_mul(256)? + i128::from(*byte);
        }
        return i64::try_from(value).ok();
    }
    let text = text(field).trim_ascii();
    text.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_all_their_spellings() {
        let cases: [(&[u8], Option<i64>); 9] = [
            (b"0000644\0", Some(0o644)),
            (b" 644 \0\0\0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"77777777", Some(0o7777_7777)),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"12x", None),
        ];
        for (field, want) in cases {
            assert_eq!(number(field), want, "{}", field.escape_ascii());
        }
    }
}
