//! Layers of an image in the two forms in which they exist: as overlayfs keeps them, and as
//! container archives do.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags};

use super::tree::{Random, set_mtime};

/// What an entry of a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    File(Vec<u8>),
    Directory {
        opaque: bool,
    },
    Symlink(Vec<u8>),
    /// A second name of the file at this path of the same layer.
    HardLink(Vec<u8>),
    Character,
    Block,
    Fifo,
    Socket,
    /// Whatever has this name below is gone.
    Whiteout,
}

/// Paths and what is there, parents before children.
pub type Layer = Vec<(Vec<u8>, What)>;

/// How whiteouts and opaque directories are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Character devices 0/0 and an xattr.
    Overlayfs,
    /// Files with names of their own.
    Oci,
}

/// Writes a layer into the existing directory `root`. Owners, modes and times depend on `seed`
/// and not on the form.
pub fn write(root: &Path, layer: &Layer, form: Form, seed: u64) -> io::Result<()> {
    let at = |path: &[u8]| root.join(OsStr::from_bytes(path));
    for (path, what) in layer {
        entry(&at(path), what, form, root)?;
    }
    let mut random = Random::new(seed);
    let mut below = |limit: u64| u32::try_from(random.below(limit)).unwrap();
    let attributes: Vec<_> = layer
        .iter()
        .map(|_| (below(3) * 500, below(3) * 70_000, [0o644, 0o4755, 0o700, 0o1777][below(4) as usize], below(1 << 30)))
        .collect();
    // Children before parents, since making a child changes its parent's time.
    for ((path, what), (uid, gid, mode, time)) in layer.iter().zip(attributes).rev() {
        let path = at(path);
        if matches!(what, What::Whiteout | What::HardLink(_)) {
            continue;
        }
        let ids = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(CWD, &path, ids.0, ids.1, AtFlags::SYMLINK_NOFOLLOW)?;
        if !matches!(what, What::Symlink(_)) {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        set_mtime(&path, i64::from(time) - (1 << 29), i64::from(time % 1_000_000_000))?;
    }
    set_mtime(root, i64::try_from(seed).unwrap(), 0)
}

fn entry(path: &Path, what: &What, form: Form, root: &Path) -> io::Result<()> {
    let node = |kind, mode, minor| {
        let device = rustix::fs::makedev(if minor == 0 { 0 } else { 7 }, minor);
        Ok(rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device)?)
    };
    match what {
        What::File(content) => fs::write(path, content),
        What::Directory { opaque } => {
            fs::create_dir(path)?;
            match (opaque, form) {
                (false, _) => Ok(()),
                (true, Form::Oci) => File::create(path.join(".wh..wh..opq")).map(|_| ()),
                (true, Form::Overlayfs) => {
                    Ok(rustix::fs::lsetxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty())?)
                }
            }
        }
        What::Symlink(target) => symlink(OsStr::from_bytes(target), path),
        What::HardLink(target) => fs::hard_link(root.join(OsStr::from_bytes(target)), path),
        What::Character => node(FileType::CharacterDevice, 0o600, 1),
        What::Block => node(FileType::BlockDevice, 0o600, 2),
        What::Fifo => node(FileType::Fifo, 0o600, 0),
        What::Socket => {
            // The address of a socket is at most 107 bytes long.
            let parent = rustix::fs::open(path.parent().unwrap(), rustix::fs::OFlags::PATH, Mode::empty())?;
            let here = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&parent)));
            UnixListener::bind(here.join(path.file_name().unwrap())).map(drop)
        }
        What::Whiteout if form == Form::Overlayfs => node(FileType::CharacterDevice, 0, 0),
        What::Whiteout => {
            let name = [b".wh.", path.file_name().unwrap().as_bytes()].concat();
            File::create(path.with_file_name(OsStr::from_bytes(&name))).map(|_| ())
        }
    }
}

