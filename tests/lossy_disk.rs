//! The cache on a disk that loses power, fails and fills up.
//!
//! The real store, devices and ledgers run on a disk in memory (`model`) that remembers every
//! operation. One part cuts the power at every operation and looks at what may be left; the other
//! lets every operation fail. The promise is the same: a unit that is called present has the bytes
//! that the image committed to, and what was made durable is still there.
//!
//! Environment: `RAFSD_SEED` is the first seed (default 1), `RAFSD_POWER_CUTS` the least number of cuts of
//! each test (default 8000). A failure names the seed and the operation.

#[path = "lossy_disk/faults.rs"]
mod faults;
#[path = "lossy_disk/images.rs"]
mod images;
#[path = "lossy_disk/media.rs"]
mod media;
#[path = "lossy_disk/model.rs"]
mod model;
#[path = "lossy_disk/power_cut.rs"]
mod power_cut;
#[path = "lossy_disk/rng.rs"]
mod rng;
#[path = "lossy_disk/script.rs"]
mod script;

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}
