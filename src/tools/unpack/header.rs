//! Headers of archive members: ustar, with PAX records for what ustar has no place for.

use crate::image::{Inode, Kind};

/// Bytes of a header and of every piece of an archive.
pub(super) const RECORD: usize = 512;

/// Longest name in a header.
const NAME: usize = 100;
/// Largest number in the 11 octal digits of sizes and times.
const MAX_LONG: u64 = 0o777_7777_7777;
/// Largest number in the 7 octal digits of owners.
const MAX_SHORT: u64 = 0o777_7777;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member<'a> {
    Regular,
    /// Another name of an earlier member.
    Link(&'a [u8]),
    Symlink(&'a [u8]),
    Device {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// The bytes in front of a member's content: a PAX header if one is needed, and the header.
///
/// `name` is the name in the archive; `xattrs` are full names and values.
pub(super) fn header(name: &[u8], inode: &Inode, member: Member<'_>, xattrs: &[(Vec<u8>, &[u8])]) -> Vec<u8> {
    let size = if member == Member::Regular { inode.size } else { 0 };
    let target = match member {
        Member::Link(target) | Member::Symlink(target) => target,
        _ => b"",
    };
    let records = records(name, target, size, inode, matches!(member, Member::Link(_)), xattrs);
    let mut out = Vec::new();
    if !records.is_empty() {
        out.extend_from_slice(&pax_header(name, records.len()));
        out.extend_from_slice(&records);
        out.resize(out.len().next_multiple_of(RECORD), 0);
    }
    let mut ustar = Ustar::new(name, member.type_flag(inode.kind));
    ustar.octal(MODE, inode.permissions.into());
    ustar.octal(UID, short(inode.uid));
    ustar.octal(GID, short(inode.gid));
    ustar.octal(SIZE, if size <= MAX_LONG { size } else { 0 });
    ustar.octal(MTIME, u64::try_from(inode.mtime.0).ok().filter(|seconds| *seconds <= MAX_LONG).unwrap_or(0));
    ustar.text(LINK_NAME, target);
    if let Member::Device { major, minor } = member {
        ustar.octal(MAJOR, major.into());
        ustar.octal(MINOR, minor.into());
    }
    out.extend_from_slice(&ustar.finish());
    out
}

/// Records for everything that does not fit in a header, sorted by key.
fn records(
    name: &[u8],
    target: &[u8],
    size: u64,
    inode: &Inode,
    is_link: bool,
    xattrs: &[(Vec<u8>, &[u8])],
) -> Vec<u8> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut add = |key: &[u8], value: &[u8]| records.push((key.to_vec(), value.to_vec()));
    if name.len() > NAME {
        add(b"path", name);
    }
    if target.len() > NAME {
        add(b"linkpath", target);
    }
    if size > MAX_LONG {
        add(b"size", size.to_string().as_bytes());
    }
    for (key, id) in [(b"uid", inode.uid), (b"gid", inode.gid)] {
        if u64::from(id) > MAX_SHORT {
            add(key, id.to_string().as_bytes());
        }
    }
    // A further name of a file has none of this: it shares what its first name says.
    if !is_link {
        let (seconds, nanos) = inode.mtime;
        if nanos != 0 || !u64::try_from(seconds).is_ok_and(|seconds| seconds <= MAX_LONG) {
            add(b"mtime", time(seconds, nanos).as_bytes());
        }
        for (name, value) in xattrs {
            add(&[b"SCHILY.xattr.", encoded(name).as_slice()].concat(), value);
        }
    }
    records.sort();
    records.iter().flat_map(|(key, value)| record(key, value)).collect()
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body + 1;
    while len != body + len.to_string().len() {
        len = body + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Seconds with a fraction. Nanoseconds count forwards, a written fraction away from zero.
fn time(seconds: i64, nanos: u32) -> String {
    if seconds >= 0 || nanos == 0 {
        return fraction(&seconds.to_string(), nanos);
    }
    fraction(&format!("-{}", (seconds + 1).unsigned_abs()), 1_000_000_000 - nanos)
}

fn fraction(seconds: &str, nanos: u32) -> String {
    if nanos == 0 {
        return seconds.to_owned();
    }
    format!("{seconds}.{nanos:09}").trim_end_matches('0').to_owned()
}

/// An xattr's name as GNU tar writes it into a key, which ends at the first `=`.
fn encoded(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for &byte in name {
        match byte {
            b'%' => out.extend_from_slice(b"%25"),
            b'=' => out.extend_from_slice(b"%3D"),
            _ => out.push(byte),
        }
    }
    out
}

fn short(id: u32) -> u64 {
    if u64::from(id) <= MAX_SHORT { id.into() } else { 0 }
}

/// The header of the member that holds PAX records. Its name is for readers that know no PAX.
fn pax_header(name: &[u8], len: usize) -> [u8; RECORD] {
    let name = [b"PaxHeaders/", name].concat();
    let mut ustar = Ustar::new(&name, b'x');
    ustar.octal(MODE, 0o644);
    ustar.octal(UID, 0);
    ustar.octal(GID, 0);
    ustar.octal(SIZE, len as u64);
    ustar.octal(MTIME, 0);
    ustar.finish()
}

impl Member<'_> {
    fn type_flag(self, kind: Kind) -> u8 {
        match self {
            Self::Regular => b'0',
            Self::Link(_) => b'1',
            Self::Symlink(_) => b'2',
            Self::Device { .. } if kind == Kind::Character => b'3',
            Self::Device { .. } => b'4',
            Self::Directory => b'5',
            Self::Fifo => b'6',
        }
    }
}

/// Start and length of a field.
type Field = (usize, usize);
const MODE: Field = (100, 8);
const UID: Field = (108, 8);
const GID: Field = (116, 8);
const SIZE: Field = (124, 12);
const MTIME: Field = (136, 12);
const CHECKSUM: Field = (148, 8);
const LINK_NAME: Field = (157, NAME);
const MAJOR: Field = (329, 8);
const MINOR: Field = (337, 8);

struct Ustar([u8; RECORD]);

impl Ustar {
    fn new(name: &[u8], type_flag: u8) -> Self {
        let mut header = Self([0; RECORD]);
        header.text((0, NAME), name);
        header.0[156] = type_flag;
        header.0[257..265].copy_from_slice(b"ustar\x0000");
        header.octal(MAJOR, 0);
        header.octal(MINOR, 0);
        header
    }

    /// As much of `text` as fits; a PAX record says the rest. Where it is cut, it does not end in a
    /// slash, by which some readers know directories.
    fn text(&mut self, (at, len): Field, text: &[u8]) {
        let mut fits = &text[..len.min(text.len())];
        while let (true, [start @ .., b'/']) = (fits.len() < text.len(), fits) {
            fits = start;
        }
        self.0[at..at + fits.len()].copy_from_slice(fits);
    }

    fn octal(&mut self, (at, len): Field, value: u64) {
        let digits = format!("{value:0width$o}", width = len - 1);
        assert!(digits.len() < len, "callers bound their numbers");
        self.0[at..at + digits.len()].copy_from_slice(digits.as_bytes());
    }

    fn finish(mut self) -> [u8; RECORD] {
        let (at, len) = CHECKSUM;
        self.0[at..at + len].fill(b' ');
        let sum: u32 = self.0.iter().copied().map(u32::from).sum();
        self.0[at..at + 7].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ByteRange;
    use crate::image::Layout;

    fn inode(size: u64) -> Inode {
        Inode {
            nid: 1,
            kind: Kind::Regular,
            permissions: 0o4755,
            size,
            nlink: 1,
            uid: 1,
            gid: 2,
            mtime: (1_000_000_000, 0),
            rdev: 0,
            ino: 1,
            xattrs: ByteRange::default(),
            layout: Layout::None,
        }
    }

    fn text(bytes: &[u8]) -> String {
        bytes.escape_ascii().to_string()
    }

    #[test]
    fn what_fits_is_a_plain_header() {
        let header = header(b"a/b", &inode(10), Member::Regular, &[]);

        assert_eq!(header.len(), RECORD);
        assert_eq!(text(&header[..4]), "a/b\\x00");
        assert_eq!(text(&header[100..148]), "0004755\\x000000001\\x000000002\\x0000000000012\\x0007346545000\\x00");
        assert_eq!(text(&header[156..157]), "0");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum::<u32>()
            - header[148..156].iter().map(|byte| u32::from(*byte)).sum::<u32>()
            + 8 * 32;
        assert_eq!(text(&header[148..156]), format!("{sum:06o}\\x00 "));
    }

    #[test]
    fn what_does_not_fit_is_a_record() {
        let mut big = inode(MAX_LONG + 1);
        (big.uid, big.mtime) = (u32::MAX - 1, (-1, 999_999_999));
        let value = [(b"user.a=%".to_vec(), &b"\0\n="[..])];

        let header = header(&[b'n'; 101], &big, Member::Regular, &value);

        let records = text(&header[RECORD..header.len() - RECORD]);
        let want = format!(
            "33 SCHILY.xattr.user.a%3D%25=\\x00\\n=\\n22 mtime=-0.000000001\\n111 path={}\\n19 size=8589934592\\n18 uid=4294967294\\n",
            "n".repeat(101)
        );
        assert_eq!(records.trim_end_matches("\\x00"), want);
    }

    #[test]
    fn lengths_of_records_count_themselves() {
        assert_eq!(record(b"path", b"a"), b"9 path=a\n".to_vec()[..]);
        for len in (0..200).chain(9980..10_010) {
            let record = record(b"k", &vec![b'v'; len]);
            let digits = record.iter().position(|b| *b == b' ').unwrap();
            assert_eq!(String::from_utf8_lossy(&record[..digits]), record.len().to_string());
        }
    }

    #[test]
    fn times_are_written_away_from_zero() {
        for (time_of, want) in [
            ((0, 0), "0"),
            ((5, 500_000_000), "5.5"),
            ((-1, 0), "-1"),
            ((-1, 750_000_000), "-0.25"),
            ((-6, 999_999_999), "-5.000000001"),
            ((i64::MIN, 1), "-9223372036854775807.999999999"),
        ] {
            assert_eq!(time(time_of.0, time_of.1), want);
        }
    }

    #[test]
    fn a_name_that_is_cut_does_not_end_in_a_slash() {
        let name = [[b'n'; 98].as_slice(), b"//file"].concat();

        let bytes = header(&name, &inode(0), Member::Regular, &[]);

        let last = &bytes[bytes.len() - RECORD..];
        assert_eq!(last[..NAME], [[b'n'; 98].as_slice(), &[0; 2]].concat());
        assert_eq!(header(b"directory/", &inode(0), Member::Directory, &[])[..11], *b"directory/\0");
    }
}
