//! Bad input: bootstraps, blob tables, blobs and saved state with truncations and flipped bits,
//! sources that fail, and a cache without room.
//!
//! The promise is always the same: an error or a correct read; never a panic, a hang, memory
//! without bound, or a wrong byte. Cases are seeded and each failure names the case, so that it
//! can be had again. No kernel is needed, except for the loop device of the full disk.

mod support;

#[path = "hostile/allocations.rs"]
mod allocations;
#[path = "hostile/archives.rs"]
mod archives;
#[path = "hostile/blobs.rs"]
mod blobs;
#[path = "hostile/bootstraps.rs"]
mod bootstraps;
#[path = "hostile/deep.rs"]
mod deep;
#[path = "hostile/full_disk.rs"]
mod full_disk;
#[path = "hostile/lists.rs"]
mod lists;
#[path = "hostile/loading.rs"]
mod loading;
#[path = "hostile/merging.rs"]
mod merging;
#[path = "hostile/mutation.rs"]
mod mutation;
#[path = "hostile/sample.rs"]
mod sample;
#[path = "hostile/saved_state.rs"]
mod saved_state;
#[path = "hostile/served.rs"]
mod served;
#[path = "hostile/tables.rs"]
mod tables;
