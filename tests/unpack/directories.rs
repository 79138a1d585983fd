use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use rafsd::tools::unpack::{Skipped, UnpackError, UnpackOptions, to_directory};

use crate::fixture::{Fixture, names, unable_to_own};
use crate::support::{listing, skip, tree};

#[test]
fn directory_to_image_to_directory_is_the_same_directory() {
    if let Some(why) = unable_to_own() {
        return skip("directory_to_image_to_directory_is_the_same_directory", why);
    }
    let fixture = Fixture::new();
    let source = fixture.tree();
    let files = fixture.image(&source, "image");
    let want = listing::of(&source).unwrap();

    let report = to_directory(&files, &fixture.path("new"), UnpackOptions::default(), &()).unwrap();

    listing::assert_same(&want, &listing::of(&fixture.path("new")).unwrap());
    assert_eq!((report.hard_links, report.skipped), (3, Skipped::default()));
    assert_eq!(names(fixture.dir.path()), ["image", "new", "source"], "nothing else is left");
}

#[test]
fn an_empty_target_is_filled_in_place() {
    if let Some(why) = unable_to_own() {
        return skip("an_empty_target_is_filled_in_place", why);
    }
    let fixture = Fixture::new();
    let source = fixture.tree();
    let files = fixture.image(&source, "image");
    let target = fixture.path("there");
    fs::create_dir(&target).unwrap();
    let before = fs::metadata(&target).unwrap().ino();

    to_directory(&files, &target, UnpackOptions::default(), &()).unwrap();

    assert_eq!(fs::metadata(&target).unwrap().ino(), before);
    listing::assert_same(&listing::of(&source).unwrap(), &listing::of(&target).unwrap());
}

#[test]
fn a_target_with_something_in_it_is_refused_and_left_alone() {
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir(&source).unwrap();
    let files = fixture.image(&source, "image");
    let target = fixture.path("full");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("mine"), "").unwrap();

    let error = to_directory(&files, &target, UnpackOptions::default(), &()).unwrap_err();

    assert!(matches!(&error, UnpackError::NotEmpty { path } if *path == target), "{error:?}");
    assert_eq!(names(&target), ["mine"]);
}

#[test]
fn blocks_of_zeros_take_no_room() {
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir(&source).unwrap();
    let sparse = File::create(source.join("sparse")).unwrap();
    sparse.set_len((64 << 20) + 5).unwrap();
    sparse.write_all_at(b"island", 40 << 20).unwrap();
    fs::write(source.join("zeros"), vec![0; 4 << 20]).unwrap();
    let files = fixture.image(&source, "image");

    let options = UnpackOptions { no_same_owner: true, ..UnpackOptions::default() };
    to_directory(&files, &fixture.path("new"), options, &()).unwrap();

    let meta = fs::metadata(fixture.path("new/sparse")).unwrap();
    assert_eq!(meta.len(), (64 << 20) + 5);
    assert!(meta.blocks() * 512 <= 64 << 10, "{} blocks", meta.blocks());
    assert_eq!(fs::metadata(fixture.path("new/zeros")).unwrap().blocks(), 0);
    let mut island = [0; 6];
    File::open(fixture.path("new/sparse")).unwrap().read_exact_at(&mut island, 40 << 20).unwrap();
    assert_eq!(&island, b"island");
}

#[test]
fn trees_deeper_than_any_path_or_descriptor_limit_are_unpacked() {
    const LEVELS: usize = 1500;
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir(&source).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o755);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    let mut here = rustix::fs::open(&source, flags, mode).unwrap();
    for _ in 0..LEVELS {
        rustix::fs::mkdirat(&here, "one-level-down", mode).unwrap();
        here = rustix::fs::openat(&here, "one-level-down", flags, mode).unwrap();
    }
    let create = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    rustix::fs::openat(&here, "bottom", create, mode).unwrap();
    rustix::fs::linkat(&here, "bottom", rustix::fs::CWD, source.join("top"), rustix::fs::AtFlags::empty()).unwrap();
    let files = fixture.image(&source, "image");

    let options = UnpackOptions { no_same_owner: true, ..UnpackOptions::default() };
    let report = to_directory(&files, &fixture.path("new"), options, &());

    let links = fs::metadata(fixture.path("new/top")).map(|meta| meta.nlink());
    // The standard library removes trees with a descriptor for every level.
    for name in ["source", "new"] {
        assert!(Command::new("rm").arg("-rf").arg(fixture.path(name)).status().unwrap().success());
    }
    let report = report.unwrap();
    assert_eq!((report.directories, report.hard_links, links.unwrap()), (LEVELS as u64 + 1, 1, 2));
}

