//! A cache on a disk without room: a clear error, what was readable stays readable, and after
//! space returns reads go on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rafsd::base::Chain;
use rafsd::cache::{Fill, FillError, fill_blocking};
use rafsd::source::{BlobSource, LocalSource};
use tempfile::TempDir;

use super::sample::{Sample, index};
use super::saved_state::open_store;
use super::served::{Bench, options};
use super::support::skip;

const MIB: usize = 1 << 20;

/// A small file system of its own; unmounted and gone when dropped.
struct Disk {
    at: PathBuf,
    _dir: TempDir,
}

impl Disk {
    fn new(len: usize) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".into());
        }
        let dir = tempfile::tempdir().unwrap();
        let (file, at) = (dir.path().join("disk"), dir.path().join("mnt"));
        File::create(&file).unwrap().set_len(len as u64).unwrap();
        fs::create_dir(&at).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&file))?;
        // The loop device goes away with the mount.
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&at))?;
        Ok(Self { at, _dir: dir })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.at)).expect("nobody uses the disk any more");
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {output:?}")) }
}

/// A file of `len` bytes that takes as much room.
fn ballast(path: &Path, len: usize) {
    fs::write(path, vec![1; len]).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

#[test]
fn a_full_disk_fails_new_reads_only_and_only_until_there_is_room() {
    let disk = match Disk::new(24 * MIB) {
        Ok(disk) => disk,
        Err(why) => return skip("a_full_disk_fails_new_reads_only_and_only_until_there_is_room", &why),
    };
    ballast(&disk.at.join("ballast"), 8 * MIB);
    let sample = Sample::of_noise(16 * MIB, 9);
    let bench = Bench::new(options().deadline);
    let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(sample.blobs()).unwrap());
    let store = open_store(&disk.at.join("cache"), &bench);
    let device = store.device(sample.map.clone(), Arc::clone(&source)).unwrap();
    let file = device.open_data().unwrap();
    let right = |unit: &rafsd::blob::Unit| {
        let range = index(unit.blocks().start())..index(unit.blocks().end());
        let mut bytes = vec![0; range.len()];
        file.read_exact_at(&mut bytes, unit.blocks().start()).unwrap();
        bytes == sample.device[range]
    };

    let mut present = Vec::new();
    let mut refused = 0;
    for (number, unit) in sample.map.units().iter().enumerate() {
        match fill_blocking(&*device, unit.blocks()) {
            Ok(()) => present.push(*unit),
            Err(error) => {
                refused += 1;
                assert!(matches!(error, FillError::NoSpace { .. }), "{}", Chain(&error));
                assert_eq!(error.errno(), libc::ENOSPC);
                let text = format!("the cache has no room left for unit {number} of blob {}", sample.blob);
                assert_eq!(error.to_string(), text);
            }
        }
    }
    assert!(present.len() > 10 && refused > 10, "{} {refused}", present.len());

    // Nothing that was present is lost, neither now nor by an attempt to make it durable.
    let flushed = device.flush();
    for unit in &present {
        assert!(device.present(unit.blocks()) && right(unit), "after flush: {flushed:?}");
        fill_blocking(&*device, unit.blocks()).unwrap();
    }
    let other = Sample::of_noise(MIB, 10);
    let error = store.device(other.map.clone(), Arc::clone(&source)).err();
    let text = error.map(|error| Chain(&error).to_string());
    assert!(text.as_ref().is_none_or(|text| text.contains("No space left")), "{text:?}");

    fs::remove_file(disk.at.join("ballast")).unwrap();
    for unit in sample.map.units() {
        fill_blocking(&*device, unit.blocks()).unwrap();
        assert!(right(unit));
    }
    device.flush().unwrap();
    drop((file, device, store));

    let store = open_store(&disk.at.join("cache"), &bench);
    let device = store.device(sample.map.clone(), source).unwrap();
    assert!(sample.map.units().iter().all(|unit| device.present(unit.blocks())), "all of it is durable");
}
