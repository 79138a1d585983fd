//! Places where a foreign gzip file can be entered (`blob.md` section 11.1).
//!
//! A chunk of such a layer is a range of what one *context* decompresses to. To decompress context
//! `c`: a raw inflate of window 15; if [`Context::bits`] is not 0, first those high bits of
//! [`Context::byte`], as the value `byte >> (8 - bits)`; the dictionary; then the bytes of
//! [`Context::stored`], which give exactly [`Context::out_len`] bytes. Where a member of the gzip
//! file ends on the way, its 8 bytes of trailer and the header of the next are skipped and raw
//! inflate goes on. The tables are parsed and checked here; [`Decoder`](super::Decoder) decompresses.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{MAX_UNIT, Part};
use crate::base::ByteRange;
use crate::format::blobfile::{ChunkInfoV2, ZranContext};

/// Longest dictionary: the window of deflate, in bytes.
const MAX_DICTIONARY: u32 = 32 << 10;

/// One checked context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The compressed bytes in the gzip file.
    pub stored: ByteRange,
    /// How many plain bytes they give: 1 to [`MAX_UNIT`].
    pub out_len: u32,
    /// The byte before [`Context::stored`], of which some bits belong to the context.
    pub byte: u8,
    /// How many high bits of it do, 0 to 7.
    pub bits: u8,
    /// Where the dictionary lies in the area of dictionaries: at most 32 KiB.
    dictionary: (usize, usize),
}

impl Context {
    fn place(&self) -> (ByteRange, u32) {
        (self.stored, self.out_len)
    }
}

/// All contexts of one blob and the area with their dictionaries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contexts {
    contexts: Vec<Context>,
    /// Numbers of the contexts, sorted by what they are found by.
    by_place: Vec<u32>,
    dictionaries: Vec<u8>,
}

impl Contexts {
    /// Checks `rows` against the area of dictionaries behind them and the end of the gzip file.
    pub(super) fn new(rows: &[ZranContext], dictionaries: &[u8], data_end: u64) -> Result<Self, &'static str> {
        let contexts =
            rows.iter().map(|row| check(row, dictionaries.len(), data_end)).collect::<Result<Vec<_>, _>>()?;
        let count = u32::try_from(contexts.len()).map_err(|_| "there are more contexts than numbers for them")?;
        let mut by_place: Vec<u32> = (0..count).collect();
        by_place.sort_by_key(|&number| contexts[number as usize].place());
        Ok(Self { contexts, by_place, dictionaries: dictionaries.to_vec() })
    }

    /// Appends them to `out` as [`Contexts::saved`] understands them: how many there are, a row for each, and the
    /// dictionaries.
    pub(super) fn save(&self, out: &mut Vec<u8>) {
        let count = u32::try_from(self.contexts.len()).expect("checked when they were made");
        out.extend_from_slice(U32::new(count).as_bytes());
        let narrow = |len: u64| u32::try_from(len).expect("a row had 32 bits for it");
        for context in &self.contexts {
            let (from, to) = context.dictionary;
            let mut row = ZranContext::new_zeroed();
            row.in_offset = context.stored.start().into();
            row.in_len = narrow(context.stored.len()).into();
            row.out_len = context.out_len.into();
            row.dict_offset = (from as u64).into();
            row.dict_size = narrow((to - from) as u64).into();
            (row.ctx_byte, row.ctx_bits) = (context.byte, context.bits);
            out.extend_from_slice(row.as_bytes());
        }
        out.extend_from_slice(&self.dictionaries);
    }

    /// Reads what [`Contexts::save`] wrote.
    pub(super) fn saved(bytes: &[u8]) -> Result<Self, &'static str> {
        let cut = |_| "too short for its contexts";
        let (count, rest) = U32::read_from_prefix(bytes).map_err(|_| "too short for its contexts")?;
        let (rows, dictionaries) =
            <[ZranContext]>::ref_from_prefix_with_elems(rest, count.get() as usize).map_err(cut)?;
        // Where the gzip file ends was compared when the tables came.
        Self::new(rows, dictionaries, u64::MAX)
    }

    /// The context that turns the bytes at `stored` into `out_len` plain bytes. Of several, which only
    /// a damaged index has, it is the first.
    pub fn find(&self, stored: ByteRange, out_len: u32) -> Option<&Context> {
        let place = (stored, out_len);
        let at = self.by_place.partition_point(|&number| self.contexts[number as usize].place() < place);
        let found = &self.contexts[*self.by_place.get(at)? as usize];
        (found.place() == place).then_some(found)
    }

    /// All contexts, in the order of their numbers.
    pub fn all(&self) -> &[Context] {
        &self.contexts
    }

    /// The plain bytes that precede `context`, from the start of its window.
    pub fn dictionary(&self, context: &Context) -> &[u8] {
        let (from, to) = context.dictionary;
        &self.dictionaries[from..to]
    }

    /// The place of the chunk that `row` describes.
    pub(super) fn member(&self, row: &ChunkInfoV2) -> Result<(ByteRange, Part), &'static str> {
        let (number, at) = row.place();
        let context = self.contexts.get(number as usize).ok_or("a chunk is in a context that does not exist")?;
        if u64::from(at) + u64::from(row.uncompressed_size()) > context.out_len.into() {
            return Err("a chunk does not lie in what its context decompresses to");
        }
        Ok((context.stored, Part { at, whole: context.out_len }))
    }
}

