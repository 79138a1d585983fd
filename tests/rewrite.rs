//! Images rewritten with a hot blob, without dead chunks, and as a dictionary: what they show does
//! not change, where it lies does.

mod support;

#[path = "rewrite/chunkdict.rs"]
mod chunkdict;
#[path = "rewrite/command.rs"]
mod command;
#[path = "rewrite/compact.rs"]
mod compact;
#[path = "rewrite/failures.rs"]
mod failures;
#[path = "rewrite/fixture.rs"]
mod fixture;
#[path = "rewrite/foreign.rs"]
mod foreign;
#[path = "rewrite/optimize.rs"]
mod optimize;
