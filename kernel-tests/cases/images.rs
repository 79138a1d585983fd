//! Images that lie, and images that share: no reader is shown what its image does not promise.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use nix::libc::EIO;
use rafsd::format::rafs::{ChunkRecord, EXT_SUPERBLOCK_OFFSET, ExtSuperblock};
use zerocopy::FromBytes as _;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_chunk_without_a_digest_refuses_the_mount", Place::Both, a_chunk_without_a_digest_refuses_the_mount),
    case("false_digests_poison_no_other_image", Place::Both, false_digests_poison_no_other_image),
    case("a_second_mount_with_a_bad_source_harms_nobody", Place::Both, a_second_mount_with_a_bad_source_harms_nobody),
    case("a_full_cache_is_an_error_and_then_heals", Place::Here, a_full_cache_is_an_error_and_then_heals),
];

/// Where a chunk record has its flags, and the one that announces a checksum.
const FLAGS: usize = 36;
const HAS_CRC32: u8 = 0x10;

/// Where the chunk table of a bootstrap lies.
fn chunk_table(bytes: &[u8]) -> anyhow::Result<(usize, usize)> {
    let at = usize::try_from(EXT_SUPERBLOCK_OFFSET)?;
    let (ext, _) = ExtSuperblock::ref_from_prefix(&bytes[at..]).map_err(|_| anyhow::anyhow!("too short"))?;
    Ok((usize::try_from(ext.chunk_table_offset.get())?, usize::try_from(ext.chunk_table_size.get())?))
}

/// A copy of the fixture's bootstrap, changed.
fn changed(fixture: &Fixture<'_>, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> anyhow::Result<PathBuf> {
    let mut bytes = fs::read(fixture.bootstrap())?;
    change(&mut bytes);
    let path = fixture.ctx.dir.join(name);
    fs::write(&path, bytes)?;
    Ok(path)
}

/// Runs `rafsd mount` on a bootstrap; its error text if it is refused.
fn mount(fixture: &Fixture<'_>, bootstrap: &Path, dir: &str, blobs: &str) -> anyhow::Result<Result<PathBuf, String>> {
    let target = fixture.ctx.dir.join(dir);
    fs::create_dir_all(&target)?;
    let (bootstrap, at) = (bootstrap.to_str().context("UTF-8")?, target.to_str().context("UTF-8")?);
    let args = ["mount", bootstrap, at, "--blobs", blobs, "--backend", fixture.ctx.backend.name()];
    let output = fixture.command(&args)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(if output.status.success() { Ok(target) } else { Err(said) })
}

fn a_chunk_without_a_digest_refuses_the_mount(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let url = fixture.server.url();
    let (table, len) = chunk_table(&fs::read(fixture.bootstrap())?)?;
    let size_at = usize::try_from(EXT_SUPERBLOCK_OFFSET)? + 0x20;
    let set_size = |bytes: &mut Vec<u8>, len: usize| bytes[size_at..size_at + 8].copy_from_slice(&len.to_le_bytes());
    let record = size_of::<ChunkRecord>();
    let lies = [
        ("no table", changed(&fixture, "none", |bytes| set_size(bytes, 0))?),
        ("half a table", changed(&fixture, "half", |bytes| set_size(bytes, len / record / 2 * record))?),
        (
            "neither digest nor checksum",
            changed(&fixture, "zeros", |bytes| {
                bytes[table..table + 32].fill(0);
                bytes[table + FLAGS] &= !HAS_CRC32;
            })?,
        ),
    ];

    for (lie, bootstrap) in lies {
        let outcome = mount(&fixture, &bootstrap, "lie", &url)?;
        let said = outcome.err().with_context(|| format!("{lie}: it was mounted"))?;
        ensure!(said.contains("names no digest"), "{lie}: {said}");
        ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "{lie}: something is mounted");
    }
    let honest = fixture.mount("honest")?;
    ensure!(fs::read(honest.join("0"))? == content(0, FILE), "the honest image");
    fixture.finish()
}

fn false_digests_poison_no_other_image(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let (table, len) = chunk_table(&fs::read(fixture.bootstrap())?)?;
    // Every digest of the liar is that of other bytes.
    let liar = changed(&fixture, "liar", |bytes| {
        bytes[table..table + len].chunks_mut(size_of::<ChunkRecord>()).for_each(|record| record[0] ^= 1);
    })?;

    let lying = mount(&fixture, &liar, "lying", &fixture.server.url())?.map_err(anyhow::Error::msg)?;
    ensure!(read_byte(&lying.join("0"), 0) == Err(Some(EIO)), "bytes that are not what the liar promises");
    let honest = fixture.mount("honest")?;
    ensure!(fs::read(honest.join("0"))? == content(0, FILE), "the honest image, mounted second");
    drop_caches()?;
    ensure!(read_byte(&lying.join("0"), 0) == Err(Some(EIO)), "the liar sees what was fetched for the other");
    fixture.finish()
}

