//! The room that the cache takes: what goes is never what somebody reads.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches};
use super::images::SmallDisk;
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Host, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_mounted_image_reads_on_while_others_are_evicted", a_mounted_image_reads_on_while_others_are_evicted),
    case("a_mount_that_outlived_its_daemon_keeps_its_blob", a_mount_that_outlived_its_daemon_keeps_its_blob),
    case(
        "on_a_full_disk_readers_wait_for_what_nobody_uses_to_go",
        on_a_full_disk_readers_wait_for_what_nobody_uses_to_go,
    ),
    case("a_daemon_that_starts_on_a_full_disk_makes_room", a_daemon_that_starts_on_a_full_disk_makes_room),
    case("images_that_share_a_blob_are_told_so", images_that_share_a_blob_are_told_so),
    case("the_cache_is_told_verified_pinned_and_collected", the_cache_is_told_verified_pinned_and_collected),
    Case {
        name: "what_nobody_uses_goes_from_the_cache_that_the_kernel_keeps",
        needs: NEEDS,
        place: Place::Guest,
        run: what_nobody_uses_goes_from_the_cache_that_the_kernel_keeps,
    },
];

/// Another image, of one file of [`FILE`] bytes that is like no other; its bootstrap and blobs.
fn image(fixture: &Fixture<'_>, number: usize) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (source, out) =
        (fixture.ctx.dir.join(format!("source-{number}")), fixture.ctx.dir.join(format!("image-{number}")));
    fs::create_dir(&source)?;
    fs::write(source.join("file"), content(1000 + number, FILE))?;
    let built = Command::new(&fixture.ctx.rafsd).arg("build").arg(&source).arg("-o").arg(&out).output()?;
    ensure!(built.status.success(), "build: {}", String::from_utf8_lossy(&built.stderr));
    Ok((out.join("bootstrap"), out.join("blobs")))
}

/// Mounts, reads all of and unmounts another image.
pub(crate) fn visit(fixture: &Fixture<'_>, number: usize) -> anyhow::Result<()> {
    let (bootstrap, blobs) = image(fixture, number)?;
    let dir = fixture.ctx.dir.join(format!("visit-{number}"));
    fs::create_dir(&dir)?;
    let text = |path: &PathBuf| path.to_str().map(str::to_owned).context("UTF-8");
    fixture.must(&[
        "mount",
        &text(&bootstrap)?,
        &text(&dir)?,
        "--blobs",
        &text(&blobs)?,
        "--backend",
        fixture.ctx.backend.name(),
    ])?;
    ensure!(fs::read(dir.join("file"))? == content(1000 + number, FILE), "image {number}");
    fixture.umount(&dir)
}

fn cache(fixture: &Fixture<'_>) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&fixture.must(&["cache", "list", "--json"])?)?)
}

/// The entry of the blob that is mounted at `dir`.
fn blob_at(fixture: &Fixture<'_>, dir: &str) -> anyhow::Result<Value> {
    let report = cache(fixture)?;
    let blobs = report["blobs"].as_array().context("blobs")?;
    let used_here =
        |blob: &&Value| blob["used_by"].as_array().is_some_and(|users| users.iter().any(|user| user == dir));
    blobs.iter().find(used_here).cloned().with_context(|| format!("no blob is used at {dir}: {report}"))
}

