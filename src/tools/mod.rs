//! What is done to finished images: check, show, unpack, export, rewrite.
//!
//! Each tool is a function from an image to a report; `cli` prints. Nothing here prints or decides
//! an exit status.

pub mod check;
pub mod export;
pub mod hotlist;
pub mod inspect;
mod output;
mod rewrite;
mod sparse;
pub mod stat;
pub mod unpack;
