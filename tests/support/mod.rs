//! What several test files need: source trees with every awkward thing in them, and listings that
//! say in one line per entry what a faithful copy must show.
//!
//! Of what makes and lists images, only `building` knows the crate under test, so a fault in it cannot hide
//! itself in the rest. `clock` is a time that tests move, `registry` a registry in a box, `servers` programs of others,
//! `secrets` what must be said nowhere.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test file uses its own part")]

pub mod building;
pub mod clock;
pub mod image;
pub mod interop;
pub mod layers;
pub mod listing;
pub mod nydusform;
pub mod registry;
pub mod secrets;
pub mod servers;
pub mod tree;
pub mod v5;

/// Why a test that needs a privileged host cannot run here, or `None` if it can.
pub fn unable_to_mount() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.trim() == "erofs") {
        return Some("the kernel has no erofs");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 12) { Some("the kernel mounts no erofs image from a file") } else { None }
}

/// Says aloud that a test proved nothing.
pub fn skip(test: &str, why: &str) {
    eprintln!("SKIPPED {test}: {why}");
}