fn a_mounted_image_reads_on_while_others_are_evicted(ctx: &Ctx) -> Outcome {
    const FILES: usize = 5;
    let mut fixture = Fixture::files(ctx, FILES)?;
    // Less than the mounted image alone will take.
    fixture.restart(&["--cache-limit", "12MiB"])?;
    let mount = fixture.mount("mnt")?;
    let at = mount.to_str().context("UTF-8")?.to_owned();
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "before");
    let name = blob_at(&fixture, &at)?["name"].as_str().context("name")?.to_owned();
    let data = fixture.cache().join("v1").join(&name).join("data");
    let inode = fs::metadata(&data)?.ino();

    for number in 0..8 {
        visit(&fixture, number)?;
        let file = number % FILES;
        drop_caches()?;
        ensure!(fs::read(mount.join(file.to_string()))? == content(file, FILE), "file {file} after {number} images");
    }
    // The last reads took the cache over its limit with nothing else left to go.
    fixture.wait_for_list("evicted", |_| {
        cache(&fixture).is_ok_and(|report| report["stats"]["evicted"].as_u64().is_some_and(|evicted| evicted >= 8))
    })?;
    let report = cache(&fixture)?;
    let used = report["bytes"].as_u64().context("bytes")?;
    ensure!(used > 12 << 20, "the mounted image alone is over the limit: {report}");
    drop_caches()?;
    for file in 0..FILES {
        ensure!(fs::read(mount.join(file.to_string()))? == content(file, FILE), "file {file} in the end");
    }
    ensure!(fs::metadata(&data)?.ino() == inode, "the mounted blob was replaced");
    fixture.ensure_fetched_once()?;
    let refused = fixture.command(&["cache", "drop", &name])?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("is in use"), "{refused:?}");
    ensure!(fixture.must(&["cache", "gc", "--json"])?.contains("\"removed\":["), "a collection");
    ensure!(data.exists(), "collected while it was mounted");
    fixture.finish()
}

fn what_nobody_uses_goes_from_the_cache_that_the_kernel_keeps(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--cache-limit", "10MiB"])?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "before");

    (0..4).try_for_each(|number| visit(&fixture, number))?;
    let within = |report: &Value| report["bytes"].as_u64().is_some_and(|bytes| bytes <= 10 << 20);
    fixture.wait_for_list("evicted", |_| {
        cache(&fixture).is_ok_and(|report| report["stats"]["evicted"].as_u64() >= Some(1) && within(&report))
    })?;
    let log = fixture.log();
    ensure!(log.contains("evicted") && log.contains("kind=Kernel"), "what the kernel has: {log}");

    // The rest of what nobody uses: other blobs and their bootstraps, and not what is mounted.
    let collected: Value = serde_json::from_str(&fixture.must(&["cache", "gc", "--json"])?)?;
    let removed = collected["removed"].as_array().context("removed")?;
    ensure!(removed.iter().any(|removed| removed["kind"] == "kernel"), "{collected}");
    let promises = fs::read_dir(fixture.cache().join("cachefiles-maps/rafsd"))?.count();
    ensure!(promises == 1, "{promises} promises about blobs, one of which is mounted");
    drop_caches()?;
    let fetched = fixture.fetched().len();
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "after the collection");
    ensure!(fixture.fetched().len() == fetched, "it was there");

    // What went is fetched again.
    let again = ctx.dir.join("again");
    fs::create_dir(&again)?;
    let text = |path: PathBuf| path.to_str().map(str::to_owned).context("UTF-8");
    let (bootstrap, blobs) = (text(ctx.dir.join("image-0/bootstrap"))?, text(ctx.dir.join("image-0/blobs"))?);
    fixture.must(&["mount", &bootstrap, &text(again.clone())?, "--blobs", &blobs, "--backend", "cachefiles"])?;
    ensure!(fs::read(again.join("file"))? == content(1000, FILE), "after it went");
    fixture.umount(&again)?;
    fixture.finish()
}

