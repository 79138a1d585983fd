//! A disk in memory that remembers every operation.
//!
//! [`Model`] is the disk as a running program sees it: bytes, names, failures where a test wants them.
//! Each operation goes into a log as well; `media` follows it to say what a power cut may leave.
//!
//! A file gets the lowest free inode number, so a new file often has the number of a dead one. There
//! are two kinds of file system. With `births` on it says when an inode was created, and may call a hole
//! that nobody wrote to data after a power cut. With `births` off it is the other way round: it tells no
//! births, and is right about holes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use rafsd::base::ByteRange;
use rafsd::cache::{Disk, DiskFile, FileFacts, Sink};

pub(crate) const SECTOR: usize = 512;
pub(crate) const BLOCK: usize = 4096;

/// Which file or directory, for ever. Inode numbers are used again, these are not.
pub(crate) type Node = usize;

pub(crate) const ROOT: Node = 0;

/// One change, or one promise of the disk.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    MakeDir {
        node: Node,
        parent: Node,
        name: String,
    },
    Create {
        node: Node,
        parent: Node,
        name: String,
        number: u64,
        born: u64,
    },
    Rename {
        parent: Node,
        from: String,
        to: String,
    },
    Remove {
        parent: Node,
        name: String,
    },
    SetLen {
        node: Node,
        len: usize,
    },
    Write {
        node: Node,
        at: usize,
        bytes: Bytes,
    },
    /// All bytes of a file, or all names of a directory; `ok` if they are safe now.
    Sync {
        node: Node,
        ok: bool,
    },
}

/// Which operations a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Name,
    Write,
    Sync,
}

/// Faults to come: the operation counted `at` from now fails with `errno`; if `stays`, all later
/// ones of the kinds in `kinds` do too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) at: usize,
    pub(crate) errno: i32,
    pub(crate) stays: bool,
    pub(crate) kinds: &'static [Kind],
}

#[derive(Clone, Debug, Default)]
pub(crate) struct FileState {
    pub(crate) bytes: Vec<u8>,
    /// Which blocks are data.
    pub(crate) data: Vec<bool>,
    pub(crate) number: u64,
    pub(crate) born: u64,
    /// When its bytes or its length were changed last, by [`State::now`].
    pub(crate) changed: u64,
}

impl FileState {
    fn resize(&mut self, len: usize) {
        // `Vec::resize` goes byte by byte in a debug build.
        let mut bytes = vec![0; len];
        let kept = len.min(self.bytes.len());
        bytes[..kept].copy_from_slice(&self.bytes[..kept]);
        self.bytes = bytes;
        self.data.resize(len.div_ceil(BLOCK), false);
    }
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) births: bool,
    pub(crate) dirs: BTreeMap<Node, BTreeMap<String, Node>>,
    pub(crate) files: BTreeMap<Node, FileState>,
    open: BTreeMap<Node, usize>,
    pub(crate) nodes: Node,
    pub(crate) log: Vec<Op>,
    /// Power cuts so far.
    pub(crate) epoch: u64,
    fault: Option<Fault>,
    faults_met: usize,
    /// Handles of earlier processes reach nothing any more.
    process: usize,
}

type Meanwhile = Box<dyn FnMut() + Send>;

/// The disk as one process sees it. Clones are the same process; [`Model::reboot_process`] makes
/// the next one.
#[derive(Clone)]
pub(crate) struct Model {
    state: Arc<Mutex<State>>,
    meanwhile: Arc<Mutex<Option<Meanwhile>>>,
    process: usize,
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn name(path: &Path) -> io::Result<String> {
    Ok(path.file_name().and_then(|name| name.to_str()).ok_or_else(|| errno(libc::EINVAL))?.to_owned())
}

impl State {
    /// Nothing at all, on a file system that has given out `nodes` nodes.
    pub(crate) fn empty(births: bool, nodes: Node) -> Self {
        Self { births, nodes, ..Self::default() }
    }

