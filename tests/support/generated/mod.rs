//! Trees and archives that nobody would write by hand, and what each of them means.
//!
//! `member` is a tar archive as a list of members and the bytes of it. `random` makes such lists
//! from a seed. `model` says what a list means: it is written from what POSIX and GNU tar do and
//! from the rules for images, and knows nothing of the builder. `shown` says what a finished image
//! shows. `minimal` makes a failing list short.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod member;
pub mod minimal;
pub mod model;
pub mod random;
pub mod shown;
