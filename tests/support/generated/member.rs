//! A tar archive as a list, and the same as bytes (`tar(5)`, `pax(1)`, GNU tar's manual).

use std::fmt;

use crate::support::tree::Random;

/// A part of an archive.
#[derive(Clone, Debug)]
pub enum Item {
    Member(Member),
    /// A PAX global header.
    Global(Vec<(Vec<u8>, Vec<u8>)>),
    /// Blocks of zeros, as between archives that were put one behind the other.
    EndMark,
    /// A header that says something impossible.
    Damaged(Damage),
}

#[derive(Clone, Copy, Debug)]
pub enum Damage {
    NegativeOwner,
    NegativeSize,
    /// More than any file can have.
    HugeSize,
    /// More than the archive has.
    MissingContent,
    /// A PAX record with a number that is none.
    SizeRecord(&'static str),
    Checksum,
    UnknownType,
    /// A PAX record that says it is longer than its header.
    RecordLength,
    /// A map whose pieces lie outside the file, or over each other.
    SparseMap(&'static str),
}

/// One member with everything that is said about it.
#[derive(Clone)]
pub struct Member {
    pub path: Vec<u8>,
    pub what: What,
    pub mode: u64,
    pub uid: u64,
    pub gid: u64,
    /// Seconds, and nanoseconds counted forwards from them.
    pub mtime: (i64, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub style: Style,
}

#[derive(Clone, PartialEq, Eq)]
pub enum What {
    File(Content),
    /// A link to a path of the archive.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    /// Major and minor number.
    Character(u64, u64),
    Block(u64, u64),
    Directory,
    Fifo,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {:?} {:o} {}:{} {:?}",
            self.path.escape_ascii(),
            self.what,
            self.mode,
            self.uid,
            self.gid,
            self.mtime
        )?;
        for (name, value) in &self.xattrs {
            write!(f, " {}={}", name.escape_ascii(), value[..value.len().min(50)].escape_ascii())?;
        }
        write!(f, " {:?}", self.style)
    }
}

impl fmt::Debug for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(content) => write!(f, "{content:?}"),
            Self::HardLink(target) => write!(f, "HardLink({})", target.escape_ascii()),
            Self::Symlink(target) => write!(f, "Symlink({})", target.escape_ascii()),
            Self::Character(major, minor) => write!(f, "Character({major}, {minor})"),
            Self::Block(major, minor) => write!(f, "Block({major}, {minor})"),
            Self::Directory => write!(f, "Directory"),
            Self::Fifo => write!(f, "Fifo"),
        }
    }
}

/// Bytes of a file: zeros but for the islands, which are in order and do not touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pub size: u64,
    pub islands: Vec<Island>,
}

/// Bytes that follow from a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Island {
    pub at: u64,
    pub len: usize,
    pub seed: u64,
}

impl Island {
    pub fn bytes(&self) -> Vec<u8> {
        let mut random = Random::new(self.seed);
        if self.seed.is_multiple_of(3) { random.noise(self.len) } else { random.text(self.len) }
    }
}

impl Content {
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0; usize::try_from(self.size).expect("small files")];
        for island in &self.islands {
            let at = usize::try_from(island.at).expect("small files");
            out[at..at + island.len].copy_from_slice(&island.bytes());
        }
        out
    }
}

