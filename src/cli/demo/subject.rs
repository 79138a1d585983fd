//! Which directory to show, and which program in it to run.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// A directory and a program that lives in it.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) dir: PathBuf,
    pub(super) program: Program,
}

/// A program, by its path below the directory.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) args: Vec<&'static str>,
}

impl Program {
    /// The command line, for people.
    pub(super) fn words(&self) -> Vec<String> {
        let args = self.args.iter().map(|arg| (*arg).to_owned());
        [self.path.display().to_string()].into_iter().chain(args).collect()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words().join(" "))
    }
}

/// A default directory has between these many bytes of files: enough that laziness shows, not so
/// much that building takes the afternoon.
const ENOUGH: u64 = 100_000_000;
const TOO_MUCH: u64 = 1_500_000_000;

/// Programs that are worth running, with arguments that make them do something and end.
const PROGRAMS: [(&str, &[&str]); 6] = [
    ("bin/rustc", &["--version"]),
    ("bin/python3", &["-c", "import json, hashlib; print(json.dumps({'answer': 42}))"]),
    ("bin/perl", &["-MPOSIX", "-e", "print strftime('perl ran', gmtime 0), \"\\n\""]),
    ("bin/git", &["--version"]),
    ("bin/bash", &["-c", "echo bash ran"]),
    ("git", &["--version"]),
];

/// The directory asked for, or the first fitting one of this host.
pub(super) fn choose(asked: Option<&Path>) -> anyhow::Result<Subject> {
    if let Some(dir) = asked {
        let dir = dir.canonicalize().with_context(|| format!("cannot use {}", dir.display()))?;
        let program = program_in(&dir).with_context(|| {
            format!("no program to run in {}: none of the usual ones, and no executable at its top", dir.display())
        })?;
        return Ok(Subject { dir, program });
    }
    let toolchain = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let toolchain = toolchain.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let candidates = toolchain.into_iter().chain(["/usr", "/opt", "/usr/lib"].map(PathBuf::from));
    for dir in candidates {
        if let Some(program) = program_in(&dir)
            && (ENOUGH..TOO_MUCH).contains(&bytes_in(&dir))
        {
            return Ok(Subject { dir, program });
        }
    }
    bail!("no directory of this host has between 100 MB and 1.5 GB and a program; name one with --source")
}

fn program_in(dir: &Path) -> Option<Program> {
    let usual = PROGRAMS.iter().find(|(path, _)| is_program(&dir.join(path)));
    if let Some((path, args)) = usual {
        return Some(Program { path: PathBuf::from(path), args: args.to_vec() });
    }
    let mut names: Vec<_> = fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    names.sort();
    let name = names.into_iter().find(|name| is_program(&dir.join(name)))?;
    Some(Program { path: PathBuf::from(name), args: vec!["--version"] })
}

/// Whether `path` is itself an ELF executable: a link could lead out of the image.
fn is_program(path: &Path) -> bool {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    let is_executable = |path: &Path| {
        let meta = fs::symlink_metadata(path).ok()?;
        let mut magic = [0; 4];
        fs::File::open(path).ok()?.read_exact(&mut magic).ok()?;
        Some(meta.is_file() && meta.permissions().mode() & 0o111 != 0 && magic == *b"\x7fELF")
    };
    is_executable(path).unwrap_or(false)
}

/// Bytes of the files below `dir`; stops counting when there are too many.
fn bytes_in(dir: &Path) -> u64 {
    let (mut total, mut pending) = (0, vec![dir.to_owned()]);
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                pending.push(entry.path());
            } else if meta.is_file() {
                total += meta.len();
            }
        }
        if total >= TOO_MUCH {
            break;
        }
    }
    total
}

impl Subject {
    /// Library directories of the image, for the dynamic loader: libraries too come from the mount.
    pub(super) fn library_path(&self, mount: &Path) -> OsString {
        let mut dirs = Vec::new();
        for lib in ["lib", "lib64"] {
            dirs.push(mount.join(lib));
            let below = fs::read_dir(self.dir.join(lib)).into_iter().flatten().flatten();
            let multiarch =
                below.map(|entry| entry.file_name()).find(|name| name.to_string_lossy().ends_with("-linux-gnu"));
            dirs.extend(multiarch.map(|name| mount.join(lib).join(name)));
        }
        dirs.retain(|dir| dir.is_dir());
        std::env::join_paths(dirs).unwrap_or_default()
    }
}