    fn find(&self, path: &Path) -> io::Result<Node> {
        let names = path.components().filter(|part| matches!(part, Component::Normal(_)));
        names.map(|part| part.as_os_str().to_str().expect("UTF-8")).try_fold(ROOT, |dir, name| {
            self.dirs.get(&dir).and_then(|entries| entries.get(name)).copied().ok_or_else(|| errno(libc::ENOENT))
        })
    }

    fn file(&self, path: &Path) -> io::Result<(Node, &FileState)> {
        let node = self.find(path)?;
        Ok((node, self.files.get(&node).ok_or_else(|| errno(libc::EISDIR))?))
    }

    fn parent(&self, path: &Path) -> io::Result<(Node, String)> {
        let parent = self.find(path.parent().ok_or_else(|| errno(libc::EINVAL))?)?;
        Ok((parent, name(path)?))
    }

    fn entries(&mut self, dir: Node) -> &mut BTreeMap<String, Node> {
        self.dirs.get_mut(&dir).expect("a directory")
    }

    /// The time: it goes on from operation to operation, and from one power cut to the next.
    fn now(&self) -> u64 {
        self.epoch << 32 | self.log.len() as u64
    }

    fn number(&self) -> u64 {
        let linked = self.dirs.values().flat_map(BTreeMap::values);
        let alive = linked.chain(self.open.keys()).filter_map(|node| self.files.get(node)).map(|file| file.number);
        let taken: std::collections::BTreeSet<_> = alive.collect();
        (11..).find(|number| !taken.contains(number)).expect("numbers do not run out")
    }

    fn new_node(&mut self) -> Node {
        self.nodes += 1;
        self.nodes
    }

    /// Lets the fault that is due strike.
    fn strike(&mut self, kind: Kind) -> io::Result<()> {
        let Some(fault) = self.fault.as_mut().filter(|fault| fault.kinds.contains(&kind)) else { return Ok(()) };
        if fault.at > 0 {
            fault.at -= 1;
            return Ok(());
        }
        let errno = errno(fault.errno);
        if !fault.stays {
            self.fault = None;
        }
        self.faults_met += 1;
        Err(errno)
    }

    /// Whether no write will succeed for lack of room until the fault is taken away.
    fn is_full(&self) -> bool {
        let is_full =
            |it: &Fault| it.at == 0 && it.stays && it.errno == libc::ENOSPC && it.kinds.contains(&Kind::Write);
        self.fault.as_ref().is_some_and(is_full)
    }

    fn facts(&self, node: Node) -> FileFacts {
        match self.files.get(&node) {
            Some(file) => FileFacts {
                is_file: true,
                is_dir: false,
                len: file.bytes.len() as u64,
                inode: file.number,
                born: file.born,
                changed: file.changed,
            },
            None => FileFacts { is_file: false, is_dir: true, len: 0, inode: 2, born: 0, changed: 0 },
        }
    }

    fn resize(&mut self, node: Node, len: usize) {
        let now = self.now();
        let file = self.files.get_mut(&node).expect("a file");
        file.resize(len);
        file.changed = now;
        self.log.push(Op::SetLen { node, len });
    }
}

impl Model {
    /// A disk with nothing on it but the empty directory `root`. Whether its file system tells when
    /// inodes were created is up to `births`.
    pub(crate) fn new(births: bool, root: &Path) -> Self {
        let mut state = State::empty(births, ROOT);
        state.dirs.insert(ROOT, BTreeMap::new());
        let this = Self::over(state);
        this.create_dir(root).expect("an empty disk");
        this.lock().log.clear();
        this
    }

