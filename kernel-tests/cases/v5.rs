//! Images of RAFS v5, lifted: two that list different chunks of one blob, under one daemon and the next.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::fixture::{Fixture, content, drop_caches, is_fanotify};
use crate::host::Need;
use crate::support::v5::{Item, Tree, Writer, tree};
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "images_of_version_5_share_a_blob_of_which_each_lists_a_part",
        needs: NEEDS,
        place: Place::Both,
        run: images_of_version_5_share_a_blob_of_which_each_lists_a_part,
    },
    Case {
        name: "a_complete_blob_of_version_5_grows_by_what_another_image_lists",
        needs: NEEDS,
        place: Place::Both,
        run: a_complete_blob_of_version_5_grows_by_what_another_image_lists,
    },
    Case {
        name: "an_image_of_version_5_survives_its_daemon",
        needs: NEEDS,
        place: Place::Both,
        run: an_image_of_version_5_survives_its_daemon,
    },
];

/// Bytes of each file: several chunks, the last of which ends within a block.
const LEN: usize = 300_001;

fn whole() -> Tree {
    let file = |seed| Item::File(content(seed, LEN));
    tree([
        ("a", file(1)),
        ("b", file(2)),
        ("both", file(3)),
        ("dir", Item::Dir(tree([("link", Item::Hard("a")), ("to", Item::Link(b"../a".to_vec()))]))),
    ])
}

/// Two images over one blob: one without `b`, one without `a` and its link.
fn images(dir: &Path) -> anyhow::Result<[PathBuf; 2]> {
    let mut writer = Writer { chunk_size: 1 << 16, ..Writer::default() };
    writer.image(&whole());
    let mut make = |name: &str, without: &[&str]| {
        let image = dir.join(name);
        let mut part = whole();
        part.retain(|name, _| without.iter().all(|without| without.as_bytes() != name));
        let bytes = writer.image(&part).bytes;
        fs::create_dir_all(image.join("blobs"))?;
        fs::write(image.join("bootstrap"), bytes)?;
        fs::write(image.join("blobs").join(writer.id()), &writer.blob)?;
        anyhow::Ok(image)
    };
    Ok([make("without-b", &["b"])?, make("without-a", &["a", "dir"])?])
}

fn ensure_reads(at: &Path, path: &str, seed: usize) -> anyhow::Result<()> {
    ensure!(fs::read(at.join(path))? == content(seed, LEN), "{path} below {}", at.display());
    Ok(())
}

fn images_of_version_5_share_a_blob_of_which_each_lists_a_part(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let [first, second] = images(&ctx.dir)?;
    let one = fixture.mount_other(&first, "one", &[])?;
    ensure_reads(&one, "a", 1)?;
    let other = fixture.mount_other(&second, "other", &[])?;
    ensure_reads(&other, "b", 2)?;
    ensure_reads(&other, "both", 3)?;
    ensure_reads(&one, "both", 3)?;
    ensure!(fs::read_link(one.join("dir/to"))? == Path::new("../a"), "link");
    ensure_reads(&one, "dir/link", 1)?;
    ensure!(!other.join("a").exists() && !one.join("b").exists(), "each shows its own tree");
    if is_fanotify(ctx) {
        let blobs = fs::read_dir(fixture.cache().join("v1"))?.count();
        ensure!(blobs == 1, "{blobs} directories for one blob");
    }
    // From now on the cache has to do.
    for image in [&first, &second] {
        fs::remove_dir_all(image.join("blobs"))?;
        fs::create_dir(image.join("blobs"))?;
    }
    fixture.umount(&one)?;
    fixture.umount(&other)?;
    drop_caches()?;
    let other = fixture.mount_other(&second, "other", &[])?;
    let one = fixture.mount_other(&first, "one", &[])?;
    for (at, path, seed) in [(&one, "a", 1), (&one, "both", 3), (&other, "b", 2), (&other, "both", 3)] {
        ensure_reads(at, path, seed)?;
    }
    let mut kept = fs::read_dir(fixture.cache().join("bootstraps"))?.collect::<Result<Vec<_>, _>>()?;
    kept.retain(|entry| !entry.file_name().as_encoded_bytes().ends_with(b".used"));
    let notes = kept.iter().filter(|entry| entry.file_name().as_encoded_bytes().ends_with(b".made")).count();
    ensure!((notes, kept.len()) == (2, 4), "each was lifted once: {kept:?}");
    fixture.restart(&[])?;
    fixture.finish()
}

fn a_complete_blob_of_version_5_grows_by_what_another_image_lists(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let [first, second] = images(&ctx.dir)?;
    let one = fixture.mount_other(&first, "one", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| {
        let devices = images.iter().flat_map(|image| image["devices"].as_array().into_iter().flatten());
        let mut stats = devices.map(|device| &device["stats"]["complete"]).peekable();
        stats.peek().is_some() && stats.all(|complete| complete == true)
    })?;
    // The kernel reads what is complete alone, until there is more of it.
    ensure_reads(&one, "a", 1)?;
    let other = fixture.mount_other(&second, "other", &[])?;
    drop_caches()?;
    ensure_reads(&other, "b", 2)?;
    ensure_reads(&one, "both", 3)?;
    ensure_reads(&one, "dir/link", 1)?;
    fixture.finish()
}

fn an_image_of_version_5_survives_its_daemon(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let [first, second] = images(&ctx.dir)?;
    let one = fixture.mount_other(&first, "one", &[])?;
    let other = fixture.mount_other(&second, "other", &[])?;
    ensure_reads(&one, "a", 1)?;
    fixture.kill()?;
    fixture.start(&[])?;
    drop_caches()?;
    // What was there, what the one lists and was not, and what only the other does.
    ensure_reads(&one, "a", 1)?;
    ensure_reads(&one, "both", 3)?;
    ensure_reads(&other, "b", 2)?;
    ensure_reads(&other, "both", 3)?;
    fixture.finish()
}
