//! An image with a hot blob: what is needed first, in the order in which it is needed, in one place.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Serialize;

use super::error::BuildError;
use super::rewrite::{Existing, Form, Rewrite, make_blobs_dir};
use super::tree::{Kind, NodeId, Tree};
use super::{BlobReport, Progress, merge, stockblobs};
use crate::format::blobfile::features;

/// What to put into the hot blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotPath {
    /// Absolute. A directory means all below it.
    pub path: Vec<u8>,
    /// Offset and length in bytes of the parts of a file that are hot; all of it if there are none.
    pub ranges: Vec<(u64, u64)>,
}

/// How to rewrite an image with a hot blob.
#[derive(Debug)]
pub struct OptimizeSpec<'a> {
    pub existing: Existing<'a>,
    /// The first that is needed first.
    pub hot: &'a [HotPath],
    /// Made if it is not there. Gets `bootstrap` and `blobs/`.
    pub out_dir: &'a Path,
    /// Whether chunks of encrypted blobs may be stored plain.
    pub decrypt: bool,
}

/// What was made. The same for every run on the same image and list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OptimizeReport {
    /// Path of the bootstrap.
    pub bootstrap: String,
    pub bootstrap_bytes: u64,
    /// The hot blob.
    pub blob: BlobReport,
    /// Plain bytes of its chunks.
    pub hot_bytes: u64,
    /// Chunks of it that could not be copied as they were stored.
    pub encoded_chunks: u64,
    /// Entries of the prefetch table.
    pub prefetched_paths: u64,
    /// What is still needed of the blobs that the image had.
    pub others: Vec<StillNeeded>,
    /// What could not be followed as it was listed.
    pub remarks: Vec<Remark>,
}

/// How much of a blob the files of an image lead to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StillNeeded {
    pub id: String,
    pub chunks: u64,
    /// If none is, the new image does not name the blob.
    pub needed_chunks: u64,
    pub decoded_bytes: u64,
    /// In whole blocks, as `decoded_bytes`.
    pub needed_bytes: u64,
}

/// A line of the list that means less than it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remark {
    pub path: String,
    pub problem: &'static str,
}

/// Rewrites an image with a hot blob. The blobs of the image are not touched and are still needed.
///
/// # Errors
/// A [`BuildError`]. Nothing has a name then that was not there before.
pub fn optimize(spec: &OptimizeSpec<'_>, progress: &dyn Progress) -> Result<OptimizeReport, BuildError> {
    let mut rewrite = Rewrite::of(spec.existing)?;
    let mut remarks = Vec::new();
    let chosen =
        choose(&rewrite.stock.tree, spec.hot, rewrite.stock.agreed().map_or(1, |a| a.chunk_size), &mut remarks);
    if chosen.is_empty() {
        return Err(BuildError::NothingHot);
    }
    let row = |position: u32| rewrite.stock.chunks[position as usize].blob;
    if let Some(&chunk) = chosen.iter().find(|&&chunk| !spec.decrypt && rewrite.is_encrypted(row(chunk))) {
        let entry = &rewrite.stock.blobs.rows()[usize::from(row(chunk))];
        return Err(BuildError::WouldDecrypt(stockblobs::id_text(entry)));
    }
    let form = common_form(&rewrite, &chosen)?;
    let chosen = with_equals(&rewrite, chosen);

    progress.total(0, chosen.iter().map(|&chunk| u64::from(rewrite.stock.chunks[chunk as usize].plain_len)).sum());
    let blobs_dir = make_blobs_dir(spec.out_dir)?;
    let before = rewrite.stock.blobs.rows().to_vec();
    rewrite.copy(&chosen, form, features::IS_SEPARATED_WITH_PREFETCH_FILES, &blobs_dir, progress)?;

    let usage = rewrite.usage();
    let others = before.iter().zip(&usage).map(|(entry, usage)| StillNeeded {
        id: stockblobs::id_text(entry),
        chunks: entry.chunk_count.get().into(),
        needed_chunks: usage.chunks,
        decoded_bytes: entry.uncompressed_size.get(),
        needed_bytes: usage.decoded_bytes,
    });
    let others = others.collect();
    let first: Vec<u16> = (0u16..).zip(&usage).filter(|(_, usage)| usage.chunks > 0).map(|(row, _)| row).collect();
    let hot_chunks = &rewrite.stock.chunks[rewrite.first_new_chunk()..];
    let hot_bytes = hot_chunks.iter().map(|chunk| u64::from(chunk.plain_len)).sum();
    let encoded_chunks = rewrite.encoded_chunks;
    let tree = &rewrite.stock.tree;
    let prefetch = merge::prefetch_nodes(tree, spec.hot.iter().filter_map(|hot| tree.find(merge::split(&hot.path))));
    let mut made = rewrite.finish(&first, Some(&prefetch), spec.out_dir)?;
    Ok(OptimizeReport {
        bootstrap: made.bootstrap,
        bootstrap_bytes: made.bootstrap_bytes,
        blob: made.blobs.remove(0),
        hot_bytes,
        encoded_chunks,
        prefetched_paths: made.prefetched_paths,
        others,
        remarks,
    })
}

