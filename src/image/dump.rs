//! A bootstrap as text that can be kept under version control and compared line by line.
//!
//! One fact on each line: first the image and its blobs, then every path with its facts, sorted by
//! the names of each directory, and what to prefetch. Everything that is not printable ASCII is
//! escaped. Places in files and numbers that change without meaning anything are left out, unless
//! the layout itself is what is to be compared. A damaged part of an image is one line that says
//! so.

use std::collections::HashSet;
use std::io::{self, Write};
use std::ops::ControlFlow;

use super::{FirstPaths, Image, Inode, Kind, Layout, RecordIndex, Visit};
use crate::base::hex;
use crate::format::blobfile::features;
use crate::format::erofs::HOLE;
use crate::format::rafs::{Algorithm, ChunkRecord, DigestAlgorithm, chunk_flags};

/// How much of an image is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// What a reader of the files can notice, and how the data is cut and compressed.
    #[default]
    Meaning,
    /// Where everything lies, too.
    Layout,
}

/// Writes `image` to `out`.
///
/// # Errors
/// If `out` fails.
pub fn dump(image: &Image, detail: Detail, out: &mut dyn Write) -> io::Result<()> {
    let records = RecordIndex::new(image);
    let mut dump = Dump { image, records, detail, out, first_paths: FirstPaths::default() };
    dump.head()?;
    dump.blobs()?;
    dump.tree()?;
    dump.prefetch()?;
    if detail == Detail::Layout { dump.records() } else { Ok(()) }
}

struct Dump<'a> {
    image: &'a Image,
    records: RecordIndex,
    detail: Detail,
    out: &'a mut dyn Write,
    /// Of inodes with several.
    first_paths: FirstPaths<'a>,
}

impl<'a> Dump<'a> {
    fn head(&mut self) -> io::Result<()> {
        let summary = self.image.summary();
        writeln!(self.out, "image block-size {}", summary.block_size)?;
        writeln!(self.out, "image chunk-size {}", summary.chunk_size)?;
        writeln!(self.out, "image flags {:#x}", summary.flags)?;
        writeln!(self.out, "image paths {}", summary.paths)?;
        if self.detail == Detail::Layout {
            writeln!(self.out, "image bytes {}", summary.bootstrap_len)?;
            writeln!(self.out, "image metadata-at {:#x}", summary.meta_start)?;
            writeln!(self.out, "image root {}", summary.root)?;
            let (at, count) = self.image.chunk_table;
            writeln!(self.out, "image chunk-table-at {at:#x} records {count}")?;
            let (at, count) = self.image.prefetch_table;
            writeln!(self.out, "image prefetch-table-at {at:#x} entries {count}")?;
        }
        Ok(())
    }

    fn blobs(&mut self) -> io::Result<()> {
        for (number, device) in self.image.devices().iter().enumerate() {
            let entry = &device.entry;
            writeln!(self.out, "blob {number} id {}", device.blob)?;
            writeln!(self.out, "blob {number} compression {}", compression(entry.compression.get()))?;
            writeln!(self.out, "blob {number} digest {}", digest(entry.digest.get()))?;
            writeln!(self.out, "blob {number} features {}", feature_names(entry.features.get()))?;
            writeln!(self.out, "blob {number} chunks {}", entry.chunk_count)?;
            writeln!(self.out, "blob {number} stored {}", entry.compressed_size)?;
            writeln!(self.out, "blob {number} decoded {}", entry.uncompressed_size)?;
            if self.detail == Detail::Layout {
                writeln!(self.out, "blob {number} tables-at {:#x}", entry.ci_offset)?;
                writeln!(self.out, "blob {number} tables-stored {}", entry.ci_compressed_size)?;
                writeln!(self.out, "blob {number} tables-plain {}", entry.ci_uncompressed_size)?;
            }
        }
        Ok(())
    }

    fn tree(&mut self) -> io::Result<()> {
        let mut walk = self.image.walk();
        while let Some(step) = walk.next_visit() {
            match step {
                Ok(visit) => self.entry(&visit)?,
                Err(cause) => writeln!(self.out, "{} error {cause}", name_of(walk.path()))?,
            }
        }
        Ok(())
    }

