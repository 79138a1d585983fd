//! Images in registries: what a reference means, which manifest it leads to, and which parts of that make
//! an image that can be mounted.
//!
//! Everything that comes from a registry is hostile: documents are bounded in size, number and depth, and
//! nothing is believed that does not have the digest it was asked for by. The way is a chain, each link of
//! which names the digest of the next: reference, index, manifest, bootstrap layer; the bootstrap names
//! the blobs, and its chunks have digests of their own, which is other layers' business.
//!
//! [`Fetch`] is all that is known of the network here, so that tests write down what a registry says.

pub mod bootstrap;
pub mod document;
mod endpoints;
mod error;
mod fetch;
mod platform;
mod reference;
mod registry;
mod resolve;
#[cfg(test)]
mod scripted;
mod shape;

pub use endpoints::{Endpoints, Place};
pub use error::{DocumentError, OciError};
pub use fetch::{Answer, Ask, Fetch, FetchError, FetchFuture, Taken};
pub use platform::{InvalidPlatform, Platform};
pub use reference::{InvalidReference, Reference, Repository, Version};
pub use registry::{Document, Registry};
pub use resolve::{How, Link, Resolved, resolve};
pub use shape::{Foreign, Image, Layout, Role, Shape, classify};
