//! Images as directories and archives again: everything is there, nothing is anywhere else.

mod support;

#[path = "unpack/archives.rs"]
mod archives;
#[path = "unpack/damage.rs"]
mod damage;
#[path = "unpack/directories.rs"]
mod directories;
#[path = "unpack/fixture.rs"]
mod fixture;
#[path = "unpack/interop.rs"]
mod interop;
