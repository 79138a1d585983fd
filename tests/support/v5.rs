//! Images of RAFS v5 written by hand, from the specification and with nothing of the crate but its record
//! types: what reads them must not have written them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::Write;

use rafsd::base::hex;
use rafsd::codec;
use rafsd::format::blobfile::PartHeader;
use rafsd::format::rafs::{Algorithm, ChunkRecord};
use rafsd::format::rafs5::{BlobHead, ExtendedBlob, Inode, Superblock, XattrHead, XattrPair};
use zerocopy::{FromZeros, IntoBytes};

/// What has a name in a directory.
#[derive(Clone, Debug)]
pub enum Item {
    Dir(Tree),
    File(Vec<u8>),
    Link(Vec<u8>),
    /// A further name of the file at this path.
    Hard(&'static str),
    Fifo,
    Char(u32),
    /// With xattrs: full name and value.
    With(Box<Item>, Vec<(&'static str, Vec<u8>)>),
}

pub type Tree = BTreeMap<Vec<u8>, Item>;

pub fn tree<const N: usize>(items: [(&str, Item); N]) -> Tree {
    items.into_iter().map(|(name, item)| (name.as_bytes().to_vec(), item)).collect()
}

/// Bytes that do not repeat and compress a little.
pub fn noise(seed: u32, len: usize) -> Vec<u8> {
    let byte = |at: u32| (at ^ seed).wrapping_mul(2_654_435_761).to_be_bytes()[0] >> 3;
    (0..u32::try_from(len).unwrap()).map(byte).collect()
}

/// Writes images over one blob, which grows by the chunks that are new.
#[derive(Clone, Debug)]
pub struct Writer {
    pub chunk_size: u32,
    pub compression: Algorithm,
    pub sha256: bool,
    /// Whether there is an extended blob table.
    pub extended: bool,
    /// Whether chunks start on blocks.
    pub aligned: bool,
    /// Bits of the blob in the extended table.
    pub features: u32,
    /// Numbers of paths to prefetch.
    pub prefetch: Vec<u32>,
    /// Instead of the digest of the blob.
    pub id: Option<String>,
    pub blob: Vec<u8>,
    pub chunks: HashMap<[u8; 32], ChunkRecord>,
    pub plain: u64,
}

/// One bootstrap.
#[derive(Clone, Debug)]
pub struct Written {
    pub bytes: Vec<u8>,
    /// Where the record of each number lies; there is none of number 0.
    pub at: Vec<usize>,
    /// Number of each path.
    pub numbers: BTreeMap<Vec<u8>, u32>,
    /// Where the blob table lies, and the extended one.
    pub blobs_at: usize,
    pub extended_at: usize,
}

impl Default for Writer {
    fn default() -> Self {
        Self {
            chunk_size: 4096,
            compression: Algorithm::Zstd,
            sha256: false,
            extended: true,
            aligned: false,
            features: 0x4000_0000,
            prefetch: Vec::new(),
            id: None,
            blob: Vec::new(),
            chunks: HashMap::new(),
            plain: 0,
        }
    }
}

/// One path while it is being written.
struct Node<'a> {
    item: &'a Item,
    xattrs: &'a [(&'static str, Vec<u8>)],
    name: Vec<u8>,
    path: Vec<u8>,
    parent: u32,
    ino: u32,
    nlink: u32,
    first_child: u32,
    children: u32,
    chunks: Vec<ChunkRecord>,
    digest: [u8; 32],
}

impl Writer {
    fn digest(&self, bytes: &[u8]) -> [u8; 32] {
        if self.sha256 { codec::sha256(bytes).0 } else { codec::blake3(bytes).0 }
    }

    /// What the blob is called.
    pub fn id(&self) -> String {
        self.id.clone().unwrap_or_else(|| hex(&codec::sha256(&self.blob).0))
    }

    fn compress(&self, plain: &[u8]) -> Vec<u8> {
        match self.compression {
            Algorithm::None => plain.to_vec(),
            Algorithm::Lz4Block => lz4_flex::block::compress(plain),
            Algorithm::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
            Algorithm::Gzip => {
                let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                out.write_all(plain).unwrap();
                out.finish().unwrap()
            }
        }
    }

