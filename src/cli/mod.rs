//! cli

pub mod build;
pub mod progress;
