//! The parts of a blob file, found from its end: tar headers and the table of contents
//! (`blob.md` sections 6 and 7).
//!
//! A part is followed by its header, so a file is read backwards: [`Trailer`] is the last header,
//! and says where the part before it lies. That part is a bootstrap, or a table of contents that
//! says where everything else is.

use zerocopy::FromBytes;

use super::entry::MAX_STORED;
use crate::base::{ByteRange, Digest};
use crate::codec::{self, CodecError};
use crate::format::blobfile::{PartHeader, TocEntry};

/// Bytes of a part's header.
pub const HEADER_LEN: u64 = size_of::<PartHeader>() as u64;

/// Longest table of contents in bytes, its header included.
const MAX_TOC: u64 = 64 << 10;

/// What the last header of a file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// What precedes the header.
    pub part: LastPart,
    /// Where it lies.
    pub stored: ByteRange,
}

/// The parts that may be the last of a blob with headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastPart {
    /// `rafs.blob.toc`: read it with [`Toc::parse`].
    Toc,
    /// `image.boot`: a bootstrap, as is.
    Bootstrap,
}

/// Why a blob does not give its parts away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TocError {
    /// There is no header at the end: the file is a blob of another layout, or no blob.
    #[error("it does not end in a header of the parts of a blob")]
    NoHeader,
    /// The last header makes no sense.
    #[error("the header at its end {0}")]
    Header(&'static str),
    /// An entry of the table of contents makes no sense.
    #[error("entry {entry} of its table of contents {rule}")]
    Entry { entry: usize, rule: &'static str },
    /// The part does not decompress.
    #[error("{name} is damaged")]
    Codec {
        name: String,
        #[source]
        cause: CodecError,
    },
    /// The plain bytes of a part are not the promised ones.
    #[error("{name} has the SHA-256 {got}, the table of contents says {want}")]
    Digest { name: String, got: Digest, want: Digest },
}

impl Trailer {
    /// Reads the last [`HEADER_LEN`] bytes of a file of `file_len` bytes.
    pub fn parse(last: &[u8], file_len: u64) -> Result<Self, TocError> {
        let header = PartHeader::ref_from_bytes(last).map_err(|_| TocError::NoHeader)?;
        if header.magic != PartHeader::GNU || header.kind != PartHeader::REGULAR {
            return Err(TocError::NoHeader);
        }
        let part = match padded(&header.name) {
            b"rafs.blob.toc" => LastPart::Toc,
            b"image.boot" => LastPart::Bootstrap,
            _ => return Err(TocError::NoHeader),
        };
        if !header.is_sound() {
            return Err(TocError::Header("has a wrong checksum"));
        }
        let end = file_len.checked_sub(HEADER_LEN).filter(|_| file_len <= MAX_STORED);
        let end = end.ok_or(TocError::Header("is in a file of an impossible length"))?;
        let size = header.size().ok_or(TocError::Header("has no size"))?;
        let start = end.checked_sub(size).ok_or(TocError::Header("is of a part longer than the file"))?;
        let stored = ByteRange::new(start, end).expect("start is not behind end");
        if part == LastPart::Toc {
            let row = size_of::<TocEntry>() as u64;
            if size == 0 || !size.is_multiple_of(row) || size > MAX_TOC - HEADER_LEN {
                return Err(TocError::Header("is of a table of contents of an impossible size"));
            }
        }
        Ok(Self { part, stored })
    }
}

/// Where the parts of a blob lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toc {
    parts: Vec<TocPart>,
}

/// One part of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TocPart {
    /// What it is: `image.blob`, `blob.meta`, `blob.meta.header`, `blob.digest` or `image.boot`.
    pub name: String,
    /// Where it lies in the file. Old writers named a wrong place for `image.blob`.
    pub stored: ByteRange,
    /// How many plain bytes it has. Nobody has vouched for this number.
    pub plain_len: u64,
    /// SHA-256 of the plain bytes.
    pub digest: Digest,
    form: Form,
}

/// How a part is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Plain,
    Zstd,
    Lz4,
}

/// One LZ4 block gives at most so many times its own length.
const MAX_LZ4_RATIO: u64 = 255;

impl Toc {
    /// Reads the table of contents, which lies at `stored` in its file.
    pub fn parse(bytes: &[u8], stored: ByteRange) -> Result<Self, TocError> {
        let rows =
            <[TocEntry]>::ref_from_bytes(bytes).map_err(|_| TocError::Header("is of a cut table of contents"))?;
        let mut parts: Vec<TocPart> = Vec::new();
        for (number, row) in rows.iter().enumerate() {
            let part = TocPart::new(row, stored.start()).map_err(|rule| TocError::Entry { entry: number, rule })?;
            if parts.iter().any(|other| other.name == part.name) {
                return Err(TocError::Entry { entry: number, rule: "names a part that another one names" });
            }
            parts.push(part);
        }
        Ok(Self { parts })
    }

