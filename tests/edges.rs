//! Images at the edges of the format: huge files, huge devices, very many and very deep entries.
//!
//! The long one is left out of an ordinary run:
//! `cargo test --release --test edges -- --ignored --nocapture`.

mod support;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use rafsd::build::{self, BuildError, BuildReport, Source};
use rafsd::image::{Image, Kind};
use support::building::{self, spec};
use support::{skip, unable_to_mount};

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn build_stream(stream: impl Read + 'static, out: &Path) -> Result<BuildReport, BuildError> {
    build::build(spec(Source::Archive { name: "edge.tar".into(), stream: Box::new(stream) }, out), &())
}

fn header(kind: tar::EntryType, path: &str) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_path(path).unwrap();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(0o755);
    header.set_cksum();
    header
}

#[test]
fn files_of_more_than_16_gib_keep_their_islands() {
    if let Some(why) = unable_to_mount() {
        return skip("files_of_more_than_16_gib_keep_their_islands", why);
    }
    const ISLANDS: [u64; 5] = [0, (4 << 30) - 5, 4 << 30, (9 << 30) + 4000, (17 << 30) - 40_960];
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let file = File::create_new(source.join("huge")).unwrap();
    file.set_len((17 << 30) + 1).unwrap();
    for at in ISLANDS {
        file.write_all_at(format!("island at {at}").as_bytes(), at).unwrap();
    }

    let mut spec = spec(Source::open(&source).unwrap(), &dir.path().join("image"));
    spec.chunk_size = 1 << 20;
    let report = build::build(spec, &()).unwrap();

    assert_eq!(report.source_bytes, (17 << 30) + 1);
    assert!(report.hole_bytes > (17 << 30) - (16 << 20), "{} bytes of holes", report.hole_bytes);
    assert!(report.blobs[0].decoded_bytes < 8 << 20, "holes are stored once");
    let mounted = building::mount(&report, dir.path());
    let shown = File::open(mounted.path().join("huge")).unwrap();
    assert_eq!(shown.metadata().unwrap().len(), (17 << 30) + 1);
    let file = File::open(source.join("huge")).unwrap();
    for at in ISLANDS {
        let (mut want, mut got) = ([0; 64], [0; 64]);
        let len = file.read_at(&mut want, at).unwrap();
        shown.read_exact_at(&mut got[..len], at).unwrap();
        assert_eq!(want, got, "at {at}");
    }
    let mut behind = [1; 4096];
    shown.read_exact_at(&mut behind, 12 << 30).unwrap();
    assert_eq!(behind, [0; 4096]);
}

#[test]
fn directories_of_ten_thousand_entries_are_listed_whole() {
    let mut tar = tar::Builder::new(Vec::new());
    for number in (0..10_000).rev() {
        let path = format!("wide/{number:05}-{}", "n".repeat(number % 70));
        tar.append(&header(tar::EntryType::Regular, &path), io::empty()).unwrap();
    }
    let dir = scratch();

    let report = build_stream(io::Cursor::new(tar.into_inner().unwrap()), dir.path()).unwrap();

    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let mut walk = image.walk();
    let mut names = Vec::new();
    while let Some(visit) = walk.next_visit() {
        let visit = visit.unwrap();
        names.extend(visit.path.get(1).map(|name| String::from_utf8(name.to_vec()).unwrap()));
    }
    let want: Vec<String> = (0..10_000).map(|n: usize| format!("{n:05}-{}", "n".repeat(n % 70))).collect();
    assert!(names == want, "{} names", names.len());
}

#[test]
fn directories_deeper_than_a_thousand_are_walked() {
    const DEPTH: usize = 1500;
    let path = format!("{}bottom", "d/".repeat(DEPTH));
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header(tar::EntryType::Regular, "x"), &path, io::empty()).unwrap();
    let dir = scratch();

    let report = build_stream(io::Cursor::new(tar.into_inner().unwrap()), dir.path()).unwrap();

    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let (mut walk, mut deepest) = (image.walk(), 0);
    while let Some(visit) = walk.next_visit() {
        deepest = deepest.max(visit.unwrap().path.len());
    }
    assert_eq!(deepest, DEPTH + 1);
}

/// Entries of an archive one after the other, without ever holding it.
struct Entries {
    next: u32,
    count: u32,
    pending: io::Cursor<Vec<u8>>,
}

impl Read for Entries {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.pending.read(buffer)?;
        if n > 0 || self.next > self.count {
            return Ok(n);
        }
        let bytes = if self.next == self.count {
            vec![0; 1024]
        } else {
            let (top, sub) = (self.next / 100_000, self.next / 100 % 1000);
            let path = format!("tree-{top}/directory-{sub}/file-{}", self.next);
            header(tar::EntryType::Regular, &path).as_bytes().to_vec()
        };
        self.next += 1;
        self.pending = io::Cursor::new(bytes);
        self.pending.read(buffer)
    }
}

/// Most memory this process ever had, in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the kernel says so");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "takes long without optimisation; prints a rate"]
fn a_million_inodes_fit_in_one_gib_of_memory() {
    let dir = scratch();
    let entries = Entries { next: 0, count: 1_000_000, pending: io::Cursor::new(Vec::new()) };

    let clock = Instant::now();
    let report = build_stream(entries, dir.path()).unwrap();
    let (took, peak) = (clock.elapsed(), peak_memory());

    println!(
        "{} files in {took:.2?}: {:.0} a second, {} MiB of memory, a bootstrap of {} MiB",
        report.files,
        f64::from(1_000_000) / took.as_secs_f64(),
        peak >> 20,
        report.bootstrap_bytes >> 20,
    );
    assert_eq!(report.files, 1_000_000);
    assert!(peak < 1 << 30, "{peak} bytes");
    let clock = Instant::now();
    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let (mut walk, mut files) = (image.walk(), 0u32);
    while let Some(visit) = walk.next_visit() {
        files += u32::from(visit.unwrap().inode.kind == Kind::Regular);
    }
    println!("walked in {:.2?}", clock.elapsed());
    assert_eq!(files, 1_000_000);
}
