//! Loop devices: a file as a block device, for kernels whose EROFS takes nothing else.
//!
//! The one that is given here detaches itself when the last user closes it, the mount included.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// Asks `/dev/loop-control` for a free number.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
/// Binds a file and sets everything else in one call (Linux 5.8).
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// What EROFS images are made of.
const BLOCK_SIZE: u32 = 4096;
/// How often another process may be faster with a free number.
const ATTEMPTS: usize = 64;

/// `struct loop_config` of `include/uapi/linux/loop.h`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Config>() == 304);

/// A read-only block device over a file. Dropping it takes it away unless somebody else has it open.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Puts a block device over `file`.
    ///
    /// # Errors
    /// `ENOENT` without the driver, `EINVAL` before Linux 5.8, `EPERM` without privilege.
    pub fn over(file: impl AsFd) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        let config = Config {
            fd: u32::try_from(file.as_fd().as_raw_fd()).map_err(io::Error::other)?,
            block_size: BLOCK_SIZE,
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
            reserved: [0; 8],
        };
        for _ in 0..ATTEMPTS {
            // SAFETY: the request takes no argument; the descriptor is open as long as `control` lives.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::open(&path)?;
            // SAFETY: the kernel reads one `Config`, which lives on this stack during the call, and writes
            // nothing; both descriptors are open during it.
            let rc = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
            if rc == 0 {
                return Ok(Self { path, _open: device });
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The file behind a loop device, as the kernel shows it; `None` for any other path.
pub fn backing_file(device: &Path) -> Option<PathBuf> {
    let name = device.strip_prefix("/dev").ok()?.to_str().filter(|name| name.starts_with("loop"))?;
    let shown = std::fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file")).ok()?;
    Some(PathBuf::from(shown.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn the_device_reads_as_the_file_does_and_goes_with_its_last_user() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 4096], 8192).unwrap();
        file.set_len(1 << 20).unwrap();
        let Ok(device) = LoopDevice::over(&file) else { return eprintln!("skipped: no loop device can be had here") };
        let mut block = [0; 4096];

        File::open(device.path()).unwrap().read_exact_at(&mut block, 8192).unwrap();

        assert_eq!(block, [7; 4096]);
        let name = device.path().file_name().unwrap().to_owned();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        assert!(backing.exists());
        drop(device);
        // Whoever probes new block devices may have it open for a moment.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while backing.exists() {
            assert!(std::time::Instant::now() < until, "it stays");
            std::thread::yield_now();
        }
    }
}