    /// All parts, in the order of the table.
    pub fn parts(&self) -> &[TocPart] {
        &self.parts
    }

    /// The part called `name`.
    pub fn find(&self, name: &str) -> Option<&TocPart> {
        self.parts.iter().find(|part| part.name == name)
    }
}

impl TocPart {
    fn new(row: &TocEntry, toc_start: u64) -> Result<Self, &'static str> {
        let form = match row.flags.get() & 0xf {
            TocEntry::PLAIN => Form::Plain,
            TocEntry::ZSTD => Form::Zstd,
            TocEntry::LZ4 => Form::Lz4,
            _ => return Err("is neither plain nor compressed with zstd or lz4"),
        };
        let name = std::str::from_utf8(padded(&row.name)).map_err(|_| "has no name in UTF-8")?;
        let stored = ByteRange::at(row.compressed_offset.get(), row.compressed_size.get());
        // The one wrong place that writers are known to have named (`blob.md` section 6).
        let may_lie_anywhere = name == "image.blob";
        let stored = stored.filter(|stored| may_lie_anywhere || stored.end() <= toc_start);
        let stored = stored.ok_or("lies behind the table")?;
        let plain_len = row.uncompressed_size.get();
        if form == Form::Plain && !may_lie_anywhere && plain_len != stored.len() {
            return Err("is plain and has two sizes");
        }
        Ok(Self { name: name.to_owned(), stored, plain_len, digest: Digest(row.digest), form })
    }

    /// The plain bytes of the part from its stored ones, checked. Refuses more than `most`.
    pub fn open(&self, stored: &[u8], most: u64) -> Result<Vec<u8>, TocError> {
        let codec = |cause| TocError::Codec { name: self.name.clone(), cause };
        if self.plain_len > most || stored.len() as u64 != self.stored.len() {
            let (got, want) = (stored.len(), usize::try_from(self.plain_len.min(most)).unwrap_or(usize::MAX));
            return Err(codec(CodecError::Length { codec: "stored", got, want }));
        }
        let plain = match self.form {
            Form::Plain => stored.to_vec(),
            Form::Zstd => codec::zstd_decode_growing(stored, self.plain_len).map_err(codec)?,
            Form::Lz4 => {
                // What no block can hold gets no room.
                let len = self.plain_len.min(stored.len() as u64 * MAX_LZ4_RATIO);
                let mut plain = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
                codec::lz4_block_decode(stored, &mut plain).map_err(codec)?;
                plain
            }
        };
        let (got, want) = (codec::sha256(&plain), self.digest);
        if got == want { Ok(plain) } else { Err(TocError::Digest { name: self.name.clone(), got, want }) }
    }
}

