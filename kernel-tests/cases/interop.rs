//! Images made by Nydus's own builder, mounted.
//!
//! The images are not part of the project; see `tests/support/interop.rs` for where they are looked for.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use rafsd::base::hex;
use rafsd::codec::sha256;
use serde_json::{Map, Value, json};

use super::fixture::{Fixture, drop_caches};
use crate::host::{Need, interop};
use crate::{Backend, Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "images_of_nydus_show_what_their_listing_says",
        needs: &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::Interop],
        place: Place::Both,
        run: images_of_nydus_show_what_their_listing_says,
    },
    Case {
        name: "an_image_over_a_plain_tar_is_for_fuse_tree",
        needs: &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::Interop, Need::Program("gunzip")],
        place: Place::Here,
        run: an_image_over_a_plain_tar_is_for_fuse_tree,
    },
];

pub(crate) use crate::support::interop::SERVED as IMAGES;

/// An image whose data is in a gzip layer, which lies beside it.
pub(crate) const ZRAN: &str = "v6-zran";

/// Listings that the images must show.
pub(crate) const LISTINGS: [&str; 2] = ["tree.jsonl", "merged.jsonl"];

fn images_of_nydus_show_what_their_listing_says(ctx: &Ctx) -> Outcome {
    let folder = interop(ctx.in_guest).context("a need of this case")?;
    let fixture = Fixture::files(ctx, 1)?;
    let target = ctx.dir.join("mnt");
    fs::create_dir(&target)?;
    let at = target.to_str().context("UTF-8")?;

    for name in IMAGES.into_iter().chain([ZRAN]) {
        let image = folder.join(name);
        let (bootstrap, blobs) = (bootstrap_of(&image)?, image.join("blobs"));
        let (bootstrap, blobs) = (bootstrap.to_str().context("UTF-8")?, blobs.to_str().context("UTF-8")?);
        let layers = layers_of(&image, &ctx.dir.join("layers"))?;
        let layers = layers.iter().flat_map(|dir| ["--blobs", dir]);
        let args = ["mount", bootstrap, at, "--blobs", blobs, "--backend", ctx.backend.name()];
        fixture.must(&args.into_iter().chain(layers).collect::<Vec<_>>())?;
        let got = list(&target).with_context(|| name.to_owned());
        fixture.umount(&target)?;

        let (got, listing) = (got?, fs::read_to_string(image.join("expect"))?);
        let want = read_listing(&folder.join(listing.trim()))?;
        let first = want.iter().zip(&got).find(|(want, got)| want != got);
        ensure!(want.len() > 10 && first.is_none() && want.len() == got.len(), "{name} differs: {first:?}");
    }
    fixture.finish()
}

/// Longest link target that the reference writer does not spoil in blocks of 512 bytes.
const LONGEST_TARGET: usize = 512;

/// Its blocks are no pages, and its only digest is the name of the layer.
fn an_image_over_a_plain_tar_is_for_fuse_tree(ctx: &Ctx) -> Outcome {
    let folder = interop(ctx.in_guest).context("a need of this case")?;
    let image = folder.join("v6-tarfs");
    let mut fixture = Fixture::files(ctx, 1)?;
    let (target, blobs) = (ctx.dir.join("mnt"), ctx.dir.join("layers"));
    fs::create_dir(&target)?;
    fs::create_dir(&blobs)?;
    let layer = Command::new("gunzip").arg("-c").arg(image.join("layer.tar.gz")).output()?.stdout;
    let name = sha256(&layer).to_string();
    fs::write(blobs.join(&name), &layer)?;
    let texts = [&image.join("bootstrap"), &target, &blobs].map(|path| path.to_str().unwrap_or_default().to_owned());
    let mount = |fixture: &Fixture<'_>, backend: &str| {
        fixture.command(&["mount", &texts[0], &texts[1], "--blobs", &texts[2], "--backend", backend])
    };
    let listing = fs::read_to_string(image.join("expect"))?;
    let is_whole = |row: &Value| row["target"].as_str().is_none_or(|target| target.len() <= LONGEST_TARGET);
    let mut want = read_listing(&folder.join(listing.trim()))?;
    want.retain(|_, row| is_whole(row));
    let ensure_same = |root: &Path| {
        let got = list(root)?;
        let first = want.iter().find(|(path, row)| got.get(*path) != Some(*row));
        ensure!(want.len() > 500 && first.is_none(), "differs: {first:?}, which is {:?}", first.map(|it| &got[it.0]));
        anyhow::Ok(())
    };

    let asked = mount(&fixture, ctx.backend.name())?;
    if ctx.backend == Backend::FuseTree {
        ensure!(asked.status.success(), "{asked:?}");
        ensure_same(&target)?;
        fixture.kill()?;
        fixture.start(&[])?;
        drop_caches()?;
        ensure_same(&target).context("after a takeover")?;
        fixture.umount(&target)?;
        // Another layer under its name, for a daemon that remembers nothing.
        fixture.restart(&[])?;
        let mut other = layer.clone();
        *other.last_mut().context("a layer")? ^= 1;
        fs::write(blobs.join(&name), &other)?;
        let refused = mount(&fixture, ctx.backend.name())?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success() && said.contains("plain tar layer with the SHA-256"), "{said}");
        return fixture.finish();
    }
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    ensure!(!asked.status.success() && said.contains("blocks of 512 bytes"), "{said}");
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "something is mounted");
    let auto = mount(&fixture, "auto")?;
    ensure!(auto.status.success(), "{auto:?}");
    let report = &fixture.list()?[0];
    ensure!(report["backend"] == "fuse-tree" && report["why"].to_string().contains("512 bytes"), "{report}");
    ensure_same(&target).context("auto")?;
    fixture.umount(&target)?;

    // As one disk the kernel takes it.
    let disk = ctx.dir.join("disk");
    let exported =
        Command::new(&ctx.rafsd).args(["export", &texts[0], "--blobs", &texts[2], "-o"]).arg(&disk).output()?;
    ensure!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let flags = nix::mount::MsFlags::MS_RDONLY;
    nix::mount::mount(Some(&disk), &target, Some("erofs"), flags, None::<&str>).context("mount the disk")?;
    let mounted = crate::mounts::Mounted(target);
    ensure_same(&mounted.0).context("one disk")?;
    drop(mounted);
    fixture.finish()
}

