//! Images built from tar archives, sound and hostile.

mod support;

use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use rafsd::build::{self, BuildError, BuildReport, Source};
use support::building::{assert_mounts_as, build, output, spec};
use support::{listing, skip, tree, unable_to_mount};

/// Runs GNU tar over `source` and returns the archive.
fn pack(source: &Path, archive: &Path, options: &[&str]) -> PathBuf {
    let status = Command::new("tar")
        .args(["--create", "--sort=name", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(source)
        .args(options)
        .arg(".")
        .stderr(std::process::Stdio::null())
        .status();
    assert!(status.expect("tar is installed").success());
    archive.to_owned()
}

#[test]
fn kernel_shows_what_the_archive_holds() {
    if let Some(why) = unable_to_mount() {
        return skip("kernel_shows_what_the_archive_holds", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::make(&source, 2).unwrap();
    let mut want = listing::of(&source).unwrap();
    // Tar leaves sockets out.
    want.retain(|line| line.path != b"special/socket");
    let options = ["--format=pax", "--xattrs", "--xattrs-include=*"];
    let archive = dir.path().join("archive");
    for more in [["--no-wildcards"], ["--gzip"], ["--sparse"]] {
        pack(&source, &archive, &[&options[..], &more].concat());

        let report = build(&archive, &dir.path().join(more[0])).unwrap();

        assert_mounts_as(&want, &report, dir.path());
        assert_eq!(report.skipped_xattrs, 0, "{more:?}");
    }
}

#[test]
fn holes_of_every_sparse_format_are_put_back() {
    if let Some(why) = unable_to_mount() {
        return skip("holes_of_every_sparse_format_are_put_back", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let mut random = tree::Random::new(5);
    // More islands than fit in one header of the old format, and a hole at either end.
    let file = File::create(source.join("islands")).unwrap();
    file.set_len(20 << 20).unwrap();
    for i in 1..40u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &random.noise(5000), i << 19).unwrap();
    }
    File::create(source.join("hole")).unwrap().set_len((2 << 20) + 5).unwrap();
    for path in ["islands", "hole", "."] {
        tree::set_mtime(&source.join(path), 1_000_000, 0).unwrap();
    }
    let want = listing::of(&source).unwrap();
    for format in ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"] {
        let pax = if format == "--format=gnu" { "--sparse" } else { "--format=pax" };
        let archive = pack(&source, &dir.path().join("archive"), &["--sparse", pax, format]);
        assert!(archive.metadata().unwrap().len() < 1 << 20, "the archive itself is sparse");

        let report = build(&archive, &dir.path().join(format)).unwrap();

        assert_mounts_as(&want, &report, dir.path());
    }
}

/// One member of an archive made by hand.
struct Member<'a> {
    path: &'a [u8],
    kind: u8,
    link: &'a [u8],
    content: &'a [u8],
}

const FILE: Member<'_> = Member { path: b"file", kind: b'0', link: b"", content: b"content" };

/// Members with right checksums and an end mark.
fn archive(members: &[Member<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for member in members {
        let mut header = [0; 512];
        header[..member.path.len()].copy_from_slice(member.path);
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..135].copy_from_slice(format!("{:011o}", member.content.len()).as_bytes());
        header[156] = member.kind;
        header[157..157 + member.link.len()].copy_from_slice(member.link);
        header[257..265].copy_from_slice(b"ustar\x0000");
        out.extend_from_slice(&sealed(header));
        out.extend_from_slice(member.content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// The header with its checksum.
fn sealed(mut header: [u8; 512]) -> [u8; 512] {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// A PAX record with its length in front.
fn record(key: &str, value: &str) -> String {
    let body = format!(" {key}={value}\n");
    let len = (1..).find(|len: &usize| len.to_string().len() + body.len() == *len).unwrap();
    format!("{len}{body}")
}

fn build_bytes(bytes: impl Into<Vec<u8>>, out: &Path) -> Result<BuildReport, BuildError> {
    let stream: Box<dyn Read> = Box::new(Cursor::new(bytes.into()));
    build::build(spec(Source::Archive { name: "test.tar".into(), stream }, out), &())
}

#[track_caller]
fn assert_refused(members: &[Member<'_>], reason: &str) {
    let dir = tempfile::tempdir().unwrap();
    let error = build_bytes(archive(members), dir.path()).unwrap_err();
    assert!(error.to_string().contains(reason), "{error}");
    assert_eq!(output(dir.path()), [], "nothing is left of a failed build");
}

/// A member with PAX records for the next one.
fn pax(content: &[u8]) -> Member<'_> {
    Member { path: b"pax", kind: b'x', link: b"", content }
}

#[test]
fn members_that_no_rule_covers_are_refused() {
    assert_refused(&[Member { path: b"a/../../etc", ..FILE }], "'..'");
    assert_refused(&[Member { kind: b'D', ..FILE }], "unknown member type");
    assert_refused(&[Member { kind: b'1', link: b"file", content: b"", ..FILE }], "not there");
    assert_refused(
        &[
            Member { path: b"d", kind: b'5', content: b"", ..FILE },
            Member { path: b"l", kind: b'1', link: b"d", content: b"" },
        ],
        "directory",
    );
    assert_refused(&[Member { kind: b'2', content: b"", ..FILE }], "symbolic link target");
    assert_refused(&[FILE, Member { path: b"file/below", ..FILE }], "parent is not a directory");
    assert_refused(&[Member { path: b".", ..FILE }], "called '.'");
    assert_refused(&[pax(record("size", "8").as_bytes()), FILE], "disagree about a size");
    assert_refused(&[pax(record("size", "9000000000000000000").as_bytes()), FILE], "too big");
    assert_refused(&[pax(record("size", "90000000000").as_bytes()), FILE], "cut off");
    assert_refused(&[pax(record("path", &"n".repeat(256)).as_bytes()), FILE], "255 is the limit");
    assert_refused(&[pax(record("path", &"a/".repeat(20_000)).as_bytes()), FILE], "is the limit");
    assert_refused(&[pax(record("uid", "4294967296").as_bytes()), FILE], "32 bits");
    assert_refused(&[pax(b"99 path=x\n"), FILE], "damaged extended header");
    assert_refused(&[pax(record("path", "x").as_bytes())], "without an end mark");
    let sparse = record("GNU.sparse.realsize", "9223372036854775807") + &record("GNU.sparse.map", "0,7");
    assert_refused(&[pax(sparse.as_bytes()), FILE], "too big");
    let lying = record("GNU.sparse.realsize", "100") + &record("GNU.sparse.map", "0,8");
    assert_refused(&[pax(lying.as_bytes()), FILE], "its map has 8");
}

#[test]
fn archives_follow_the_rules_where_formats_leave_room() {
    if let Some(why) = unable_to_mount() {
        return skip("archives_follow_the_rules_where_formats_leave_room", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let member =
        |path: &'static [u8], kind, link: &'static [u8], content: &'static [u8]| Member { path, kind, link, content };
    let bytes = archive(&[
        member(b"pax", b'g', b"", b"52 comment=0123456789012345678901234567890123456789\n"),
        member(b"b/f", b'0', b"", b"first"),
        member(b"z/f", b'0', b"", b"z"),
        member(b"m/x//./y", b'0', b"", b"between siblings"),
        member(b"./b/f", b'0', b"", b"second"),
        member(b"absolute", b'7', b"", b"contiguous"),
        member(b"linked", b'1', b"./b/f", b""),
        member(b"link", b'2', b"b/f", b""),
        member(b"link-again", b'1', b"link", b""),
        member(b"fifo", b'6', b"", b""),
        member(b"b/.wh.gone", b'0', b"", b""),
        member(b"old-directory/", 0, b"", b""),
    ]);
    // Two archives in a row are one.
    let bytes = [bytes, archive(&[member(b"b", b'5', b"", b""), member(b"tail", b'0', b"", b"t")])].concat();

    let report = build_bytes(bytes, &dir.path().join("out")).unwrap();

    let mounted = support::building::mount(&report, dir.path());
    let read = |path: &str| fs::read_to_string(mounted.path().join(path)).unwrap();
    assert_eq!([read("b/f"), read("linked"), read("link-again")], ["second", "second", "second"]);
    assert_eq!(
        [read("m/x/y"), read("z/f"), read("absolute"), read("tail")],
        ["between siblings", "z", "contiguous", "t"]
    );
    assert!(mounted.path().join("b/.wh.gone").exists() && mounted.path().join("old-directory").is_dir());
    let links: Vec<String> = listing::of(mounted.path())
        .unwrap()
        .into_iter()
        .filter(|line| line.path.starts_with(b"link") || line.path == b"b/f")
        .map(|line| line.facts.split(' ').find(|fact| fact.starts_with("links=")).unwrap().to_owned())
        .collect();
    assert_eq!(links, ["links=2"; 4]);
    let mode = |path: &str| {
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(mounted.path().join(path)).unwrap().permissions())
    };
    assert_eq!((mode("m") & 0o7777, mode("b") & 0o7777), (0o755, 0o644));
}

#[test]
fn a_long_name_cut_behind_a_slash_is_still_that_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let long = [[b'n'; 99].as_slice(), b"/file"].concat();
    let records = record("path", std::str::from_utf8(&long).unwrap());
    let gnu = Member { path: b"././@LongLink", kind: b'L', link: b"", content: &long };
    for extension in [pax(records.as_bytes()), gnu] {
        let cut = Member { path: &long[..100], ..FILE };

        let report = build_bytes(archive(&[extension, cut]), &dir.path().join("out")).unwrap();

        assert_eq!((report.files, report.directories, report.source_bytes), (1, 2, 7));
    }
}

/// The numbers of a report are about the files that are in the image.
#[test]
fn replaced_members_are_not_in_the_numbers_of_the_report() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = tree::Random::new(8);
    let (big, gone) = (random.noise(10_000), random.noise(3000));
    let sparse = [record("GNU.sparse.size", "2097159"), record("GNU.sparse.map", "2097152,7")].concat();
    let file = |path, content| Member { path, content, ..FILE };
    let members = [
        file(b"first", &big),
        file(b"replaced", &big),
        file(b"replaced", b"short"),
        pax(sparse.as_bytes()),
        file(b"hole", b"payload"),
        pax(sparse.as_bytes()),
        file(b"kept", b"content"),
        file(b"hole", &gone),
        file(b"hole", b"tiny"),
        file(b"again", &big),
        file(b"late", &gone),
    ];

    let report = build_bytes(archive(&members), &dir.path().join("out")).unwrap();

    assert_eq!(report.source_bytes, 10_000 + 5 + (2 << 20) + 7 + 4 + 10_000 + 3000);
    assert_eq!(report.hole_bytes, 2 << 20);
    assert_eq!(report.deduplicated_bytes, 10_000 + 3000, "again, and late, whose bytes a replaced member brought");
}

/// An archive with every kind of extension in it.
fn rich_archive() -> Vec<u8> {
    let pax = record("path", "renamed") + &record("mtime", "-1.5") + &record("SCHILY.xattr.user.a", "b");
    let sparse =
        record("GNU.sparse.major", "1") + &record("GNU.sparse.minor", "0") + &record("GNU.sparse.realsize", "50000");
    let map = format!("{:\0<512}payload", "1\n40000\n7\n");
    archive(&[
        Member { path: b".", kind: b'5', link: b"", content: b"" },
        FILE,
        Member { path: b"x", kind: b'x', link: b"", content: pax.as_bytes() },
        FILE,
        Member { path: b"x", kind: b'x', link: b"", content: sparse.as_bytes() },
        Member { path: b"sparse", kind: b'0', link: b"", content: map.as_bytes() },
        Member { path: b"x", kind: b'L', link: b"", content: b"a/long/name\0" },
        Member { path: b"a", kind: b'2', link: b"target", content: b"" },
        Member { path: b"hard", kind: b'1', link: b"file", content: b"" },
        Member { path: b"null", kind: b'3', link: b"", content: b"" },
    ])
}

/// Builds on another thread, and gives up on it if it does not come back.
fn build_in_time(bytes: Vec<u8>, out: &Path) -> Result<BuildReport, BuildError> {
    let (done, result) = mpsc::channel();
    let out = out.to_owned();
    std::thread::spawn(move || {
        // Nobody listens any more if this took too long.
        let _ = done.send(build_bytes(bytes, &out));
    });
    result.recv_timeout(Duration::from_secs(60)).expect("a build ends, and without a panic")
}

#[test]
fn archive_cut_anywhere_before_its_end_mark_is_an_error() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let whole = rich_archive();
    assert!(build_in_time(whole.clone(), dir.path()).is_ok());
    let end_mark = whole.len() - 1024;
    for len in (0..=end_mark).step_by(256) {
        assert!(build_in_time(whole[..len].to_vec(), dir.path()).is_err(), "{len} of {end_mark} bytes");
    }
    let mut packed = flate2::read::GzEncoder::new(whole.as_slice(), flate2::Compression::fast());
    let mut gzip = Vec::new();
    packed.read_to_end(&mut gzip).unwrap();
    assert!(build_in_time(gzip.clone(), dir.path()).is_ok());
    for len in 0..gzip.len() {
        assert!(build_in_time(gzip[..len].to_vec(), dir.path()).is_err(), "{len} of {} gzip bytes", gzip.len());
    }
}

#[test]
fn damaged_archives_end_in_an_image_or_an_error() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let whole = rich_archive();
    let mut random = tree::Random::new(11);
    let mut refused = 0;
    for _ in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
            bytes[at] ^= 1 << random.below(8);
        }
        // Right checksums, so that damage gets past the first check.
        if random.below(2) == 0 {
            for header in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
                let fixed = sealed((&*header).try_into().unwrap());
                header.copy_from_slice(&fixed);
            }
        }
        refused += u32::from(build_in_time(bytes, dir.path()).is_err());
    }
    assert!((100..1450).contains(&refused), "{refused} of 1500 refused: the damage is too mild or too harsh");
}
