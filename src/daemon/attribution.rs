//! From ranges of devices back to files: the inverse of extents.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::api::FileRanges;
use crate::base::{BLOCK, ByteRange};
use crate::cache::Want;
use crate::image::{Extent, Image, ImageError, Kind};

/// Files and parts of them, in the order of the ranges they were found for.
#[derive(Debug, Default)]
pub(super) struct Attribution {
    pub(super) files: Vec<FileRanges>,
    /// Bytes in whole blocks that no file of the image leads to.
    pub(super) unmapped: u64,
}

/// A part of a file that explains a part of a range.
struct Claim {
    /// Which of the ranges, and where in the device.
    read: usize,
    at: u64,
    file: usize,
    part: ByteRange,
}

/// Finds the files behind `reads`, which do not overlap. Bytes that several files share belong to the
/// one whose path the walk meets first. Memory is bounded by `reads` and the paths that are found.
///
/// # Errors
/// If the image makes no sense.
pub(super) fn attribute(image: &Image, reads: &[Want]) -> Result<Attribution, ImageError> {
    let mut open: Vec<BTreeMap<u64, (u64, usize)>> = vec![BTreeMap::new(); image.devices().len()];
    for (read, want) in reads.iter().enumerate() {
        if let Some(open) = open.get_mut(want.device) {
            open.insert(want.decoded.start(), (want.decoded.end(), read));
        }
    }
    let (mut claims, mut paths) = (Vec::new(), Vec::new());
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        let visit = visit?;
        if visit.inode.kind != Kind::Regular {
            continue;
        }
        let before = claims.len();
        let mut claim = |extent: Extent<'_>| {
            if let Extent::Device { at, device, decoded } = extent {
                take(&mut open[device], decoded, &mut |read, taken| {
                    let part = ByteRange::at(at + (taken.start() - decoded.start()), taken.len()).unwrap_or_default();
                    claims.push(Claim { read, at: taken.start(), file: paths.len(), part });
                });
            }
            ControlFlow::Continue(())
        };
        image.extents(&visit.inode, &mut claim)?;
        if claims.len() > before {
            paths.push([b"/", &visit.path.join(&b'/')[..]].concat());
        }
    }
    let whole_blocks = |(&start, &(end, _)): (&u64, &(u64, usize))| end.saturating_sub(start.next_multiple_of(BLOCK));
    let unmapped = open.iter().flatten().map(whole_blocks).sum();
    claims.sort_by_key(|claim| (claim.read, claim.at));
    Ok(Attribution { files: lines(&claims, &paths), unmapped })
}

/// Takes what lies in `decoded` out of `open`, and hands it on.
fn take(open: &mut BTreeMap<u64, (u64, usize)>, decoded: ByteRange, taken: &mut dyn FnMut(usize, ByteRange)) {
    let from = open.range(..=decoded.start()).next_back().map_or(decoded.start(), |(&start, _)| start);
    while let Some((&start, &(end, read))) =
        open.range(from..decoded.end()).find(|(_, (end, _))| *end > decoded.start())
    {
        open.remove(&start);
        let common = ByteRange::new(start.max(decoded.start()), end.min(decoded.end())).unwrap_or_default();
        if start < common.start() {
            open.insert(start, (common.start(), read));
        }
        if common.end() < end {
            open.insert(common.end(), (end, read));
        }
        taken(read, common);
    }
}

/// One entry for each file until another one comes.
fn lines(claims: &[Claim], paths: &[Vec<u8>]) -> Vec<FileRanges> {
    let mut lines: Vec<(usize, Vec<(u64, u64)>)> = Vec::new();
    for claim in claims {
        let part = (claim.part.start(), claim.part.len());
        match lines.last_mut().filter(|(file, _)| *file == claim.file) {
            Some((_, ranges)) => match ranges.last_mut().filter(|(at, len)| at + len == part.0) {
                Some((_, len)) => *len += part.1,
                None => ranges.push(part),
            },
            None => lines.push((claim.file, vec![part])),
        }
    }
    lines.into_iter().map(|(file, ranges)| FileRanges::new(&paths[file], ranges)).collect()
}

/// The entries as a list that `rafsd optimize` and `rafsd mount --prefetch` read: a line of text for
/// each, or of JSON for a path that a line of text cannot hold.
pub(super) fn list(files: &[FileRanges]) -> String {
    let mut list = String::new();
    for file in files {
        match &file.path {
            Some(path) if !path.contains(char::is_control) => {
                let ranges: Vec<_> = file.ranges.iter().map(|(at, len)| format!("{at}+{len}")).collect();
                list += &format!("{path}:{}\n", ranges.join(","));
            }
            _ => {
                list += &serde_json::to_string(file).expect("strings and numbers");
                list.push('\n');
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn what_is_taken_is_open_no_more_and_the_rest_is() {
        let mut open = BTreeMap::from([(0, (10, 0)), (20, (30, 1)), (30, (40, 2))]);
        let mut taken = Vec::new();
        for decoded in [range(5, 25), range(0, 6), range(28, 35), range(50, 60)] {
            take(&mut open, decoded, &mut |read, part| taken.push((read, part.start(), part.end())));
        }
        assert_eq!(taken, [(0, 5, 10), (1, 20, 25), (0, 0, 5), (1, 28, 30), (2, 30, 35)]);
        assert_eq!(open, BTreeMap::from([(25, (28, 1)), (35, (40, 2))]));
    }

    #[test]
    fn entries_follow_the_order_of_reads_and_join_what_continues() {
        let claim = |read, at, file, start, end| Claim { read, at, file, part: range(start, end) };
        let claims =
            [claim(0, 0, 1, 0, 100), claim(0, 100, 1, 100, 150), claim(0, 4096, 0, 0, 10), claim(1, 0, 1, 500, 600)];
        let files = lines(&claims, &[b"/a:1+2".to_vec(), b"/b\n\xff".to_vec()]);
        assert_eq!(
            list(&files),
            "{\"path_hex\":\"2f620aff\",\"ranges\":[[0,150]]}\n/a:1+2:0+10\n{\"path_hex\":\"2f620aff\",\"ranges\":[[500,100]]}\n"
        );
    }
}