    /// The disk in this state.
    pub(crate) fn over(state: State) -> Self {
        Self { state: Arc::new(Mutex::new(state)), meanwhile: Arc::default(), process: 0 }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The state, if this process still lives.
    fn alive(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.process == self.process { Ok(state) } else { Err(errno(libc::ESHUTDOWN)) }
    }

    /// Kills the process: it reaches nothing any more, and what it did is there.
    pub(crate) fn reboot_process(&self) -> Self {
        let mut state = self.lock();
        state.process += 1;
        state.fault = None;
        Self { state: Arc::clone(&self.state), meanwhile: Arc::default(), process: state.process }
    }

    pub(crate) fn set_fault(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
    }

    /// Whether a fault is still to come.
    pub(crate) fn is_about_to_fail(&self) -> bool {
        self.lock().fault.is_some()
    }

    /// How many files are open.
    pub(crate) fn open_files(&self) -> usize {
        self.lock().open.values().sum()
    }

    /// Whether a directory is left of which the removal has begun.
    pub(crate) fn has_trash(&self) -> bool {
        self.lock().dirs.values().flat_map(BTreeMap::keys).any(|name| name.starts_with(".trash-"))
    }

    /// How many operations a fault has struck.
    pub(crate) fn faults_met(&self) -> usize {
        self.lock().faults_met
    }

    /// What other threads do while a sync of a file is going on: called at the beginning of each.
    pub(crate) fn set_meanwhile(&self, meanwhile: Option<Meanwhile>) {
        // What it held may be flushed when it goes, and that asks for this very lock.
        let before = std::mem::replace(&mut *self.meanwhile.lock().unwrap(), meanwhile);
        drop(before);
    }

    fn run_meanwhile(&self) {
        // Taken out while it runs: what it does may end in a sync as well.
        let taken = self.meanwhile.lock().unwrap().take();
        if let Some(mut meanwhile) = taken {
            meanwhile();
            self.meanwhile.lock().unwrap().get_or_insert(meanwhile);
        }
    }

    /// All operations so far.
    pub(crate) fn log(&self) -> Vec<Op> {
        self.lock().log.clone()
    }

    pub(crate) fn log_len(&self) -> usize {
        self.lock().log.len()
    }

    /// Shows what a reader of the file would get.
    pub(crate) fn look_at<T>(&self, path: &Path, look: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
        Ok(look(&self.lock().file(path)?.1.bytes))
    }

    /// Puts another file in the place of one, as somebody from outside would: with `bytes` in it where
    /// births tell it from the old one, else with nothing in it.
    pub(crate) fn replace_from_outside(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.remove(path)?;
        let file = self.create(path)?;
        file.set_len(bytes.len() as u64)?;
        let births = self.lock().births;
        if births { file.write_at(bytes, 0) } else { Ok(()) }
    }

    fn handle(&self, node: Node) -> Box<dyn DiskFile> {
        *self.lock().open.entry(node).or_default() += 1;
        Box::new(Handle { model: self.clone(), node })
    }

    fn sync(&self, node: Node) -> io::Result<()> {
        let mut state = self.alive()?;
        let struck = state.strike(Kind::Sync);
        state.log.push(Op::Sync { node, ok: struck.is_ok() });
        struck
    }
}

impl Disk for Model {
    fn has_room(&self, _: &Path, _: u64, _: u64) -> io::Result<bool> {
        Ok(!self.alive()?.is_full())
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        Ok(if self.alive()?.is_full() { 0 } else { u64::MAX })
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.alive()?;
        let mut at = ROOT;
        for part in dir.components().filter(|part| matches!(part, Component::Normal(_))) {
            let name = part.as_os_str().to_str().expect("UTF-8").to_owned();
            if let Some(&there) = state.entries(at).get(&name) {
                at = there;
                continue;
            }
            state.strike(Kind::Name)?;
            let node = state.new_node();
            state.entries(at).insert(name.clone(), node);
            state.dirs.insert(node, BTreeMap::new());
            state.log.push(Op::MakeDir { node, parent: at, name });
            at = node;
        }
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        Ok(self.alive()?.file(path)?.1.bytes.clone())
    }

