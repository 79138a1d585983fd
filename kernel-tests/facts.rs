//! What the kernel promises, without any daemon: a kernel that changes its mind is noticed here and
//! not in a case that fails for an unclear reason.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use rafsd::format::erofs::{Dirent, InodeExtended, MAGIC, SUPERBLOCK_OFFSET, Superblock, file_type, layout};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::host::Need;
use crate::mounts::{self, Mounted};
use crate::{Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "erofs_mounts_an_image_file_without_a_loop_device",
        needs: &[Need::Root, Need::Erofs, Need::DiskStore],
        place: Place::Both,
        run: erofs_mounts_an_image_file_without_a_loop_device,
    },
    Case { name: "cachefiles_device_opens_once", needs: &[], place: Place::Guest, run: cachefiles_device_opens_once },
    Case {
        name: "cachefiles_binds_on_demand_on_a_disk",
        needs: &[Need::DiskStore],
        place: Place::Guest,
        run: cachefiles_binds_on_demand_on_a_disk,
    },
    Case {
        name: "cachefiles_refuses_a_cache_in_memory",
        needs: &[],
        place: Place::Guest,
        run: cachefiles_refuses_a_cache_in_memory,
    },
    Case {
        name: "erofs_knows_fsid_and_wants_a_bound_cache",
        needs: &[],
        place: Place::Guest,
        run: erofs_knows_fsid_and_wants_a_bound_cache,
    },
    Case { name: "rafsd_binary_starts", needs: &[], place: Place::Both, run: rafsd_binary_starts },
];

fn erofs_mounts_an_image_file_without_a_loop_device(ctx: &Ctx) -> Outcome {
    let image = ctx.dir.join("image with blank");
    let target = ctx.dir.join("mnt");
    fs::write(&image, tiny_image(b"hello", b"from a file\n"))?;
    fs::create_dir(&target)?;

    mount(Some(&image), &target, Some("erofs"), MsFlags::MS_RDONLY, None::<&str>).context("mount")?;
    let mounted = Mounted(target.clone());

    let rows = mounts::below(&ctx.dir)?;
    ensure!(rows.len() == 1 && rows[0].is(&target, "erofs", &image), "mountinfo says {rows:?}");
    let names: Vec<_> = fs::read_dir(&target)?.map(|e| e.map(|e| e.file_name())).collect::<io::Result<_>>()?;
    ensure!(names == ["hello"], "the root lists {names:?}");
    let content = fs::read(target.join("hello"))?;
    ensure!(content == b"from a file\n", "the file holds {content:?}");
    drop(mounted);
    ensure!(mounts::below(&ctx.dir)?.is_empty(), "still mounted");
    Ok(())
}

fn cachefiles_device_opens_once(_: &Ctx) -> Outcome {
    let first = open_cachefiles().context("open")?;
    let second = open_cachefiles().err().and_then(|error| error.raw_os_error());
    ensure!(second == Some(Errno::EBUSY as i32), "the second open gave {second:?}");
    drop(first);
    open_cachefiles().context("open again after close")?;
    Ok(())
}

fn cachefiles_binds_on_demand_on_a_disk(ctx: &Ctx) -> Outcome {
    let device = bind_cachefiles(&ctx.dir).context("bind")?;
    ensure!(ctx.dir.join("cache").is_dir() && ctx.dir.join("graveyard").is_dir(), "the cache has no directories");
    (&device).write_all(b"restore").context("restore, which a restarted daemon relies on")?;
    let used = fs::remove_dir(ctx.dir.join("cache")).err().and_then(|error| error.raw_os_error());
    ensure!(used == Some(Errno::EBUSY as i32), "removal of a bound cache's directory gave {used:?}");
    Ok(())
}

fn cachefiles_refuses_a_cache_in_memory(_: &Ctx) -> Outcome {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let refusal = bind_cachefiles(dir.path()).err().and_then(|error| error.raw_os_error());
    ensure!(refusal == Some(Errno::EOPNOTSUPP as i32), "bind on tmpfs gave {refusal:?}");
    Ok(())
}

fn erofs_knows_fsid_and_wants_a_bound_cache(ctx: &Ctx) -> Outcome {
    let refusal = mount(Some("none"), &ctx.dir, Some("erofs"), MsFlags::MS_RDONLY, Some("fsid=nosuch"));
    ensure!(refusal == Err(Errno::ENOBUFS), "mount gave {refusal:?}");
    Ok(())
}

/// In the guest: the binary came with every library it needs.
fn rafsd_binary_starts(ctx: &Ctx) -> Outcome {
    let output = std::process::Command::new(&ctx.rafsd).arg("--version").output().context("start")?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

fn open_cachefiles() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/cachefiles")
}

/// The device, bound to a cache in `root`; closing it unbinds. One write is one command.
fn bind_cachefiles(root: &Path) -> io::Result<File> {
    let mut device = open_cachefiles()?;
    let dir = root.display();
    for command in [format!("dir {dir}"), "tag kernel-tests".into(), "bind ondemand".into()] {
        device.write_all(command.as_bytes())?;
    }
    Ok(device)
}

/// A valid EROFS image of one block: a root directory with one file, both kept inline.
fn tiny_image(name: &[u8], content: &[u8]) -> Vec<u8> {
    const BLOCK_BITS: u8 = 12;
    const SLOT: usize = 32;
    /// Right behind the superblock.
    const ROOT_NID: u16 = 36;
    const FILE_NID: u16 = 40;

    let mut superblock = Superblock::new_zeroed();
    superblock.magic = MAGIC.into();
    superblock.blkszbits = BLOCK_BITS;
    superblock.root_nid = ROOT_NID.into();
    superblock.inos = 2.into();
    superblock.blocks = 1.into();

    let names: [&[u8]; 3] = [b".", b"..", name];
    let kinds = [(ROOT_NID, file_type::DIRECTORY), (ROOT_NID, file_type::DIRECTORY), (FILE_NID, file_type::REGULAR)];
    let mut entries = Vec::new();
    let mut at = names.len() * size_of::<Dirent>();
    for (name, (nid, file_type)) in names.iter().zip(kinds) {
        let nameoff = u16::try_from(at).expect("short names").into();
        entries.extend(Dirent { nid: u64::from(nid).into(), nameoff, file_type, reserved: 0 }.as_bytes());
        at += name.len();
    }
    entries.extend(names.concat());

    let mut image = vec![0; 1 << BLOCK_BITS];
    let at = usize::try_from(SUPERBLOCK_OFFSET).expect("it is 1024");
    put(&mut image, at, superblock.as_bytes());
    for (nid, mode, nlink, data) in [(ROOT_NID, 0o040_755, 2, &entries[..]), (FILE_NID, 0o100_644, 1, content)] {
        let mut inode = InodeExtended::new_zeroed();
        inode.format = (1 | layout::FLAT_INLINE << 1).into();
        inode.mode = mode.into();
        inode.size = (data.len() as u64).into();
        inode.ino = u32::from(nid).into();
        inode.nlink = nlink.into();
        let at = usize::from(nid) * SLOT;
        put(&mut image, at, inode.as_bytes());
        put(&mut image, at + size_of::<InodeExtended>(), data);
    }
    image
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}