fn a_second_mount_with_a_bad_source_harms_nobody(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let good = fixture.mount("good")?;
    ensure!(read_byte(&good.join("0"), 0) == Ok(content(0, FILE)[0]), "before");
    let empty = ctx.dir.join("empty");
    fs::create_dir(&empty)?;

    // The tables are known by now, so that this mount needs nothing of its source.
    let empty = empty.to_str().context("UTF-8")?;
    let bad = mount(&fixture, &fixture.bootstrap(), "bad", empty)?.map_err(anyhow::Error::msg)?;

    for dir in [&good, &bad] {
        ensure!(read_byte(&dir.join("1"), 2 << 20) == Ok(content(1, FILE)[2 << 20]), "cold, {}", dir.display());
    }
    fixture.umount(&bad)?;
    ensure!(fs::read(good.join("0"))? == content(0, FILE), "after the second is gone");
    fixture.finish()
}

/// A small file system in a file. Dropping it unmounts.
pub(crate) struct SmallDisk(pub(crate) PathBuf);

impl SmallDisk {
    pub(crate) fn new(ctx: &Ctx, megabytes: u64) -> anyhow::Result<Self> {
        let (file, dir) = (ctx.dir.join("disk"), ctx.dir.join("small"));
        fs::File::create(&file)?.set_len(megabytes << 20)?;
        fs::create_dir(&dir)?;
        for command in [
            Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&file),
            Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&dir),
        ] {
            let output = command.output()?;
            ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount(&self.0) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

fn a_full_cache_is_an_error_and_then_heals(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 4)?;
    fixture.stop()?;
    let disk = SmallDisk::new(ctx, 32)?;
    fixture.use_cache(&disk.0.join("cache"));
    // Or file 3 may be there before the disk is full.
    fixture.start(&["--readahead-most", "0", "--readahead-first", "0"])?;
    let dir = fixture.mount("mnt")?;
    ensure!(fs::read(dir.join("0"))? == content(0, FILE), "while there is room");
    let ballast = disk.0.join("ballast");
    fill_up(&ballast)?;

    let requests = || fixture.fetched().iter().map(|(_, count)| count).sum::<usize>();
    if matches!(ctx.backend, Backend::FuseDevice | Backend::FuseTree) {
        // Readers over FUSE need no file. What they go on with, and come back to, is fetched once.
        for file in [3, 2, 1] {
            ensure!(fs::read(dir.join(file.to_string()))? == content(file, FILE), "file {file} from memory");
        }
        let before = requests();
        drop_caches()?;
        for file in 0..4 {
            ensure!(fs::read(dir.join(file.to_string()))? == content(file, FILE), "file {file} from memory again");
        }
        ensure!(requests() == before, "{} requests for what was fetched", requests() - before);
        ensure!(fixture.log().contains("is full"), "{}", fixture.log());
    } else {
        ensure!(fs::read(dir.join("3")).is_err_and(|e| e.raw_os_error() == Some(EIO)), "a read without room");
        ensure!(fixture.log().contains("no room left"), "{}", fixture.log());
        drop_caches()?;
        ensure!(fs::read(dir.join("0"))? == content(0, FILE), "what was readable stays readable");
        let before = requests();
        for file in ["1", "2", "3"].into_iter().cycle().take(12) {
            ensure!(fs::read(dir.join(file)).is_err_and(|e| e.raw_os_error() == Some(EIO)), "file {file} without room");
        }
        ensure!(requests() == before, "{} requests for reads without room", requests() - before);
    }

    fs::remove_file(&ballast)?;
    ensure!(fs::read(dir.join("3"))? == content(3, FILE), "after there is room again");
    fixture.stop()?;
    drop(disk);
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "mounts are left");
    Ok(())
}

/// Writes until the file system is full.
pub(crate) fn fill_up(path: &Path) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut file = fs::File::create(path)?;
    for size in [1 << 20, 4096] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
    // Whatever could not be written any more was refused, not delayed.
    file.sync_all()?;
    Ok(())
}
