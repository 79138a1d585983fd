//! Extended attributes: pairs of a full name and a value (`rafs-v5.md` section 7.1).

use zerocopy::FromBytes;

use super::{BootstrapError, Number};
use crate::format::rafs5::XattrPair;

/// Longest name and longest value in bytes.
const MAX_NAME: usize = 255;
const MAX_VALUE: usize = 65536;

/// The xattrs of one inode, in the order in which they are stored. Ends with the first error.
#[derive(Clone, Debug)]
pub struct Pairs<'a> {
    number: Number,
    rest: &'a [u8],
}

/// Full name and value.
type Pair<'a> = (&'a [u8], &'a [u8]);

impl<'a> Pairs<'a> {
    pub(super) fn new(number: Number, rest: &'a [u8]) -> Self {
        Self { number, rest }
    }

    /// Name and value of the next pair, and what is behind it.
    fn split(&self) -> Result<(Pair<'a>, &'a [u8]), BootstrapError> {
        let wrong = |rule| BootstrapError::Xattr { number: self.number, rule };
        let (pair, rest) = XattrPair::ref_from_prefix(self.rest).map_err(|_| wrong("pair size does not fit"))?;
        let size = usize::try_from(pair.size.get()).map_err(|_| wrong("pair size does not fit"))?;
        let (pair, rest) = rest.split_at_checked(size).ok_or(wrong("pair size is more than the table has"))?;
        let nul = pair.iter().position(|&byte| byte == 0).ok_or(wrong("name without an end"))?;
        let (name, value) = (&pair[..nul], &pair[nul + 1..]);
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(wrong("name size is not 1 to 255"));
        }
        if value.len() > MAX_VALUE {
            return Err(wrong("value size is more than 65536"));
        }
        Ok(((name, value), rest))
    }
}

impl<'a> Iterator for Pairs<'a> {
    type Item = Result<Pair<'a>, BootstrapError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let split = self.split();
        self.rest = split.as_ref().map_or(&[], |(_, rest)| rest);
        Some(split.map(|(pair, _)| pair))
    }
}