    fn chunk(&mut self, plain: &[u8], file_offset: u64) -> ChunkRecord {
        let digest = self.digest(plain);
        if let Some(known) = self.chunks.get(&digest) {
            return ChunkRecord { file_offset: file_offset.into(), ..*known };
        }
        let packed = self.compress(plain);
        let is_compressed = packed.len() < plain.len() || self.compression == Algorithm::Gzip;
        let stored = if is_compressed && self.compression != Algorithm::None { packed } else { plain.to_vec() };
        let mut record = ChunkRecord::new_zeroed();
        record.digest = digest;
        record.flags = u32::from(is_compressed && self.compression != Algorithm::None).into();
        record.compressed_offset = (self.blob.len() as u64).into();
        record.compressed_size = u32::try_from(stored.len()).unwrap().into();
        record.uncompressed_size = u32::try_from(plain.len()).unwrap().into();
        if self.aligned {
            self.plain = self.plain.next_multiple_of(4096);
        }
        record.uncompressed_offset = self.plain.into();
        // What has no table to say how many there are has no numbers either.
        record.index = if self.extended { u32::try_from(self.chunks.len()).unwrap() } else { 0 }.into();
        if self.compression == Algorithm::Gzip {
            // A hint, and the start of something else behind the member.
            record.compressed_size = (record.compressed_size.get() + 40).into();
        }
        self.blob.extend_from_slice(&stored);
        self.blob.extend_from_slice(if self.compression == Algorithm::Gzip { &[0xaa; 64] } else { &[] });
        self.plain += plain.len() as u64;
        self.chunks.insert(digest, record);
        ChunkRecord { file_offset: file_offset.into(), ..record }
    }

    /// The bootstrap of a tree.
    pub fn image(&mut self, root: &Tree) -> Written {
        let root = Item::Dir(root.clone());
        let mut nodes = number(&root);
        for node in &mut nodes {
            if let Item::File(content) = node.item {
                let size = self.chunk_size as usize;
                let pieces = content.chunks(size).enumerate();
                node.chunks = pieces.map(|(k, piece)| self.chunk(piece, (k * size) as u64)).collect();
            }
        }
        let numbers: BTreeMap<Vec<u8>, u32> =
            (1..).zip(&nodes).map(|(number, node)| (node.path.clone(), number)).collect();
        // Names beyond the first have everything of the first, and count as its links.
        for at in 0..nodes.len() {
            let Item::Hard(path) = nodes[at].item else { continue };
            let first = numbers[path.as_bytes()];
            let other = &nodes[first as usize - 1];
            let (item, xattrs, chunks) = (other.item, other.xattrs, other.chunks.clone());
            let node = &mut nodes[at];
            (node.item, node.xattrs, node.chunks, node.ino) = (item, xattrs, chunks, first);
        }
        let names = nodes.iter().fold(HashMap::new(), |mut names, node| {
            *names.entry(node.ino).or_insert(0) += 1;
            names
        });
        for at in (0..nodes.len()).rev() {
            let content = match nodes[at].item {
                Item::Dir(_) => {
                    let range = nodes[at].first_child as usize..(nodes[at].first_child + nodes[at].children) as usize;
                    let children = &nodes[range.start.saturating_sub(1)..range.end.saturating_sub(1)];
                    let dirs = children.iter().filter(|child| matches!(child.item, Item::Dir(_))).count();
                    let digests: Vec<u8> = children.iter().flat_map(|child| child.digest).collect();
                    nodes[at].nlink = 2 + u32::try_from(dirs).unwrap();
                    digests
                }
                Item::Link(target) => target.clone(),
                _ => nodes[at].chunks.iter().flat_map(|chunk| chunk.digest).collect(),
            };
            if !matches!(nodes[at].item, Item::Dir(_)) {
                nodes[at].nlink = names[&nodes[at].ino];
            }
            nodes[at].digest = self.digest(&content);
        }
        self.write(&nodes, numbers)
    }

