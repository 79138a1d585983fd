//! What an inotify instance watches, as the kernel says.
//!
//! A watch ends with its superblock, whoever has read the event that tells so. The list in `fdinfo`
//! is therefore the truth about which superblocks live, for every process that holds the instance.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};

/// One watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Watched {
    /// Its number in the instance (`wd`).
    pub number: i32,
    /// The superblock's device: major and minor number.
    pub device: (u32, u32),
}

/// Major and minor number of a `st_dev`, as a watch has them.
pub fn device_numbers(st_dev: u64) -> io::Result<(u32, u32)> {
    let number = |part: u64| u32::try_from(part).map_err(io::Error::other);
    Ok((number(nix::sys::stat::major(st_dev))?, number(nix::sys::stat::minor(st_dev))?))
}

/// Longest line that is looked at; the rest of a longer one is passed over.
const LINE: usize = 256;

/// Calls `visit` for each watch of the instance. Allocates nothing.
pub fn each_watch(instance: BorrowedFd<'_>, visit: &mut dyn FnMut(Watched)) -> io::Result<()> {
    let mut path = [0; 64];
    let mut rest = &mut path[..];
    write!(rest, "/proc/self/fdinfo/{}", instance.as_raw_fd())?;
    let len = 64 - rest.len();
    let mut file = File::open(std::str::from_utf8(&path[..len]).map_err(io::Error::other)?)?;
    let (mut line, mut filled) = ([0; LINE], 0);
    let mut buffer = [0; 4096];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        for &byte in &buffer[..read] {
            if byte == b'\n' {
                if let Some(watched) = parse(&line[..filled]) {
                    visit(watched);
                }
                filled = 0;
            } else if filled < LINE {
                line[filled] = byte;
                filled += 1;
            }
        }
    }
}

/// `inotify wd:1 ino:2 sdev:2e mask:... ` (`show_fdinfo` in `fs/notify/fdinfo.c`).
fn parse(line: &[u8]) -> Option<Watched> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    if words.next() != Some("inotify") {
        return None;
    }
    let (mut number, mut device) = (None, None);
    for word in words {
        match word.split_once(':') {
            Some(("wd", value)) => number = i32::from_str_radix(value, 16).ok(),
            Some(("sdev", value)) => device = u32::from_str_radix(value, 16).ok(),
            _ => {}
        }
    }
    let device = device?;
    // The kernel's own dev_t: twenty bits of minor number.
    Some(Watched { number: number?, device: (device >> 20, device & 0xf_ffff) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_kernel_lists_what_is_watched_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let instance = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        let seen = || {
            let mut seen = Vec::new();
            each_watch(instance.as_fd(), &mut |watched| seen.push(watched)).unwrap();
            seen
        };
        assert_eq!(seen(), []);
        let mut watches = Vec::new();
        for name in 0..40 {
            let path = dir.path().join(name.to_string());
            std::fs::create_dir(&path).unwrap();
            watches.push(instance.add_watch(&path, AddWatchFlags::IN_ATTRIB).unwrap());
        }
        assert_eq!(seen().len(), 40);
        let device = device_numbers(std::fs::metadata(dir.path()).unwrap().dev()).unwrap();
        assert!(seen().iter().all(|watched| watched.device == device), "{:?} {device:?}", seen()[0]);
        let highest = seen().iter().map(|watched| watched.number).max();
        instance.rm_watch(watches.pop().unwrap()).unwrap();
        assert_eq!(seen().len(), 39);
        assert!(highest > seen().iter().map(|watched| watched.number).max(), "numbers are not read in hexadecimal");
    }
}