    fn facts(&self, path: &Path) -> io::Result<FileFacts> {
        let state = self.alive()?;
        Ok(state.facts(state.find(path)?))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.alive()?;
        state.strike(Kind::Name)?;
        let (parent, name) = state.parent(path)?;
        let there = state.entries(parent).get(&name).copied();
        let node = match there {
            Some(node) => {
                state.resize(node, 0);
                node
            }
            None => {
                let (node, number) = (state.new_node(), state.number());
                let born = if state.births { node as u64 } else { 0 };
                state.entries(parent).insert(name.clone(), node);
                state.files.insert(node, FileState { number, born, ..FileState::default() });
                state.log.push(Op::Create { node, parent, name, number, born });
                node
            }
        };
        drop(state);
        Ok(self.handle(node))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let node = self.alive()?.file(path)?.0;
        Ok(self.handle(node))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let state = self.alive()?;
        let entries = state.dirs.get(&state.find(dir)?).ok_or_else(|| errno(libc::ENOTDIR))?;
        Ok(entries.keys().map(OsString::from).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.alive()?;
        state.strike(Kind::Name)?;
        let ((parent, from), (other, to)) = (state.parent(from)?, state.parent(to)?);
        assert_eq!(parent, other, "names change within one directory");
        let there = state.entries(parent).get(&to).copied();
        if there.and_then(|node| state.dirs.get(&node)).is_some_and(|names| !names.is_empty()) {
            return Err(errno(libc::ENOTEMPTY));
        }
        let node = state.entries(parent).remove(&from).ok_or_else(|| errno(libc::ENOENT))?;
        state.entries(parent).insert(to.clone(), node);
        state.log.push(Op::Rename { parent, from, to });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.alive()?;
        state.strike(Kind::Name)?;
        let (parent, name) = state.parent(path)?;
        state.entries(parent).remove(&name).ok_or_else(|| errno(libc::ENOENT))?;
        state.log.push(Op::Remove { parent, name });
        Ok(())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let node = self.alive()?.find(dir)?;
        let is_empty = self.alive()?.dirs.get(&node).ok_or_else(|| errno(libc::ENOTDIR))?.is_empty();
        if is_empty { self.remove(dir) } else { Err(errno(libc::ENOTEMPTY)) }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let node = self.alive()?.find(dir)?;
        self.sync(node)
    }
}

/// An open file.
struct Handle {
    model: Model,
    node: Node,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.model.lock();
        let left = state.open.get_mut(&self.node).expect("counted when it was opened");
        *left -= 1;
        if *left == 0 {
            state.open.remove(&self.node);
        }
    }
}

impl Sink for Handle {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut state = self.model.alive()?;
        let at = usize::try_from(at).expect("a small file");
        // A disk that fails in the middle of a write has written some of it.
        let struck = state.strike(Kind::Write);
        let bytes = if struck.is_ok() { bytes } else { &bytes[..bytes.len() / 2 / SECTOR * SECTOR] };
        if bytes.is_empty() {
            return struck;
        }
        let now = state.now();
        let file = state.files.get_mut(&self.node).expect("a file");
        file.changed = now;
        let end = at + bytes.len();
        if file.bytes.len() < end {
            file.resize(end);
        }
        file.bytes[at..end].copy_from_slice(bytes);
        file.data[at / BLOCK..end.div_ceil(BLOCK)].fill(true);
        state.log.push(Op::Write { node: self.node, at, bytes: Bytes::copy_from_slice(bytes) });
        struck
    }

    fn sync(&self) -> io::Result<()> {
        self.model.run_meanwhile();
        self.model.sync(self.node)?;
        self.model.run_meanwhile();
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let state = self.model.alive()?;
        let at = usize::try_from(at).expect("a small file");
        let there = state.files[&self.node].bytes.get(at..at + bytes.len());
        bytes.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl DiskFile for Handle {
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.model.alive()?;
        state.strike(Kind::Write)?;
        state.resize(self.node, usize::try_from(len).expect("a small file"));
        Ok(())
    }

    fn facts(&self) -> io::Result<FileFacts> {
        Ok(self.model.alive()?.facts(self.node))
    }

    fn data_ranges(&self, len: u64) -> io::Result<Vec<ByteRange>> {
        let state = self.model.alive()?;
        let data = &state.files[&self.node].data;
        let blocks = (0u64..).zip(data).filter(|(_, data)| **data).map(|(block, _)| block * BLOCK as u64);
        Ok(blocks.filter(|at| *at < len).map(|at| ByteRange::at(at, BLOCK as u64).expect("small")).collect())
    }
}