    fn write(&self, nodes: &[Node<'_>], numbers: BTreeMap<Vec<u8>, u32>) -> Written {
        let id = self.id();
        let has_blob = !self.chunks.is_empty();
        let mut blobs = Vec::new();
        if has_blob {
            blobs.extend_from_slice(BlobHead { prefetch_offset: 0.into(), prefetch_size: 0.into() }.as_bytes());
            blobs.extend_from_slice(id.as_bytes());
            pad(&mut blobs);
        }
        let mut extended = ExtendedBlob::new_zeroed();
        extended.chunk_count = u32::try_from(self.chunks.len()).unwrap().into();
        extended.features = self.features.into();
        extended.uncompressed_size = self.plain.into();
        extended.compressed_size = (self.blob.len() as u64).into();
        let extended = if has_blob && self.extended { extended.as_bytes() } else { &[] };

        let inode_table = nodes.len() * 4;
        let prefetch_at = (8192 + inode_table).next_multiple_of(8);
        let blobs_at = (prefetch_at + self.prefetch.len() * 4).next_multiple_of(8);
        let extended_at = blobs_at + blobs.len();
        let mut sb = Superblock::new_zeroed();
        sb.magic = 0x5241_4653.into();
        sb.version = 0x500.into();
        sb.superblock_len = 8192.into();
        sb.chunk_size = self.chunk_size.into();
        sb.flags = (self.compression.flag() | if self.sha256 { 0x38 } else { 0x34 }).into();
        sb.inodes = (nodes.iter().zip(1..).filter(|(node, number)| node.ino == *number).count() as u64).into();
        sb.inode_table_offset = 8192.into();
        sb.inode_table_entries = u32::try_from(nodes.len()).unwrap().into();
        sb.prefetch_table_offset = (prefetch_at as u64).into();
        sb.prefetch_table_entries = u32::try_from(self.prefetch.len()).unwrap().into();
        sb.blob_table_offset = (blobs_at as u64).into();
        sb.blob_table_size = u32::try_from(blobs.len()).unwrap().into();
        sb.extended_blob_table_offset = (extended_at as u64).into();
        sb.extended_blob_table_entries = u32::from(!extended.is_empty()).into();

        let (mut records, mut at) = (Vec::new(), vec![0]);
        let base = extended_at + extended.len();
        for node in nodes {
            at.push(base + records.len());
            record(&mut records, node);
        }
        let mut bytes = sb.as_bytes().to_vec();
        at[1..].iter().for_each(|at| bytes.extend_from_slice(&u32::try_from(at / 8).unwrap().to_le_bytes()));
        bytes.resize(prefetch_at, 0);
        self.prefetch.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
        bytes.resize(blobs_at, 0);
        bytes.extend_from_slice(&blobs);
        bytes.extend_from_slice(extended);
        bytes.extend_from_slice(&records);
        Written { bytes, at, numbers, blobs_at, extended_at }
    }

    /// The blob with the bootstrap behind it, each in front of its tar header.
    pub fn inlined(&self, image: &Written) -> Vec<u8> {
        let header = |name, len: usize| PartHeader::new(name, len as u64).as_bytes().to_vec();
        let (data, boot) = (header("image.blob", self.blob.len()), header("image.boot", image.bytes.len()));
        [&self.blob[..], &data, &image.bytes, &boot].concat()
    }
}

impl Written {
    /// Overwrites bytes of the record of `path`.
    pub fn put(&mut self, path: &str, field: usize, new: &[u8]) {
        let at = self.at[self.numbers[path.as_bytes()] as usize] + field;
        self.set(at, new);
    }

    /// Overwrites bytes of chunk `chunk` of the file at `path`, which has no xattrs.
    pub fn put_chunk(&mut self, path: &str, chunk: usize, field: usize, new: &[u8]) {
        let name = path.rsplit('/').next().unwrap().len().next_multiple_of(8);
        self.put(path, 128 + name + chunk * 80 + field, new);
    }