fn padded(field: &[u8]) -> &[u8] {
    let len = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    &field[..len]
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    const BOOT: &[u8] = b"the bootstrap, the bootstrap, the bootstrap, the bootstrap";

    fn entry(name: &[u8], flags: u32, (at, stored): (u64, u64), plain: &[u8]) -> TocEntry {
        let mut row = TocEntry::new_zeroed();
        row.name[..name.len()].copy_from_slice(name);
        row.flags = flags.into();
        row.compressed_offset = at.into();
        row.compressed_size = stored.into();
        row.uncompressed_size = (plain.len() as u64).into();
        row.digest = codec::sha256(plain).0;
        row
    }

    /// A blob with data, a compressed bootstrap and a table of contents.
    fn blob() -> Vec<u8> {
        let packed = codec::Compressor::zstd(3).unwrap().compress(BOOT).unwrap().to_vec();
        let mut file = [b"data", PartHeader::new("image.blob", 4).as_bytes(), &packed].concat();
        file.extend_from_slice(PartHeader::new("image.boot", packed.len() as u64).as_bytes());
        let rows = [
            entry(b"image.blob", TocEntry::PLAIN, (0, 4), b"data"),
            entry(b"image.boot", TocEntry::ZSTD, (516, packed.len() as u64), BOOT),
        ];
        file.extend_from_slice(rows.as_bytes());
        file.extend_from_slice(PartHeader::new("rafs.blob.toc", 256).as_bytes());
        file
    }

    /// The bootstrap in `file`, the way a reader of the whole file gets it.
    fn bootstrap(file: &[u8]) -> Result<Vec<u8>, TocError> {
        let at = |range: ByteRange| {
            let bytes = usize::try_from(range.start()).ok().zip(usize::try_from(range.end()).ok());
            bytes.and_then(|(from, to)| file.get(from..to)).expect("checked ranges lie in the file")
        };
        let last = &file[file.len().saturating_sub(512)..];
        let trailer = Trailer::parse(last, file.len() as u64)?;
        if trailer.part != LastPart::Toc {
            // A file that is cut between its parts is a sound one with fewer.
            return Err(TocError::NoHeader);
        }
        let toc = Toc::parse(at(trailer.stored), trailer.stored)?;
        let part = toc.find("image.boot").ok_or(TocError::NoHeader)?;
        part.open(at(part.stored), 1 << 20)
    }

    #[test]
    fn parts_of_one_lz4_block_are_opened_and_claim_no_more_than_it_can_hold() {
        let stored = lz4_flex::block::compress(BOOT);
        let row = entry(b"blob.meta", TocEntry::LZ4, (0, stored.len() as u64), BOOT);
        let open = |row: TocEntry, stored: &[u8]| {
            let place = ByteRange::at(1000, 128).unwrap();
            Toc::parse(row.as_bytes(), place)?.parts()[0].open(stored, 1 << 40)
        };

        assert_eq!(open(row, &stored).unwrap(), BOOT);
        assert!(open(row, &[0; 7]).is_err());
        let mut lying = row;
        lying.uncompressed_size = (1 << 40).into();
        assert!(open(lying, &stored).is_err());
    }

    #[test]
    fn the_bootstrap_is_found_from_the_end() {
        assert_eq!(bootstrap(&blob()).as_deref(), Ok(BOOT));

        let mut plain = BOOT.to_vec();
        plain.extend_from_slice(PartHeader::new("image.boot", BOOT.len() as u64).as_bytes());
        let trailer = Trailer::parse(&plain[BOOT.len()..], plain.len() as u64).unwrap();
        assert_eq!(
            trailer,
            Trailer { part: LastPart::Bootstrap, stored: ByteRange::at(0, BOOT.len() as u64).unwrap() }
        );
    }

    #[test]
    fn any_flipped_bit_gives_an_error_or_the_same_bootstrap() {
        let good = blob();
        let (mut refused, mut same) = (0, 0);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match bootstrap(&bad) {
                Err(_) => refused += 1,
                Ok(plain) => {
                    same += 1;
                    assert_eq!(plain, BOOT, "bit {bit}");
                }
            }
        }
        assert!(refused > 1000 && same > 1000, "{refused} {same}");
        for len in 0..good.len() {
            assert!(bootstrap(&good[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn sizes_that_nobody_vouches_for_are_refused() {
        let size = |name, size: u64| Trailer::parse(PartHeader::new(name, size).as_bytes(), 1 << 20);
        assert!(size("image.boot", (1 << 20) - 512).is_ok());
        assert!(size("image.boot", (1 << 20) - 511).is_err());
        assert!(size("image.boot", u64::MAX).is_err());
        assert!(size("rafs.blob.toc", 0).is_err());
        assert!(size("rafs.blob.toc", 129).is_err());
        assert!(size("rafs.blob.toc", 64 << 10).is_err());

        let within = ByteRange::at(1000, 128).unwrap();
        let parse = |row: TocEntry| Toc::parse(row.as_bytes(), within);
        assert!(parse(entry(b"image.boot", TocEntry::ZSTD, (900, 101), BOOT)).is_err(), "behind the table");
        assert!(parse(entry(b"image.boot", TocEntry::ZSTD, (u64::MAX, 1), BOOT)).is_err(), "overflow");
        assert!(parse(entry(b"image.boot", 8, (0, 10), BOOT)).is_err(), "a codec that there is not");
        assert!(parse(entry(b"image.boot", TocEntry::PLAIN, (0, 10), BOOT)).is_err(), "two sizes");
        let mut huge = entry(b"image.boot", TocEntry::ZSTD, (0, 10), BOOT);
        huge.uncompressed_size = u64::MAX.into();
        assert!(parse(huge).unwrap().parts()[0].open(&[0; 10], 1 << 20).is_err());
        let twice = [entry(b"image.boot", TocEntry::ZSTD, (0, 10), BOOT); 2];
        assert!(Toc::parse(twice.as_bytes(), ByteRange::at(1000, 256).unwrap()).is_err());
        let full = parse(entry(b"blob.meta.header", TocEntry::ZSTD, (0, 10), BOOT)).unwrap();
        assert!(full.find("blob.meta.header").is_some(), "a name may fill its field");
    }
}