    fn entry(&mut self, visit: &Visit<'_, 'a>) -> io::Result<()> {
        let (name, inode) = (&*name_of(visit.path), &visit.inode);
        if inode.kind != Kind::Directory && inode.nlink > 1 {
            if let Some(first) = self.first_paths.get(inode.nid) {
                return writeln!(self.out, "{name} same-as {}", name_of(&first));
            }
            self.first_paths.note(inode.nid, visit.path);
        }
        writeln!(self.out, "{name} kind {}", inode.kind.name())?;
        writeln!(self.out, "{name} mode {:04o}", inode.permissions)?;
        writeln!(self.out, "{name} owner {}:{}", inode.uid, inode.gid)?;
        writeln!(self.out, "{name} time {}.{:09}", inode.mtime.0, inode.mtime.1)?;
        writeln!(self.out, "{name} links {}", inode.nlink)?;
        match inode.kind {
            Kind::Regular => writeln!(self.out, "{name} size {}", inode.size)?,
            Kind::Character | Kind::Block => writeln!(self.out, "{name} device {:#x}", inode.rdev)?,
            Kind::Symlink => match self.image.symlink(inode) {
                Ok(target) => writeln!(self.out, "{name} target {}", target.escape_ascii())?,
                Err(cause) => writeln!(self.out, "{name} error {cause}")?,
            },
            Kind::Directory | Kind::Fifo | Kind::Socket => {}
        }
        self.xattrs(name, inode)?;
        if self.detail == Detail::Layout {
            self.layout(name, inode)?;
        }
        self.chunks(name, inode)
    }

    fn xattrs(&mut self, name: &str, inode: &Inode) -> io::Result<()> {
        let mut found = Vec::new();
        let outcome = self.image.xattrs(inode, &mut |xattr| {
            found.push((xattr.name(), xattr.value));
            ControlFlow::Continue(())
        });
        // The order on disk means nothing, and differs between runs of the reference writer.
        found.sort_unstable();
        for (key, value) in found {
            writeln!(self.out, "{name} xattr {}={}", key.escape_ascii(), value.escape_ascii())?;
        }
        match outcome {
            Ok(()) => Ok(()),
            Err(cause) => writeln!(self.out, "{name} error {cause}"),
        }
    }

    fn layout(&mut self, name: &str, inode: &Inode) -> io::Result<()> {
        writeln!(self.out, "{name} inode {} ino {}", inode.nid, inode.ino)?;
        if !inode.xattrs.is_empty() {
            writeln!(self.out, "{name} xattrs-at {:#x} bytes {}", inode.xattrs.start(), inode.xattrs.len())?;
        }
        match inode.layout {
            Layout::Plain { at } => writeln!(self.out, "{name} data-at {at:#x} bytes {}", inode.size),
            Layout::Inline { at, tail } if inode.size >= self.image.summary().block_size => {
                writeln!(self.out, "{name} data-at {at:#x} tail-at {tail:#x} bytes {}", inode.size)
            }
            Layout::Inline { tail, .. } => writeln!(self.out, "{name} tail-at {tail:#x} bytes {}", inode.size),
            Layout::Chunks { indexes, bits } => writeln!(self.out, "{name} indexes-at {indexes:#x} chunk-bits {bits}"),
            Layout::None => Ok(()),
        }
    }

    fn chunks(&mut self, name: &str, inode: &Inode) -> io::Result<()> {
        let rows = match self.image.chunk_indexes(inode) {
            Ok(rows) => rows,
            Err(cause) => return writeln!(self.out, "{name} error {cause}"),
        };
        for (number, row) in rows.iter().enumerate() {
            if row.blkaddr.get() == HOLE {
                writeln!(self.out, "{name} chunk {number} hole")?;
                continue;
            }
            write!(self.out, "{name} chunk {number}")?;
            match self.records.find(row).map(|found| &self.image.chunk_records()[found]) {
                Some(record) => {
                    write!(self.out, " bytes {} digest {}", record.uncompressed_size, hex(&record.digest))?;
                }
                None => write!(self.out, " unlisted")?,
            }
            if self.detail == Detail::Layout {
                let device = row.device_id.get() & 0xff;
                write!(self.out, " device {device} index {} block {}", row.index(), row.blkaddr)?;
            }
            writeln!(self.out)?;
        }
        Ok(())
    }

    fn prefetch(&mut self) -> io::Result<()> {
        let wanted: Vec<_> = self.image.prefetch().collect();
        if wanted.is_empty() {
            return Ok(());
        }
        if self.detail == Detail::Layout {
            for nid in &wanted {
                writeln!(self.out, "prefetch inode {nid}")?;
            }
            return Ok(());
        }
        // Numbers of inodes change with the layout; paths do not.
        let known: HashSet<_> = wanted.iter().copied().collect();
        let (mut paths, mut walk) = (FirstPaths::default(), self.image.walk());
        while let Some(step) = walk.next_visit() {
            let Ok(visit) = step else { continue };
            if known.contains(&visit.inode.nid) {
                paths.note(visit.inode.nid, visit.path);
            }
        }
        for nid in wanted {
            match paths.get(nid) {
                _ if nid == self.image.summary().root => writeln!(self.out, "prefetch /")?,
                Some(path) => writeln!(self.out, "prefetch /{}", path.join(&b'/').escape_ascii())?,
                None => writeln!(self.out, "prefetch error inode {nid} is not in the tree")?,
            }
        }
        Ok(())
    }

