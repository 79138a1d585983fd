use std::fs;
use std::path::Path;
use std::process::Command;

use rafsd::tools::unpack::{Skipped, to_archive, to_stream};

use crate::fixture::{Fixture, unable_to_own};
use crate::support::{listing, skip};

/// Unpacks an archive with GNU tar, with everything it can keep.
fn extract(archive: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    // The tree has times in the future and before 1970, which GNU tar remarks on.
    let flags = ["--warning=no-timestamp", "--xattrs", "--xattrs-include=*", "--same-owner", "-p", "-C"];
    let output = Command::new("tar").args(flags).arg(to).arg("-xf").arg(archive).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).chars().take(300).collect::<String>();
    assert!(output.status.success() && text.is_empty(), "{text}");
}

#[test]
fn gnu_tar_unpacks_the_archive_to_the_same_directory() {
    if let Some(why) = unable_to_own() {
        return skip("gnu_tar_unpacks_the_archive_to_the_same_directory", why);
    }
    let fixture = Fixture::new();
    let source = fixture.tree();
    let files = fixture.image(&source, "image");
    let archive = fixture.path("archive.tar");

    let report = to_archive(&files, &archive, &()).unwrap();

    assert_eq!(report.skipped, Skipped { sockets: 1, ..Skipped::default() });
    extract(&archive, &fixture.path("new"));
    let mut want = listing::of(&source).unwrap();
    want.retain(|line| line.path != b"special/socket");
    listing::assert_same(&want, &listing::of(&fixture.path("new")).unwrap());
}

#[test]
fn image_to_archive_to_image_is_the_same_image() {
    if let Some(why) = unable_to_own() {
        return skip("image_to_archive_to_image_is_the_same_image", why);
    }
    let fixture = Fixture::new();
    let source = fixture.tree();
    fs::remove_file(source.join("special/socket")).unwrap();
    crate::support::tree::set_mtime(&source.join("special"), 77, 0).unwrap();
    let files = fixture.image(&source, "image");
    let archive = fixture.path("archive.tar");

    to_archive(&files, &archive, &()).unwrap();

    let again = fixture.image(&archive, "again");
    let mut bytes = Vec::new();
    to_stream(&again, &mut bytes, &()).unwrap();
    assert!(bytes == fs::read(&archive).unwrap(), "the archives differ");
}

#[test]
fn the_archive_of_an_image_is_always_the_same() {
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    crate::support::tree::set_mtime(&source, 77, 0).unwrap();
    let files = fixture.image(&source, "image");
    let (mut first, mut second) = (Vec::new(), Vec::new());

    to_stream(&files, &mut first, &()).unwrap();
    to_stream(&files, &mut second, &()).unwrap();

    assert_eq!(first, second);
    assert!(first.starts_with(b"./\0"));
    assert_eq!(first.len() % 512, 0);
}

#[test]
fn python_reads_what_is_in_the_archive() {
    let test = "python_reads_what_is_in_the_archive";
    if let Some(why) = unable_to_own() {
        return skip(test, why);
    }
    let fixture = Fixture::new();
    let files = fixture.image(&fixture.tree(), "image");
    let archive = fixture.path("archive.tar");
    let report = to_archive(&files, &archive, &()).unwrap();
    let script = "import sys, tarfile\nm = tarfile.open(sys.argv[1]).getmembers()\n\
        print(*(sum(k(x) for x in m) for k in (tarfile.TarInfo.isdir, tarfile.TarInfo.isfile, \
        tarfile.TarInfo.issym, tarfile.TarInfo.islnk, tarfile.TarInfo.isdev)))";
    let Ok(output) = Command::new("python3").args(["-c", script]).arg(&archive).output() else {
        return skip(test, "no python3");
    };

    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let want = [report.directories, report.files, report.symlinks, report.hard_links, report.specials];
    assert_eq!(text.trim(), want.map(|n| n.to_string()).join(" "), "{}", String::from_utf8_lossy(&output.stderr));
}