fn a_mount_that_outlived_its_daemon_keeps_its_blob(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount_with("mnt", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| {
        let devices = images.iter().flat_map(|image| image["devices"].as_array().into_iter().flatten());
        devices.into_iter().all(|device| device["stats"]["complete"] == true)
    })?;
    let file = File::open(mount.join("1"))?;
    fixture.restart(&["--cache-limit", "1MiB"])?;
    let report = cache(&fixture)?;
    ensure!(report["blobs"][0]["in_use"] == true, "nobody serves it, and a kernel has it open: {report}");
    ensure!(report["bootstraps"][0]["in_use"] == true, "the bootstrap: {report}");

    let collected: Value = serde_json::from_str(&fixture.must(&["cache", "gc", "--json"])?)?;
    ensure!(collected["removed"].as_array().is_some_and(Vec::is_empty), "{collected}");
    drop_caches()?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "after the collection");

    // Out of the tree, and in nobody's list of mounts.
    nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH)?;
    let collected: Value = serde_json::from_str(&fixture.must(&["cache", "gc", "--json"])?)?;
    ensure!(collected["removed"].as_array().is_some_and(Vec::is_empty), "a file is open: {collected}");
    drop(file);
    let collected: Value = serde_json::from_str(&fixture.must(&["cache", "gc", "--json"])?)?;
    ensure!(collected["removed"].as_array().is_some_and(|gone| gone.len() == 2), "blob and bootstrap: {collected}");
    fixture.finish()
}

fn the_cache_is_told_verified_pinned_and_collected(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    let at = mount.to_str().context("UTF-8")?.to_owned();
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "a cold read");
    visit(&fixture, 1)?;

    let blob = blob_at(&fixture, &at)?;
    ensure!(
        blob["in_use"] == true && blob["complete"] == false && blob["bytes"].as_u64() >= Some(FILE as u64),
        "{blob}"
    );
    let usage: Value = serde_json::from_str(&fixture.must(&["cache", "usage", "--json"])?)?;
    let images = usage.as_array().context("a list")?;
    ensure!(images.len() == 2, "one mounted, one only known: {usage}");
    for image in images {
        let mounted = image["mounted"].as_array().is_some_and(|dirs| dirs.iter().any(|dir| *dir == at));
        let blobs: u64 =
            image["blobs"].as_array().into_iter().flatten().filter_map(|blob| blob["bytes"].as_u64()).sum();
        let bootstrap = image["bootstrap_bytes"].as_u64().context("bootstrap")?;
        ensure!(
            image["bytes"].as_u64() == Some(blobs + bootstrap) && blobs >= FILE as u64,
            "mounted {mounted}: {image}"
        );
        ensure!(image["shared_bytes"] == 0, "they share nothing: {image}");
    }

    // The partial one is read while it is mounted and marked, and nothing is fetched for that.
    let fetched = fixture.fetched().len();
    let verified: Value = serde_json::from_str(&fixture.must(&["cache", "verify", "--json"])?)?;
    let units: u64 = verified.as_array().into_iter().flatten().filter_map(|report| report["units"].as_u64()).sum();
    ensure!(units >= 6 && fixture.fetched().len() == fetched, "{verified}");

    let name = blob["name"].as_str().context("name")?;
    fixture.must(&["cache", "pin", name])?;
    fixture.umount(&mount)?;
    let collected: Value = serde_json::from_str(&fixture.must(&["cache", "gc", "--json"])?)?;
    let gone = collected["removed"].as_array().context("removed")?;
    ensure!(gone.iter().filter(|gone| gone["kind"] == "blob").count() == 1, "the other one only: {collected}");
    fixture.must(&["cache", "pin", name, "--remove"])?;
    fixture.must(&["cache", "drop", &name[..8]])?;
    ensure!(cache(&fixture)?["blobs"].as_array().is_some_and(Vec::is_empty), "all gone");

    // And it is fetched again for the next mount.
    let mount = fixture.mount("again")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "after it was dropped");
    fixture.finish()
}