    fn records(&mut self) -> io::Result<()> {
        for (number, row) in self.image.chunk_records().iter().enumerate() {
            writeln!(self.out, "record {number} {}", describe(row))?;
        }
        Ok(())
    }
}

/// A path as lines begin with it.
fn name_of(path: &[&[u8]]) -> String {
    format!("/{}", path.join(&b'/').escape_ascii()).replace(' ', "\\x20")
}

/// A record of the chunk table in one line.
fn describe(row: &ChunkRecord) -> String {
    let set = row.flags.get();
    let crc = match set & chunk_flags::HAS_CRC32 {
        0 => String::new(),
        _ => format!(" crc32c {:08x}", row.crc32),
    };
    format!(
        "blob {} chunk {} stored {}+{} decoded {}+{} flags {set:#x} digest {}{crc}",
        row.blob_index,
        row.index,
        row.compressed_offset,
        row.compressed_size,
        row.uncompressed_offset,
        row.uncompressed_size,
        hex(&row.digest),
    )
}

/// Name of a compression as numbered in the blob table.
fn compression(number: u32) -> String {
    Algorithm::from_number(number).map_or_else(|| format!("unknown ({number})"), |known| known.name().into())
}

/// Name of a digest as numbered in the blob table.
fn digest(number: u32) -> String {
    DigestAlgorithm::from_number(number).map_or_else(|| format!("unknown ({number})"), |known| known.name().into())
}

/// Names of feature bits of a blob, with unknown ones as a number; `none` if there are none.
pub fn feature_names(set: u32) -> String {
    let mut names: Vec<String> =
        features::NAMES.iter().filter(|(bit, _)| set & bit != 0).map(|(_, name)| (*name).to_owned()).collect();
    let unknown = features::NAMES.iter().fold(set, |rest, (bit, _)| rest & !bit);
    if unknown != 0 {
        names.push(format!("{unknown:#x}"));
    }
    if names.is_empty() { "none".into() } else { names.join(",") }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{self, Patch};
    use super::*;

    fn text(image: &Image, detail: Detail) -> String {
        let mut out = Vec::new();
        dump(image, detail, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn facts_of_a_path_are_lines_that_begin_with_it() {
        let text = text(&sample::image(), Detail::Meaning);
        let of = |path: &str| {
            let prefix = format!("{path} ");
            text.lines().filter_map(|line| line.strip_prefix(&prefix)).collect::<Vec<_>>()
        };
        let digest = |bytes: &[u8]| blake3::hash(bytes).to_string();

        assert_eq!(
            of("/xattrs"),
            [
                "kind file",
                "mode 0644",
                "owner 0:0",
                "time 0.000000000",
                "links 1",
                "size 10",
                "xattr user.one=first value",
                &format!("chunk 0 bytes 10 digest {}", digest(b"attributes")),
            ]
        );
        assert_eq!(of("/second"), ["same-as /file"]);
        assert_eq!(of("/short").last(), Some(&"target file"));
        assert_eq!(of("/null").last(), Some(&"device 0x103"));
        assert_eq!(of("/empty").last(), Some(&"size 0"));
    }

    #[test]
    fn only_the_layout_tells_places() {
        let image = sample::image();
        let (meaning, layout) = (text(&image, Detail::Meaning), text(&image, Detail::Layout));

        assert!(!meaning.contains("-at ") && !meaning.contains("inode "));
        assert!(layout.contains("/file inode ") && layout.contains("record 0 blob 0 chunk "));
        let missing = meaning.lines().find(|line| !layout.contains(line));
        assert_eq!(missing, None, "the layout leaves nothing out");
    }

    #[test]
    fn paths_come_in_the_order_of_their_names() {
        let text = text(&sample::image(), Detail::Meaning);
        let paths: Vec<_> =
            text.lines().filter(|line| line.starts_with('/')).map(|line| line.split(' ').next()).collect();
        let names = |path: &&Option<&str>| path.unwrap().split('/').map(str::to_owned).collect::<Vec<_>>();
        assert!(paths.iter().map(|path| names(&path)).is_sorted());
    }

    #[test]
    fn damage_is_a_line_and_the_rest_is_still_there() {
        let mut patch = Patch::new();
        let (image, lines) = (patch.image(), text(&patch.image(), Detail::Meaning).lines().count());
        let inode = image.lookup(b"fifo").unwrap().unwrap();
        patch.put(image.summary().meta_start + inode.nid * 32 + 4, &[0; 2]);
        let text = text(&patch.image(), Detail::Meaning);

        assert!(text.contains("/fifo error inode"), "{text}");
        assert_eq!(text.lines().count(), lines - 4, "five facts are one error");
    }

    #[test]
    fn feature_bits_have_names() {
        assert_eq!(feature_names(0), "none");
        assert_eq!(feature_names(0x4000_0005), "aligned,chunk-info-v2,cap-tar-toc");
        assert_eq!(feature_names(0x8000_0001), "aligned,0x80000000");
    }
}
