//! What each fuzz target does with one input: plain functions, so that the fuzzer and the
//! tests on a stable compiler run the same.
//!
//! A body asserts what a caller of the parser may rely on when there is no error. It never fails
//! because of an error: that is what most inputs are for. It bounds its own work, not the parser's.
#![allow(dead_code, unreachable_pub, reason = "each program uses one of them")]

pub mod blob_meta;
pub mod bootstrap;
pub mod codec;
pub mod fuse_wire;
pub mod lists;
pub mod oci;
pub mod rafs5;
pub mod tar;
pub mod toc;

/// Takes `len` bytes from the front of `input`, filled up with zeros where there are fewer.
fn take(input: &mut &[u8], len: usize) -> Vec<u8> {
    let (head, rest) = input.split_at(len.min(input.len()));
    *input = rest;
    let mut out = head.to_vec();
    out.resize(len, 0);
    out
}