#[test]
fn access_lists_of_the_place_do_not_spread_into_the_tree() {
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/file"), "x").unwrap();
    let files = fixture.image(&source, "image");
    let place = fixture.path("place");
    fs::create_dir(&place).unwrap();
    // Version 2; user rwx, user 1000 rwx, group, mask rwx, other.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions, id) in
        [(1u16, 7u16, u32::MAX), (2, 7, 1000), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 0, u32::MAX)]
    {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let name = "system.posix_acl_default";
    if rustix::fs::lsetxattr(&place, name, &acl, rustix::fs::XattrFlags::empty()).is_err() {
        return skip("access_lists_of_the_place_do_not_spread_into_the_tree", "no access lists here");
    }

    let options = UnpackOptions { no_same_owner: true, ..UnpackOptions::default() };
    to_directory(&files, &place.join("new"), options, &()).unwrap();

    listing::assert_same(&listing::of(&source).unwrap(), &listing::of(&place.join("new")).unwrap());
}

/// Runs the program as a user without privileges, if there is a way to.
fn unprivileged(args: &[&str]) -> std::process::Output {
    Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"])
        .arg(env!("CARGO_BIN_EXE_rafsd"))
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn without_privileges_what_cannot_be_kept_is_an_error_or_left_out_and_counted() {
    let test = "without_privileges_what_cannot_be_kept_is_an_error_or_left_out_and_counted";
    if let Some(why) = unable_to_own() {
        return skip(test, why);
    }
    if Command::new("setpriv").arg("--version").output().is_err() {
        return skip(test, "no setpriv");
    }
    let fixture = Fixture::new();
    let source = fixture.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("setuid"), "x").unwrap();
    fs::set_permissions(source.join("setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    let null = rustix::fs::makedev(1, 3);
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(rustix::fs::CWD, source.join("device"), kind, mode, null).unwrap();
    rustix::fs::lsetxattr(source.join("setuid"), "trusted.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    symlink("x", source.join("link")).unwrap();
    tree::set_mtime(&source, 1, 0).unwrap();
    drop(fixture.image(&source, "image"));
    let everyone = fs::Permissions::from_mode(0o777);
    fs::set_permissions(fixture.dir.path(), everyone.clone()).unwrap();
    fs::create_dir(fixture.path("open")).unwrap();
    fs::set_permissions(fixture.path("open"), everyone).unwrap();
    let (image, out) = (fixture.path("image/bootstrap"), fixture.path("open/out"));
    let (image, out) = (image.to_str().unwrap(), out.to_str().unwrap());
    if !unprivileged(&["unpack", "--help"]).status.success() {
        return skip(test, "the program is out of reach for other users");
    }

    let mut args = vec!["unpack", image, "-o", out];
    for (flag, reason) in [
        ("--skip-devices", "/device is a device, which you may not make"),
        ("--no-same-owner", "belongs to 0:0, which you may not set"),
        ("--skip-xattrs", "xattr trusted.x of /setuid cannot be set"),
    ] {
        let refused = unprivileged(&args);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(text.contains(reason) && text.contains(flag), "{text}");
        assert_eq!(names(&fixture.path("open")), Vec::<String>::new());
        args.push(flag);
    }
    args.push("--json");
    let done = unprivileged(&args);

    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["skipped"], serde_json::json!({"owners": 3, "devices": 1, "xattrs": 1, "sockets": 0}));
    let meta = fs::metadata(fixture.path("open/out/setuid")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o755, 65534), "nothing becomes set-id for somebody else");
}