/// How a member is written down. None of it changes what the member means.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Names that do not fit in their field.
    pub long: Long,
    pub numbers: Numbers,
    pub sparse: Sparse,
    /// The type byte where there is a choice: NUL and `7` are files too.
    pub file_type: u8,
    /// PAX records that nobody knows, with every byte in them that could end a record.
    pub strange_records: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Long {
    Gnu,
    Pax,
    /// Names are split at a slash where that helps, else as `Pax`.
    Prefix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Octal; base 256 where that is too short.
    Octal,
    Base256,
    Pax,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparse {
    No,
    OldGnu,
    Pax00,
    Pax01,
    Pax10,
}

impl Default for Style {
    fn default() -> Self {
        Self { long: Long::Pax, numbers: Numbers::Octal, sparse: Sparse::No, file_type: b'0', strange_records: false }
    }
}

const BLOCK: usize = 512;

/// The bytes of an archive, with an end mark.
pub fn archive(items: &[Item]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        match item {
            Item::Member(member) => member.write(&mut out),
            Item::Global(records) => {
                let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
                extension(&mut out, b'g', &body);
            }
            Item::EndMark => out.resize(out.len() + 2 * BLOCK, 0),
            Item::Damaged(damage) => damage.write(&mut out),
        }
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

impl Damage {
    fn write(self, out: &mut Vec<u8>) {
        let mut header = Header::new(true);
        header.text(0, 100, b"damaged");
        header.octal(100, 8, 0o644);
        header.octal(124, 12, 0);
        header.0[156] = b'0';
        match self {
            Self::NegativeOwner => header.base256(108, 8, -1),
            Self::NegativeSize => header.base256(124, 12, -512),
            Self::HugeSize => header.base256(124, 12, 1 << 70),
            Self::MissingContent => header.octal(124, 12, 1 << 32),
            Self::SizeRecord(text) => extension(out, b'x', &record(b"size", text.as_bytes())),
            Self::Checksum => {}
            Self::UnknownType => header.0[156] = b'?',
            Self::RecordLength => extension(out, b'x', b"99 path=x\n"),
            Self::SparseMap(map) => {
                extension(
                    out,
                    b'x',
                    &[record(b"GNU.sparse.size", b"4096"), record(b"GNU.sparse.map", map.as_bytes())].concat(),
                );
            }
        }
        let at = out.len();
        header.finish(out);
        if matches!(self, Self::Checksum) {
            out[at] ^= 1;
        }
    }
}

/// A PAX record with its own length in front.
pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let len = (rest..).find(|len| len.to_string().len() + rest == *len).expect("there is one");
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A header that only says something about another member.
fn extension(out: &mut Vec<u8>, kind: u8, body: &[u8]) {
    let mut header = Header::new(kind == b'L' || kind == b'K');
    header.text(0, 100, b"././@Extension");
    header.octal(100, 8, 0o644);
    header.octal(124, 12, body.len() as u64);
    header.0[156] = kind;
    header.finish(out);
    padded(out, body);
}

fn padded(out: &mut Vec<u8>, body: &[u8]) {
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

struct Header([u8; BLOCK]);

impl Header {
    fn new(gnu: bool) -> Self {
        let mut header = Self([0; BLOCK]);
        header.text(257, 8, if gnu { b"ustar  \0" } else { b"ustar\x0000" });
        header
    }

    fn text(&mut self, at: usize, room: usize, text: &[u8]) {
        let len = text.len().min(room);
        self.0[at..at + len].copy_from_slice(&text[..len]);
    }

    fn octal(&mut self, at: usize, width: usize, value: u64) {
        let digits = format!("{value:0>width$o}\0", width = width - 1);
        assert_eq!(digits.len(), width, "{value} has too many digits");
        self.text(at, width, digits.as_bytes());
    }

    /// Two's complement with the highest bit of the first byte set.
    fn base256(&mut self, at: usize, width: usize, value: i128) {
        let bytes = value.to_be_bytes();
        self.0[at..at + width].copy_from_slice(&bytes[16 - width..]);
        self.0[at] |= 0x80;
    }

    fn number(&mut self, at: usize, width: usize, value: i128, numbers: Numbers) {
        let octal = u64::try_from(value).ok().filter(|value| *value < 1 << (3 * (width - 1)));
        match octal {
            Some(value) if numbers != Numbers::Base256 => self.octal(at, width, value),
            // Readers take the record instead.
            _ if numbers == Numbers::Pax => self.octal(at, width, 0),
            _ => self.base256(at, width, value),
        }
    }

    fn finish(mut self, out: &mut Vec<u8>) {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|b| u32::from(*b)).sum();
        self.text(148, 8, format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&self.0);
    }
}

impl Member {
    fn write(&self, out: &mut Vec<u8>) {
        let style = &self.style;
        let sparse = match &self.what {
            What::File(_) => style.sparse,
            _ => Sparse::No,
        };
        let gnu = sparse == Sparse::OldGnu || style.long == Long::Gnu;
        let (mut header, mut records, mut stored) = (Header::new(gnu), Vec::new(), Vec::new());
        header.0[156] = self.type_byte(sparse);
        if style.strange_records {
            records.extend(record(b"VENDOR.strange", b"a\nb=c\0d\n12 path=oops\n"));
            records.extend(record(b"atime", b"1.5"));
        }
        self.name(&mut header, &mut records, out, gnu);
        self.numbers(&mut header, &mut records);
        let mut map_blocks = Vec::new();
        if let What::File(content) = &self.what {
            stored = self.content(content, sparse, &mut header, &mut records, &mut map_blocks);
        }
        if style.numbers == Numbers::Pax && !stored.is_empty() {
            records.extend(record(b"size", stored.len().to_string().as_bytes()));
        }
        header.number(124, 12, stored.len() as i128, style.numbers);
        for (name, value) in &self.xattrs {
            records.extend(record(&[b"SCHILY.xattr.".as_slice(), name].concat(), value));
        }
        if !records.is_empty() {
            extension(out, b'x', &records);
        }
        header.finish(out);
        out.extend_from_slice(&map_blocks);
        padded(out, &stored);
    }

    fn type_byte(&self, sparse: Sparse) -> u8 {
        match &self.what {
            What::File(_) if sparse == Sparse::OldGnu => b'S',
            What::File(_) => self.style.file_type,
            What::HardLink(_) => b'1',
            What::Symlink(_) => b'2',
            What::Character(..) => b'3',
            What::Block(..) => b'4',
            What::Directory => b'5',
            What::Fifo => b'6',
        }
    }

    fn name(&self, header: &mut Header, records: &mut Vec<u8>, out: &mut Vec<u8>, gnu: bool) {
        let link: &[u8] = match &self.what {
            What::HardLink(target) | What::Symlink(target) => target,
            _ => b"",
        };
        for (text, field, key, kind) in [(link, 157, "linkpath", b'K'), (&self.path[..], 0, "path", b'L')] {
            // A NUL ends a field, a PAX record holds any byte.
            let fits = text.len() <= 100 && !text.contains(&0);
            let split = (field == 0 && self.style.long == Long::Prefix && !gnu && !fits).then(|| split(text)).flatten();
            match split {
                _ if fits => header.text(field, 100, text),
                Some((prefix, rest)) => {
                    header.text(345, 155, prefix);
                    header.text(0, 100, rest);
                }
                None if gnu => extension(out, kind, &[text, b"\0"].concat()),
                None => {
                    header.text(field, 100, b"see the extended header");
                    records.extend(record(key.as_bytes(), text));
                }
            }
        }
    }

    fn numbers(&self, header: &mut Header, records: &mut Vec<u8>) {
        let numbers = self.style.numbers;
        header.number(100, 8, self.mode.into(), if numbers == Numbers::Pax { Numbers::Octal } else { numbers });
        for (value, field, key) in [(self.uid, 108, "uid"), (self.gid, 116, "gid")] {
            header.number(field, 8, value.into(), numbers);
            if numbers == Numbers::Pax {
                records.extend(record(key.as_bytes(), value.to_string().as_bytes()));
            }
        }
        header.number(136, 12, self.mtime.0.into(), numbers);
        if numbers == Numbers::Pax {
            records.extend(record(b"mtime", time(self.mtime).as_bytes()));
        }
        if let What::Character(major, minor) | What::Block(major, minor) = self.what {
            header.number(329, 8, major.into(), Numbers::Octal);
            header.number(337, 8, minor.into(), Numbers::Octal);
        }
    }

    /// What is stored of a file; what is said about its holes goes elsewhere.
    fn content(
        &self,
        content: &Content,
        sparse: Sparse,
        header: &mut Header,
        records: &mut Vec<u8>,
        map_blocks: &mut Vec<u8>,
    ) -> Vec<u8> {
        let data: Vec<u8> = content.islands.iter().flat_map(Island::bytes).collect();
        let mut map: Vec<(u64, u64)> = content.islands.iter().map(|island| (island.at, island.len as u64)).collect();
        // GNU tar marks a hole at the end, and readers need not take an empty map.
        if map.last().is_none_or(|(at, len)| at + len < content.size) {
            map.push((content.size, 0));
        }
        let mut say = |key: &str, value: String| records.extend(record(key.as_bytes(), value.as_bytes()));
        match sparse {
            Sparse::No => return content.bytes(),
            Sparse::OldGnu => {
                old_map(header, map_blocks, &map, content.size);
                return data;
            }
            Sparse::Pax00 => {
                say("GNU.sparse.size", content.size.to_string());
                say("GNU.sparse.numblocks", map.len().to_string());
                for (at, len) in &map {
                    say("GNU.sparse.offset", at.to_string());
                    say("GNU.sparse.numbytes", len.to_string());
                }
            }
            Sparse::Pax01 => {
                let map: Vec<String> = map.iter().map(|(at, len)| format!("{at},{len}")).collect();
                say("GNU.sparse.size", content.size.to_string());
                say("GNU.sparse.numblocks", map.len().to_string());
                say("GNU.sparse.map", map.join(","));
            }
            Sparse::Pax10 => {
                say("GNU.sparse.major", "1".into());
                say("GNU.sparse.minor", "0".into());
                say("GNU.sparse.realsize", content.size.to_string());
                records.extend(record(b"GNU.sparse.name", &self.path));
                let mut stored = format!("{}\n", map.len()).into_bytes();
                for (at, len) in &map {
                    stored.extend_from_slice(format!("{at}\n{len}\n").as_bytes());
                }
                stored.resize(stored.len().next_multiple_of(BLOCK), 0);
                stored.extend_from_slice(&data);
                return stored;
            }
        }
        data
    }
}

/// Four pieces in the header, 21 in each block behind it.
fn old_map(header: &mut Header, blocks: &mut Vec<u8>, map: &[(u64, u64)], size: u64) {
    let (here, more) = map.split_at(map.len().min(4));
    for (number, (at, len)) in here.iter().enumerate() {
        header.octal(386 + number * 24, 12, *at);
        header.octal(398 + number * 24, 12, *len);
    }
    header.0[482] = u8::from(!more.is_empty());
    header.octal(483, 12, size);
    for (number, pieces) in more.chunks(21).enumerate() {
        let mut block = Header([0; BLOCK]);
        for (number, (at, len)) in pieces.iter().enumerate() {
            block.octal(number * 24, 12, *at);
            block.octal(number * 24 + 12, 12, *len);
        }
        block.0[504] = u8::from(more.len() > (number + 1) * 21);
        blocks.extend_from_slice(&block.0);
    }
}

/// Splits a path at a slash into at most 155 and 100 bytes.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = (1..path.len().saturating_sub(1)).rev().find(|at| path[*at] == b'/' && *at <= 155)?;
    let (prefix, rest) = (&path[..at], &path[at + 1..]);
    ((1..=100).contains(&rest.len()) && !path.contains(&0)).then_some((prefix, rest))
}

/// A time as a decimal fraction.
fn time((seconds, nanos): (i64, u32)) -> String {
    match (seconds, nanos) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanos:09}"),
        _ => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
    }
}
