//! Images and blobs that are not what they should be, and disks that are full.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rafsd::base::Chain;
use rafsd::image::Kind;
use rafsd::reader::Files;
use rafsd::tools::unpack::{UnpackError, UnpackOptions, to_archive, to_directory};

use crate::fixture::{Fixture, names, unable_to_own};
use crate::support::{building, skip, tree};

const MINE: UnpackOptions = UnpackOptions { no_same_owner: true, skip_devices: false, skip_xattrs: false };

/// Fails to unpack `files` in every way, and gives back the error.
#[track_caller]
fn fails(fixture: &Fixture, files: &Files) -> UnpackError {
    let before = names(fixture.dir.path());
    let archive = to_archive(files, &fixture.path("archive.tar"), &()).unwrap_err();
    let error = to_directory(files, &fixture.path("new"), MINE, &()).unwrap_err();
    assert_eq!(Chain(&archive).to_string(), Chain(&error).to_string());
    assert_eq!(names(fixture.dir.path()), before, "nothing is left of it");
    error
}

fn damaged_blob(damage: impl FnOnce(&File)) -> String {
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir_all(source.join("dir")).unwrap();
    tree::big_file(&source.join("dir/file"), 5, 1).unwrap();
    let report = building::build(&source, &fixture.path("image")).unwrap();
    let files = fixture.open(&fixture.path("image")).unwrap();
    damage(&File::options().read(true).write(true).open(&report.blobs[0].path).unwrap());

    let text = Chain(&fails(&fixture, &files)).to_string();

    assert!(text.contains(&report.blobs[0].id) && text.contains("dir/file"), "{text}");
    text
}

#[test]
fn a_flipped_bit_names_path_blob_and_chunk() {
    let text = damaged_blob(|blob| {
        let mut byte = [0];
        blob.read_exact_at(&mut byte, 1000).unwrap();
        blob.write_all_at(&[byte[0] ^ 16], 1000).unwrap();
    });

    assert!(text.contains("chunk 0 ") && text.contains("is damaged"), "{text}");
}

#[test]
fn a_truncated_blob_names_path_blob_and_chunk() {
    let text = damaged_blob(|blob| blob.set_len(100).unwrap());

    assert!(text.contains("cannot read chunk 0 ") && text.contains("has 100 bytes, too few"), "{text}");
}

/// Overwrites `old`, which is in the bootstrap exactly once, with `new`.
fn patch(bootstrap: &Path, old: &[u8], new: &[u8]) {
    assert_eq!(old.len(), new.len());
    let mut bytes = fs::read(bootstrap).unwrap();
    let places: Vec<_> = bytes.windows(old.len()).enumerate().filter(|(_, at)| at == &old).map(|(at, _)| at).collect();
    assert_eq!(places.len(), 1, "{}", old.escape_ascii());
    bytes[places[0]..places[0] + new.len()].copy_from_slice(new);
    fs::write(bootstrap, bytes).unwrap();
}