/// The bootstrap of an image, or the blob that holds it.
fn bootstrap_of(image: &Path) -> anyhow::Result<PathBuf> {
    let file = image.join("bootstrap");
    if file.exists() {
        return Ok(file);
    }
    let mut blobs = fs::read_dir(image.join("blobs"))?;
    Ok(blobs.next().context("an image has a blob")??.path())
}

/// A directory in which the gzip layer that an image is an index into has the name of its digest, made at `dir`.
fn layers_of(image: &Path, dir: &Path) -> anyhow::Result<Option<String>> {
    let layer = image.join("layer.tar.gz");
    if !layer.exists() {
        return Ok(None);
    }
    fs::create_dir(dir)?;
    let bytes = fs::read(layer)?;
    fs::write(dir.join(sha256(&bytes).to_string()), bytes)?;
    Ok(Some(dir.to_str().context("UTF-8")?.to_owned()))
}

/// Facts about each entry of a tree, by path.
type Listing = BTreeMap<String, Value>;

pub(crate) fn read_listing(file: &Path) -> anyhow::Result<Listing> {
    let text = fs::read_to_string(file)?;
    let row = |line| {
        let row: Value = serde_json::from_str(line)?;
        Ok((row["path"].as_str().context("a row has a path")?.to_owned(), row))
    };
    text.lines().map(row).collect()
}

/// What the program that came with the images would print for `root`.
pub(crate) fn list(root: &Path) -> anyhow::Result<Listing> {
    let mut out = Listing::from([(".".to_owned(), facts(root, ".", true)?)]);
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir)?.collect::<Result<Vec<DirEntry>, _>>()? {
            let path = entry.path();
            let name = escaped(path.strip_prefix(root)?.as_os_str().as_bytes());
            if entry.file_type()?.is_dir() {
                pending.push(path.clone());
            }
            out.insert(name.clone(), facts(&path, &name, false)?);
        }
    }
    Ok(out)
}

fn facts(path: &Path, name: &str, is_root: bool) -> anyhow::Result<Value> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let mut row = Map::new();
    let mut say = |key: &str, value: Value| drop(row.insert(key.to_owned(), value));
    say("path", name.into());
    say("mode", format!("0o{:o}", meta.mode()).into());
    say("uid", meta.uid().into());
    say("gid", meta.gid().into());
    if !kind.is_dir() {
        say("nlink", meta.nlink().into());
    }
    if !is_root {
        say("mtime", meta.mtime().into());
    }
    if kind.is_file() {
        say("size", meta.len().into());
        say("sha256", sha256(&fs::read(path)?).to_string().into());
    } else if kind.is_symlink() {
        let target = match fs::read_link(path) {
            // Other builders' images may have some that are spoilt.
            Err(error) if error.raw_os_error() == Some(nix::libc::EUCLEAN) => b"damaged".to_vec(),
            target => target?.into_os_string().into_vec(),
        };
        say("target", escaped(&target).into());
    } else if kind.is_char_device() || kind.is_block_device() {
        say("rdev", json!([rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())]));
    }
    let xattrs = xattrs(path)?;
    if !xattrs.is_empty() {
        say("xattr", xattrs.into());
    }
    Ok(row.into())
}

fn xattrs(path: &Path) -> anyhow::Result<Map<String, Value>> {
    let mut names = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let mut out = Map::new();
    for name in names[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        out.insert(escaped(name), hex(&value[..len]).into());
    }
    Ok(out)
}

/// Bytes that are no UTF-8 as `\xNN`.
fn escaped(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
    }
    out
}