/// Chunks that the list leads to, in its order, each once.
fn choose(tree: &Tree, hot: &[HotPath], chunk_size: u32, remarks: &mut Vec<Remark>) -> Vec<u32> {
    let mut chosen =
        Chosen { chunk_size: chunk_size.into(), met: HashSet::new(), whole: HashSet::new(), chunks: Vec::new() };
    for HotPath { path, ranges } in hot {
        let mut remark = |problem| remarks.push(Remark { path: path.escape_ascii().to_string(), problem });
        let Some(node) = tree.find(merge::split(path)) else {
            remark("is not in the image");
            continue;
        };
        match &tree.node(node).kind {
            Kind::Directory(_) => {
                if !ranges.is_empty() {
                    remark("is a directory, of which all is taken");
                }
                chosen.below(tree, node);
            }
            Kind::Regular(content) => {
                if ranges.iter().any(|(offset, len)| offset.checked_add(*len).is_none_or(|end| end > content.size)) {
                    remark("ends before the end of a range");
                }
                chosen.file(tree, node, ranges);
            }
            _ => remark("is not a file or directory"),
        }
    }
    chosen.chunks
}

/// Chunks in the order in which they were chosen.
struct Chosen {
    chunk_size: u64,
    met: HashSet<u32>,
    /// Nodes that were taken with all they hold: a list may name them very often.
    whole: HashSet<NodeId>,
    chunks: Vec<u32>,
}

impl Chosen {
    /// All files below a directory, in the order of the format.
    fn below(&mut self, tree: &Tree, top: NodeId) {
        let mut todo = vec![top];
        while let Some(dir) = todo.pop() {
            if !self.whole.insert(dir) {
                continue;
            }
            let first = todo.len();
            for (_, node) in tree.children(dir) {
                match tree.node(node).kind {
                    Kind::Directory(_) => todo.push(node),
                    _ => self.file(tree, node, &[]),
                }
            }
            todo[first..].reverse();
        }
    }

    /// The chunks of a file that have bytes in one of `ranges`, in the order of the file; all if
    /// there are none.
    fn file(&mut self, tree: &Tree, node: NodeId, ranges: &[(u64, u64)]) {
        let Kind::Regular(content) = &tree.node(node).kind else { return };
        if self.whole.contains(&node) {
            return;
        }
        let mut spans = if ranges.is_empty() { vec![(0, content.size)] } else { spans(ranges) }.into_iter().peekable();
        for (number, cut) in (0u64..).zip(content.cuts()) {
            let (start, end) = (number * self.chunk_size, (number + 1) * self.chunk_size);
            while spans.next_if(|span| span.1 <= start).is_some() {}
            let cut = u32::try_from(cut).expect("cuts of a loaded image are positions of chunks");
            if spans.peek().is_some_and(|span| span.0 < end) && self.met.insert(cut) {
                self.chunks.push(cut);
            }
        }
        if ranges.is_empty() {
            self.whole.insert(node);
        }
    }
}

/// Start and end of what ranges of offset and length cover, in order, no two touching.
fn spans(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let spans = ranges.iter().map(|&(offset, len)| (offset, offset.saturating_add(len)));
    let mut sorted: Vec<_> = spans.filter(|(start, end)| start < end).collect();
    sorted.sort_unstable();
    sorted.dedup_by(|next, before| {
        let joins = next.0 <= before.1;
        if joins {
            before.1 = before.1.max(next.1);
        }
        joins
    });
    sorted
}

/// The form that most bytes of these chunks have already.
fn common_form(rewrite: &Rewrite<'_>, chosen: &[u32]) -> Result<Form, BuildError> {
    let mut bytes: HashMap<Form, u64> = HashMap::new();
    for &position in chosen {
        let chunk = &rewrite.stock.chunks[position as usize];
        *bytes.entry(rewrite.form(chunk.blob)?).or_default() += u64::from(chunk.plain_len);
    }
    let most = bytes.into_iter().max_by_key(|(form, bytes)| (*bytes, std::cmp::Reverse(form.rank())));
    Ok(most.expect("there are chunks").0)
}

/// The chosen chunks, and behind them all others with the same bytes, whose files are led to the
/// hot blob as well.
fn with_equals(rewrite: &Rewrite<'_>, mut chosen: Vec<u32>) -> Vec<u32> {
    let contents: HashSet<_> = chosen.iter().filter_map(|&position| rewrite.content(position)).collect();
    let mut met: HashSet<u32> = chosen.iter().copied().collect();
    for position in 0..u32::try_from(rewrite.stock.chunks.len()).expect("checked as they came") {
        if rewrite.content(position).is_some_and(|content| contents.contains(&content)) && met.insert(position) {
            chosen.push(position);
        }
    }
    chosen
}
