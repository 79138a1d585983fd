//! Source trees with every kind of entry an image can hold.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

/// A small fast generator; the same seed gives the same tree.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next number (splitmix64).
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// `len` bytes that compress about as well as program text: words from a short list.
    pub fn text(&mut self, len: usize) -> Vec<u8> {
        const WORDS: [&str; 16] = [
            "block ", "mount ", "chunk ", "inode ", "0x1f ", "struct ", "the ", "of ", "\n", "(a, b) ", "return ",
            "if ", "digest ", "{ ", "} ", "42 ",
        ];
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(WORDS[usize::try_from(self.below(16)).unwrap()].as_bytes());
        }
        out.truncate(len);
        out
    }

    /// `len` bytes that do not compress.
    pub fn noise(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// Fills the existing directory `root` with a tree that has every kind of entry, and gives every
/// entry owner, mode and time of its own. Needs to be root, for owners, devices and xattrs.
pub fn make(root: &Path, seed: u64) -> io::Result<()> {
    let mut tree = Maker { root: root.to_owned(), random: Random::new(seed), paths: vec![root.to_owned()] };
    tree.contents()?;
    tree.links()?;
    tree.specials()?;
    tree.names()?;
    tree.shapes()?;
    tree.xattrs()?;
    tree.owners()?;
    tree.times()
}

/// Sets the modification time of `path` itself.
pub fn set_mtime(path: &Path, seconds: i64, nanos: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

struct Maker {
    root: PathBuf,
    random: Random,
    /// Everything made so far, parents before children.
    paths: Vec<PathBuf>,
}

impl Maker {
    fn at(&mut self, name: impl AsRef<OsStr>) -> PathBuf {
        let path = self.root.join(name.as_ref());
        self.paths.push(path.clone());
        path
    }

    fn dir(&mut self, name: impl AsRef<OsStr>) -> io::Result<PathBuf> {
        let path = self.at(name);
        fs::create_dir(&path)?;
        Ok(path)
    }

    fn file(&mut self, name: impl AsRef<OsStr>, content: &[u8]) -> io::Result<PathBuf> {
        let path = self.at(name);
        fs::write(&path, content)?;
        Ok(path)
    }

    /// Sizes around every boundary that matters, shared content, sparse files.
    fn contents(&mut self) -> io::Result<()> {
        self.dir("sizes")?;
        for size in [0, 1, 4095, 4096, 4097, 8192, 65535, 65536, 65537, 1 << 20, (1 << 20) + 1, (3 << 20) + 17] {
            let content = if size % 2 == 0 { self.random.noise(size) } else { self.random.text(size) };
            self.file(format!("sizes/{size}"), &content)?;
        }
        let shared = self.random.text(300_000);
        self.file("sizes/shared-1", &shared)?;
        self.file("sizes/shared-2", &shared)?;
        self.file("sizes/shared-start", &shared[..70_000])?;

        let sparse = self.at("sizes/sparse");
        let file = File::create(&sparse)?;
        file.set_len((5 << 20) + 123)?;
        file.write_all_at(b"an island in the middle", (2 << 20) + 4000)?;
        File::create(self.at("sizes/only-a-hole"))?.set_len(3 << 20)?;
        let zeros = vec![0; (2 << 20) + 1];
        self.file("sizes/zeros", &zeros)?;
        Ok(())
    }

    fn links(&mut self) -> io::Result<()> {
        self.dir("links")?;
        let content = self.random.text(10_000);
        let first = self.file("links/b-first", &content)?;
        for name in ["links/a-second", "links/c-third", "fourth"] {
            fs::hard_link(&first, self.at(name))?;
        }
        symlink("b-first", self.at("links/relative"))?;
        symlink("/no/such/place", self.at("links/dangling"))?;
        symlink(OsStr::from_bytes(b"not \xff utf-8 \x01"), self.at("links/bytes"))?;
        symlink("../".repeat(1333) + "e", self.at("links/long-4000"))?;
        symlink("x".repeat(4095), self.at("links/longest-4095"))?;
        symlink("l", self.at("links/loop"))?;
        Ok(())
    }

    fn specials(&mut self) -> io::Result<()> {
        self.dir("special")?;
        let node = |path: PathBuf, kind, major, minor| {
            rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(0o640), rustix::fs::makedev(major, minor))
        };
        node(self.at("special/null"), FileType::CharacterDevice, 1, 3)?;
        node(self.at("special/whiteout"), FileType::CharacterDevice, 0, 0)?;
        node(self.at("special/wide-minor"), FileType::CharacterDevice, 4095, 1_048_575)?;
        node(self.at("special/disk"), FileType::BlockDevice, 259, 300)?;
        node(self.at("special/fifo"), FileType::Fifo, 0, 0)?;
        let socket = self.at("special/socket");
        // The address of a socket is at most 107 bytes long, and the root may be deep.
        let here = rustix::fs::open(socket.parent().unwrap(), rustix::fs::OFlags::PATH, Mode::empty())?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&here);
        drop(UnixListener::bind(format!("/proc/self/fd/{fd}/socket"))?);
        Ok(())
    }

    fn names(&mut self) -> io::Result<()> {
        self.dir("names")?;
        let odd: [&[u8]; 14] = [
            b"!before-dot",
            b"-dash",
            b" space",
            b"#hash",
            b"+plus",
            b",comma",
            b"...",
            b"..dots",
            b".hidden",
            b"\x01\x02",
            b"new\nline",
            b"\xff\xfe\x80",
            b"caf\xc3\xa9",
            b".wh.whiteout",
        ];
        for name in odd {
            let path = [b"names/", name].concat();
            self.file(OsStr::from_bytes(&path), name)?;
        }
        for byte in [b"n", b"\xc3".as_slice()] {
            let path = [b"names/", byte.repeat(255).as_slice()].concat();
            self.file(OsStr::from_bytes(&path), b"long name")?;
        }
        let dir = format!("names/{}", "d".repeat(255));
        self.dir(&dir)?;
        self.file(format!("{dir}/{}", "f".repeat(255)), b"two long names")?;
        Ok(())
    }

    /// Wide, deep and empty directories.
    fn shapes(&mut self) -> io::Result<()> {
        self.dir("empty")?;
        self.dir("wide")?;
        for i in 0..600 {
            let name = format!("wide/entry-{i:03}-{}", "p".repeat(i % 50));
            let len = usize::try_from(self.random.below(200)).unwrap();
            let content = self.random.text(len);
            self.file(name, &content)?;
        }
        let mut deep = String::from("deep");
        self.dir(&deep)?;
        for level in 0..60 {
            deep = format!("{deep}/level-{level}");
            self.dir(&deep)?;
        }
        self.file(format!("{deep}/bottom"), b"made it")?;
        Ok(())
    }

    fn xattrs(&mut self) -> io::Result<()> {
        self.dir("xattrs")?;
        let file = self.file("xattrs/file", b"attributes")?;
        let noise = self.random.noise(700);
        set(&file, "user.empty", b"")?;
        set(&file, "user.text", b"value with \0 and \n and =")?;
        set(&file, "trusted.noise", &noise)?;
        set(&file, "security.other", b"s")?;
        // Version 2, effective, permitted: CAP_NET_RAW.
        set(&file, "security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
        let dir = self.dir("xattrs/dir")?;
        set(&dir, "trusted.overlay.opaque", b"y")?;
        set(&dir, &format!("user.{}", "n".repeat(250)), b"longest name")?;
        let link = self.at("xattrs/link");
        symlink("file", &link)?;
        set(&link, "trusted.on-link", b"link")?;
        self.dir("xattrs/acl")?;
        let acl = self.file("xattrs/acl/file", b"acl")?;
        // A filesystem mounted without ACL support says so; the tree is then poorer, not wrong.
        for (path, name) in
            [(&acl, "system.posix_acl_access"), (&self.root.join("xattrs/acl"), "system.posix_acl_default")]
        {
            match set(path, name, &ACL) {
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Owners first: changing them clears setuid bits and capabilities.
    fn owners(&mut self) -> io::Result<()> {
        for path in &self.paths {
            if path.ends_with("xattrs/file") {
                continue;
            }
            let (uid, gid) = match self.random.below(3) {
                0 => (0, 0),
                1 => (1000, 100),
                _ => (u32::MAX - 2, 70_000),
            };
            rustix::fs::chownat(
                CWD,
                path,
                Some(Uid::from_raw(uid)),
                Some(Gid::from_raw(gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        for (name, mode) in [
            ("sizes/4096", 0o4755),
            ("sizes/4097", 0o2755),
            ("sizes/1", 0o7777),
            ("sizes/0", 0o000),
            ("empty", 0o1777),
            ("wide", 0o2700),
            ("special/fifo", 0o622),
        ] {
            fs::set_permissions(self.root.join(name), fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    /// Children before parents, since making a child changes its parent's time.
    fn times(&mut self) -> io::Result<()> {
        for path in self.paths.iter().rev() {
            let seconds = i64::try_from(self.random.below(2_000_000_000)).unwrap();
            let nanos = i64::try_from(self.random.below(1_000_000_000)).unwrap();
            set_mtime(path, seconds, nanos)?;
        }
        set_mtime(&self.root.join("sizes/4095"), -1, 999_999_999)?;
        set_mtime(&self.root.join("sizes/8192"), -1_000_000_000, 1)?;
        set_mtime(&self.root.join("sizes/65535"), 5_000_000_000, 0)?;
        set_mtime(&self.root.join("sizes/65536"), 0, 0)
    }
}

/// A POSIX ACL in its xattr form, version 2: owner rwx, user 1000 rw-, group r-x, mask rwx, others r--.
const ACL: [u8; 44] = [
    2, 0, 0, 0, //
    1, 0, 7, 0, 255, 255, 255, 255, //
    2, 0, 6, 0, 232, 3, 0, 0, //
    4, 0, 5, 0, 255, 255, 255, 255, //
    16, 0, 7, 0, 255, 255, 255, 255, //
    32, 0, 4, 0, 255, 255, 255, 255,
];

fn set(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())?)
}

/// Writes a file whose content is `megabytes` of mixed text and noise, without holding it in memory.
pub fn big_file(path: &Path, megabytes: u64, seed: u64) -> io::Result<()> {
    let (mut random, mut file) = (Random::new(seed), File::create(path)?);
    for i in 0..megabytes {
        let piece = if i % 4 == 3 { random.noise(1 << 20) } else { random.text(1 << 20) };
        file.write_all(&piece)?;
    }
    Ok(())
}
