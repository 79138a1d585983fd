//! HTTP, once for everybody who needs it.
//!
//! [`server`] is a small static server with ranges, for the demo, the tests and the benches, that
//! can also misbehave on request. Nothing here knows what a blob is for.

pub mod server;