fn check(row: &ZranContext, dictionaries: usize, data_end: u64) -> Result<Context, &'static str> {
    let stored = ByteRange::at(row.in_offset.get(), row.in_len.get().into())
        .filter(|stored| !stored.is_empty() && stored.end() <= data_end)
        .ok_or("a context lies outside the gzip file")?;
    if row.out_len.get() == 0 || u64::from(row.out_len.get()) > MAX_UNIT {
        return Err("a context decompresses to nothing, or to more than 16 MiB");
    }
    if row.ctx_bits > 7 || row.ctx_bits > 0 && stored.start() == 0 {
        return Err("a context starts within a byte that does not exist");
    }
    let size = row.dict_size.get();
    let from = usize::try_from(row.dict_offset.get()).ok();
    let dictionary = from.and_then(|from| Some((from, from.checked_add(size as usize)?)));
    match dictionary {
        Some((from, to)) if size <= MAX_DICTIONARY && to <= dictionaries => Ok(Context {
            stored,
            out_len: row.out_len.get(),
            byte: row.ctx_byte,
            bits: row.ctx_bits,
            dictionary: (from, to),
        }),
        _ => Err("a dictionary is longer than 32 KiB or lies outside the tables"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> ZranContext {
        let mut row = ZranContext::new_zeroed();
        row.in_offset = 100.into();
        row.in_len = 50.into();
        row.out_len = 4000.into();
        row.dict_offset = 8.into();
        row.dict_size = 24.into();
        row
    }

    fn is_refused(change: impl FnOnce(&mut ZranContext)) -> bool {
        let mut row = row();
        change(&mut row);
        Contexts::new(&[row], &[0; 32], 150).is_err()
    }

    #[test]
    fn contexts_outside_of_what_there_is_are_refused() {
        assert!(!is_refused(|_| ()));
        assert!(is_refused(|row| row.in_len = 51.into()));
        assert!(is_refused(|row| row.in_len = 0.into()));
        assert!(is_refused(|row| row.in_offset = u64::MAX.into()));
        assert!(is_refused(|row| row.out_len = 0.into()));
        assert!(is_refused(|row| row.out_len = ((16 << 20) + 1).into()));
        assert!(is_refused(|row| row.dict_size = 25.into()));
        assert!(is_refused(|row| row.dict_offset = u64::MAX.into()));
        assert!(is_refused(|row| row.ctx_bits = 8));
        assert!(is_refused(|row| (row.ctx_bits, row.in_offset) = (1, 0.into())));
    }

    #[test]
    fn dictionaries_are_cut_where_their_context_says() {
        let area: Vec<u8> = (0..32).collect();
        let contexts = Contexts::new(&[row()], &area, 150).unwrap();
        assert_eq!(contexts.dictionary(&contexts.all()[0]), &area[8..]);
    }

    #[test]
    fn contexts_are_saved_whole() {
        let contexts = Contexts::new(&[row(), row()], &[7; 32], 150).unwrap();
        let mut bytes = Vec::new();
        contexts.save(&mut bytes);

        assert_eq!(Contexts::saved(&bytes), Ok(contexts));
        for len in 0..84 {
            assert!(Contexts::saved(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn contexts_are_found_by_where_they_lie_and_what_they_give() {
        let mut rows = [row(), row(), row(), row()];
        rows[0].in_offset = 120.into();
        rows[0].in_len = 30.into();
        rows[2].out_len = 17.into();
        rows[3].ctx_byte = 99;
        let contexts = Contexts::new(&rows, &[0; 32], 150).unwrap();
        let found = |at, len, out_len| {
            let context = contexts.find(ByteRange::at(at, len).unwrap(), out_len)?;
            contexts.all().iter().position(|one| std::ptr::eq(one, context))
        };

        assert_eq!(found(120, 30, 4000), Some(0));
        assert_eq!(found(100, 50, 4000), Some(1), "the first of two");
        assert_eq!(found(100, 50, 17), Some(2));
        assert_eq!(found(100, 50, 18), None);
        assert_eq!(found(100, 49, 4000), None);
        assert_eq!(found(200, 50, 4000), None);
    }
}
