//! What several test files need: source trees with every awkward thing in them, and listings that
//! say in one line per entry what a faithful copy must show.
//!
//! Only `building` knows the crate under test, so a fault in it cannot hide itself in the rest.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod building;
pub mod image;
pub mod listing;
pub mod tree;

/// Why a test that needs a privileged host cannot run here, or `None` if it can.
pub fn unable_to_mount() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim() == "erofs") { None } else { Some("the kernel has no erofs") }
}

/// Says aloud that a test proved nothing.
pub fn skip(test: &str, why: &str) {
    eprintln!("SKIPPED {test}: {why}");
}