fn on_a_full_disk_readers_wait_for_what_nobody_uses_to_go(ctx: &Ctx) -> Outcome {
    const FILES: usize = 6;
    let mut fixture = Fixture::files(ctx, FILES)?;
    fixture.stop()?;
    // Room for either the mounted image or the others, and no limit but the disk itself.
    let disk = SmallDisk::new(ctx, 32)?;
    fixture.use_cache(&disk.0.join("cache"));
    fixture.start(&[])?;
    (0..4).try_for_each(|number| visit(&fixture, number))?;
    let mount = fixture.mount("mnt")?;

    for file in 0..FILES {
        ensure!(fs::read(mount.join(file.to_string()))? == content(file, FILE), "file {file}: {}", fixture.log());
    }
    let stats = cache(&fixture)?["stats"].clone();
    ensure!(stats["refused_writes"].as_u64() > Some(0) && stats["evicted"].as_u64() > Some(0), "{stats}");
    fixture.stop()?;
    drop(disk);
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "mounts are left");
    Ok(())
}

fn a_daemon_that_starts_on_a_full_disk_makes_room(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.stop()?;
    let disk = SmallDisk::new(ctx, 32)?;
    fixture.use_cache(&disk.0.join("cache"));
    fixture.start(&[])?;
    (0..2).try_for_each(|number| visit(&fixture, number))?;
    let can_do = fixture.info()?.host.choice;
    fixture.stop()?;
    // Whatever else is on that disk.
    let mut filler = fs::File::create(disk.0.join("filler"))?;
    while std::io::Write::write_all(&mut filler, &[1; 1 << 16]).is_ok() {}
    while std::io::Write::write_all(&mut filler, &[1; 512]).is_ok() {}

    fixture.start(&[])?;

    let can_do_now = fixture.info()?.host.choice;
    ensure!(can_do_now == can_do, "{can_do_now:?}, not {can_do:?}: {}", fixture.log());
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "{}", fixture.log());
    fixture.stop()?;
    drop(filler);
    drop(disk);
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "mounts are left");
    Ok(())
}

fn images_that_share_a_blob_are_told_so(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let (other, _) = image(&fixture, 1)?;
    let merged = ctx.dir.join("merged");
    let layers = [fixture.bootstrap(), other];
    let output = Command::new(&ctx.rafsd).arg("merge").args(&layers).arg("-o").arg(&merged).output()?;
    ensure!(output.status.success(), "merge: {}", String::from_utf8_lossy(&output.stderr));
    let blobs = ctx.dir.join("all");
    fs::create_dir(&blobs)?;
    for dir in ["image/blobs", "image-1/blobs"] {
        for blob in fs::read_dir(ctx.dir.join(dir))? {
            let blob = blob?;
            fs::copy(blob.path(), blobs.join(blob.file_name()))?;
        }
    }
    let alone = fixture.mount("alone")?;
    ensure!(fs::read(alone.join("0"))? == content(0, FILE), "the first image");
    let both = ctx.dir.join("both");
    fs::create_dir(&both)?;
    let text = |path: &std::path::Path| path.to_str().map(str::to_owned).context("UTF-8");
    let backend = ctx.backend.name();
    fixture.must(&["mount", &text(&merged)?, &text(&both)?, "--blobs", &text(&blobs)?, "--backend", backend])?;
    ensure!(fs::read(both.join("file"))? == content(1001, FILE), "the second layer");

    let usage: Value = serde_json::from_str(&fixture.must(&["cache", "usage", "--json"])?)?;
    let at = |dir: &std::path::Path| {
        let images = usage.as_array().into_iter().flatten();
        let mut here =
            images.filter(|image| image["mounted"].as_array().is_some_and(|dirs| dirs.contains(&dir.to_str().into())));
        here.next().with_context(|| format!("nothing at {}: {usage}", dir.display()))
    };
    let (alone, both) = (at(&alone)?, at(&both)?);
    let shared = alone["blobs"][0]["bytes"].as_u64().context("bytes")?;
    ensure!(shared >= FILE as u64 && alone["shared_bytes"] == shared && both["shared_bytes"] == shared, "{usage}");
    ensure!(both["bytes"].as_u64() >= Some(shared + FILE as u64), "its own blob too: {usage}");
    ensure!(both["inodes"].as_u64() > alone["inodes"].as_u64(), "{usage}");
    fixture.finish()
}