/// An image of a directory, a file in it and a link, with the names of this test's own.
fn hostile(fixture: &Fixture) -> (std::path::PathBuf, std::path::PathBuf) {
    let (source, outside) = (fixture.path("source"), fixture.path("outside"));
    fs::create_dir_all(source.join("aaaaaa")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(source.join("aaaaaa/planted"), "evil").unwrap();
    std::os::unix::fs::symlink(&outside, source.join("bbbbbb")).unwrap();
    fs::write(source.join("cccccc"), "content").unwrap();
    building::build(&source, &fixture.path("image")).unwrap();
    (fixture.path("image/bootstrap"), outside)
}

#[test]
fn names_with_slashes_or_nothing_in_them_are_refused() {
    for name in [b"../cccc".as_slice(), b"/ccccc", b"ccc/cc", b"\0ccccc"] {
        let fixture = Fixture::new();
        let (bootstrap, outside) = hostile(&fixture);
        let name: Vec<u8> = name.iter().copied().take(6).collect();
        patch(&bootstrap, b"cccccc", &name);
        let files = fixture.open(&fixture.path("image")).unwrap();

        let error = fails(&fixture, &files);

        assert!(matches!(error, UnpackError::Image { .. }), "{error:?}");
        assert_eq!(names(&outside), Vec::<String>::new());
    }
}

#[test]
fn entries_that_climb_are_not_followed() {
    let fixture = Fixture::new();
    let (bootstrap, outside) = hostile(&fixture);
    // The last name of a block ends at the first zero. The entry still leads to the file.
    patch(&bootstrap, b"cccccc", b"..\0\0\0\0");
    let files = fixture.open(&fixture.path("image")).unwrap();

    let report = to_directory(&files, &fixture.path("new"), MINE, &()).unwrap();

    assert_eq!((report.directories, report.files, report.symlinks, report.bytes), (2, 1, 1, 4));
    assert_eq!(names(&fixture.path("new")), ["aaaaaa", "bbbbbb"]);
    assert_eq!(names(&fixture.path("new/aaaaaa")), ["planted"]);
    assert_eq!(names(&outside), Vec::<String>::new());
    assert_eq!(names(fixture.dir.path()), ["image", "new", "outside", "source"]);
}

#[test]
fn a_directory_with_the_name_of_a_link_does_not_lead_outside() {
    let fixture = Fixture::new();
    let (bootstrap, outside) = hostile(&fixture);
    // The link comes first then, and the directory's content would go through it.
    patch(&bootstrap, b"bbbbbb", b"aaaaaa");
    let files = fixture.open(&fixture.path("image")).unwrap();

    let error = to_directory(&files, &fixture.path("new"), MINE, &()).unwrap_err();

    assert!(matches!(&error, UnpackError::Twice { path } if path == Path::new("aaaaaa")), "{error:?}");
    assert_eq!(names(&outside), Vec::<String>::new());
    assert!(!fixture.path("new").exists());
}

/// Puts the link before the directory, by exchanging what their names stand for.
#[test]
fn content_of_a_directory_is_not_written_through_an_earlier_link() {
    let fixture = Fixture::new();
    let (bootstrap, outside) = hostile(&fixture);
    let files = fixture.open(&fixture.path("image")).unwrap();
    let mut nids = Vec::new();
    let mut walk = files.image().walk();
    while let Some(step) = walk.next_visit() {
        let step = step.unwrap();
        if step.path.len() == 1 && matches!(step.inode.kind, Kind::Directory | Kind::Symlink) {
            nids.push(step.inode.nid.to_le_bytes());
        }
    }
    drop(files);
    let [directory, link] = nids[..] else { panic!("one directory and one link") };
    let mut bytes = fs::read(&bootstrap).unwrap();
    // Two entries of the root, each 12 bytes, the number first.
    let at = bytes.windows(8).position(|at| at == directory).unwrap();
    let other = bytes.windows(8).rposition(|at| at == link).unwrap();
    bytes[at..at + 8].copy_from_slice(&link);
    bytes[other..other + 8].copy_from_slice(&directory);
    fs::write(&bootstrap, bytes).unwrap();
    patch(&bootstrap, b"bbbbbb", b"aaaaaa");
    let files = fixture.open(&fixture.path("image")).unwrap();

    let error = to_directory(&files, &fixture.path("new"), MINE, &()).unwrap_err();

    assert!(matches!(&error, UnpackError::Twice { path } if path == Path::new("aaaaaa")), "{error:?}");
    assert_eq!(names(&outside), Vec::<String>::new());
}

/// A file system of a megabyte, unmounted when dropped.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn new(at: &'a Path) -> Self {
        fs::create_dir(at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(at).status().unwrap();
        assert!(mounted.success());
        Self(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg(self.0).status().unwrap().success());
    }
}

#[test]
fn a_full_disk_leaves_nothing_that_looks_finished() {
    if let Some(why) = unable_to_own() {
        return skip("a_full_disk_leaves_nothing_that_looks_finished", why);
    }
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir(&source).unwrap();
    tree::big_file(&source.join("file"), 3, 1).unwrap();
    let files = fixture.image(&source, "image");
    let at = fixture.path("small");
    let small = Small::new(&at);

    let directory = to_directory(&files, &at.join("new"), MINE, &()).unwrap_err();
    let archive = to_archive(&files, &at.join("archive"), &()).unwrap_err();

    for error in [directory, archive] {
        let UnpackError::Write { source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    }
    assert_eq!(names(&at), Vec::<String>::new());
    let in_place = to_directory(&files, &at, MINE, &()).unwrap_err();
    assert!(matches!(in_place, UnpackError::Write { .. }), "{in_place:?}");
    assert_eq!(names(&at), Vec::<String>::new());
    drop(small);
}