    pub fn set(&mut self, at: usize, new: &[u8]) {
        self.bytes[at..at + new.len()].copy_from_slice(new);
    }
}

/// All paths by number: those of a directory follow each other, and directories their parents.
fn number(root: &Item) -> Vec<Node<'_>> {
    let mut nodes = vec![node(root, b"/".to_vec(), Vec::new(), 0, 1)];
    let mut todo = VecDeque::from([0]);
    while let Some(dir) = todo.pop_front() {
        let Item::Dir(children) = nodes[dir].item else { continue };
        (nodes[dir].first_child, nodes[dir].children) = match children.len() {
            0 => (0, 0),
            count => (u32::try_from(nodes.len()).unwrap() + 1, u32::try_from(count).unwrap()),
        };
        let parent = nodes[dir].ino;
        for (name, item) in children {
            let slash: &[u8] = if dir == 0 { b"" } else { b"/" };
            let path = [&nodes[dir].path, slash, name].concat();
            todo.push_back(nodes.len());
            let number = u32::try_from(nodes.len()).unwrap() + 1;
            nodes.push(node(item, name.clone(), path, parent, number));
        }
    }
    nodes
}

fn node(item: &Item, name: Vec<u8>, path: Vec<u8>, parent: u32, ino: u32) -> Node<'_> {
    let (item, xattrs) = match item {
        Item::With(item, xattrs) => (&**item, xattrs.as_slice()),
        item => (item, [].as_slice()),
    };
    let (nlink, first_child, children, chunks, digest) = (1, 0, 0, Vec::new(), [0; 32]);
    Node { item, xattrs, name, path, parent, ino, nlink, first_child, children, chunks, digest }
}

fn record(out: &mut Vec<u8>, node: &Node<'_>) {
    let mut inode = Inode::new_zeroed();
    inode.digest = node.digest;
    inode.parent = u64::from(node.parent).into();
    inode.ino = u64::from(node.ino).into();
    (inode.uid, inode.gid) = (1000.into(), 100.into());
    inode.nlink = node.nlink.into();
    inode.mtime = 1_700_000_000.into();
    inode.mtime_nsec = 5.into();
    inode.name_size = u16::try_from(node.name.len()).unwrap().into();
    let mut target: &[u8] = &[];
    let (mode, size) = match node.item {
        Item::Dir(_) => {
            (inode.child_index, inode.child_count) = (node.first_child.into(), node.children.into());
            (0o040_755, 4096)
        }
        Item::File(content) => {
            inode.child_count = u32::try_from(node.chunks.len()).unwrap().into();
            (0o100_644, content.len())
        }
        Item::Link(to) => {
            target = to;
            inode.symlink_size = u16::try_from(to.len()).unwrap().into();
            (0o120_777, to.len())
        }
        Item::Fifo => (0o010_600, 0),
        Item::Char(device) => {
            inode.rdev = (*device).into();
            (0o020_600, 0)
        }
        Item::Hard(_) | Item::With(..) => unreachable!("resolved before"),
    };
    (inode.mode, inode.size) = (mode.into(), (size as u64).into());
    inode.flags = (u64::from(!target.is_empty()) | if node.xattrs.is_empty() { 0 } else { 4 }).into();
    out.extend_from_slice(inode.as_bytes());
    out.extend_from_slice(&node.name);
    pad(out);
    out.extend_from_slice(target);
    pad(out);
    if !node.xattrs.is_empty() {
        let mut pairs = Vec::new();
        for (name, value) in node.xattrs {
            let size = u32::try_from(name.len() + 1 + value.len()).unwrap();
            pairs.extend_from_slice(XattrPair { size: size.into() }.as_bytes());
            pairs.extend_from_slice(name.as_bytes());
            pairs.push(0);
            pairs.extend_from_slice(value);
        }
        out.extend_from_slice(XattrHead { content_size: (pairs.len() as u64).into() }.as_bytes());
        out.extend_from_slice(&pairs);
        pad(out);
    }
    node.chunks.iter().for_each(|chunk| out.extend_from_slice(chunk.as_bytes()));
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}