/// Packs a directory as container tools do; sockets are left out.
pub fn pack(source: &Path, archive: &Path) {
    let status = Command::new("tar")
        .args(["--create", "--sort=name", "--format=pax", "--xattrs", "--xattrs-include=*", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(source)
        .arg(".")
        .stderr(std::process::Stdio::null())
        .status();
    assert!(status.expect("tar is installed").success());
}

/// Every way in which three layers may disagree about one name, each at a name of its own.
///
/// `kinds` of each layer are all those of [`kinds`]; without sockets for archives.
pub fn every_change(sockets: bool) -> [Layer; 3] {
    let kinds = kinds(sockets);
    let mut layers = [const { Vec::new() }; 3];
    for (a, first) in kinds.iter().enumerate() {
        for (b, second) in kinds.iter().enumerate() {
            for (c, third) in kinds.iter().enumerate() {
                let odd: &[u8] = if (a + b + c) % 3 == 0 { b"\xff\n" } else { b"" };
                let name = [format!("{a:x}{b:x}{c:x}").as_bytes(), odd].concat();
                for (number, kind) in [first, second, third].into_iter().enumerate() {
                    kind(&name, number, &mut layers[number]);
                }
            }
        }
    }
    layers
}

/// Puts something called `name` into layer `number`.
type Maker = fn(&[u8], usize, &mut Layer);

fn kinds(sockets: bool) -> Vec<Maker> {
    let mut kinds: Vec<Maker> = vec![
        |_, _, _| {},
        |name, number, layer| layer.push((name.to_vec(), What::File(format!("content of layer {number}").into()))),
        |name, _, layer| layer.push((name.to_vec(), What::File(Vec::new()))),
        |name, _, layer| layer.push((name.to_vec(), What::Directory { opaque: false })),
        |name, number, layer| directory(name, number, false, layer),
        |name, number, layer| directory(name, number, true, layer),
        |name, number, layer| layer.push((name.to_vec(), What::Symlink(format!("to {number}").into()))),
        |name, number, layer| {
            layer.push((name.to_vec(), What::File(format!("linked in layer {number}").into())));
            layer.push(([name, b".link"].concat(), What::HardLink(name.to_vec())));
        },
        |name, _, layer| layer.push((name.to_vec(), What::Character)),
        |name, _, layer| layer.push((name.to_vec(), What::Block)),
        |name, _, layer| layer.push((name.to_vec(), What::Fifo)),
        |name, _, layer| layer.push((name.to_vec(), What::Whiteout)),
    ];
    if sockets {
        kinds.push(|name, _, layer| layer.push((name.to_vec(), What::Socket)));
    }
    kinds
}

/// A directory with something of its own, something that all layers have, something below, and a
/// whiteout for what the layer below calls its own.
fn directory(name: &[u8], number: usize, opaque: bool, layer: &mut Layer) {
    let mut put = |below: String, what| layer.push(([name, below.as_bytes()].concat(), what));
    put(String::new(), What::Directory { opaque });
    put(format!("/own-{number}"), What::File(format!("own {number}").into()));
    put("/all".into(), What::File(format!("all {number}").into()));
    put("/sub".into(), What::Directory { opaque: false });
    put(format!("/sub/{number}"), What::Fifo);
    if number > 0 {
        put(format!("/own-{}", number - 1), What::Whiteout);
        put(format!("/sub/{}", number - 1), What::Whiteout);
    }
}

/// A layer of a few entries with names from a short list, so that layers meet.
pub fn random(random: &mut Random, entries: u64) -> Layer {
    const NAMES: [&[u8]; 6] = [b"a", b"b", b"c", b"\xfe", b"with blank", b".dot"];
    let mut layer: Layer = Vec::new();
    let mut dirs: Vec<Vec<u8>> = vec![Vec::new()];
    for _ in 0..entries {
        let below = |random: &mut Random, limit: usize| usize::try_from(random.below(limit as u64)).unwrap();
        let dir = &dirs[below(random, dirs.len())];
        let name = NAMES[below(random, NAMES.len())];
        let path = if dir.is_empty() { name.to_vec() } else { [dir, b"/".as_slice(), name].concat() };
        if layer.iter().any(|(other, _)| *other == path) {
            continue;
        }
        let files: Vec<_> = layer.iter().filter(|(_, what)| matches!(what, What::File(_))).collect();
        let what = match random.below(12) {
            0..3 => What::Directory { opaque: false },
            3 => What::Directory { opaque: true },
            4 => What::Whiteout,
            5 => What::Whiteout,
            6 => What::Symlink(b"target".to_vec()),
            7 => What::Character,
            8 if !files.is_empty() => What::HardLink(files[below(random, files.len())].0.clone()),
            9 => What::Fifo,
            _ => {
                let len = below(random, 6000);
                What::File(random.text(len))
            }
        };
        if matches!(what, What::Directory { .. }) {
            dirs.push(path.clone());
        }
        layer.push((path, what));
    }
    layer
}
