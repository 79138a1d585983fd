//! A directory of the host as it is, in which files of blobs are whole before they are here.
//!
//! One directory of the tree has a file for each blob of some images, of the length of the decoded blob: what is
//! read of it is fetched. Everything else is the host's: names, attributes and bytes are asked for when the kernel
//! asks. So a virtual machine or a container that gets the tree can mount the images by itself.
//!
//! The host's files change without our doing, so the kernel believes what it is told of them for a second only, and
//! is asked to ask at each open ([`Wishes::changing`]). [`names`] remembers which numbers it knows them by, also for
//! a successor.
//!
//! [`Wishes::changing`]: super::Wishes::changing

mod attach;
mod files;
mod names;
mod tree;

pub use attach::{Blobfs, BlobfsError, Place};
