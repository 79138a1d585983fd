//! Images made by Nydus's own builder, mounted.
//!
//! The images are not part of the project; see `tests/support/interop.rs` for where they are looked for.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use rafsd::base::hex;
use rafsd::codec::sha256;
use serde_json::{Map, Value, json};

use super::fixture::Fixture;
use crate::host::{Need, interop};
use crate::{Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[Case {
    name: "images_of_nydus_show_what_their_listing_says",
    needs: &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::Interop],
    place: Place::Both,
    run: images_of_nydus_show_what_their_listing_says,
}];

pub(crate) use crate::support::interop::SERVED as IMAGES;

/// Listings that the images must show.
pub(crate) const LISTINGS: [&str; 2] = ["tree.jsonl", "merged.jsonl"];

fn images_of_nydus_show_what_their_listing_says(ctx: &Ctx) -> Outcome {
    let folder = interop(ctx.in_guest).context("a need of this case")?;
    let fixture = Fixture::files(ctx, 1)?;
    let target = ctx.dir.join("mnt");
    fs::create_dir(&target)?;
    let at = target.to_str().context("UTF-8")?;

    for name in IMAGES.into_iter().chain(["v6-zran"]) {
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
        say("target", escaped(&fs::read_link(path)?.into_os_string().into_vec()).into());
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
