//! Where credentials for registries are found.
//!
//! A [`Place`] is a file, a program or a memory that may know how to log in somewhere. A [`Chain`] asks
//! several, in order, and is the [`Keychain`](crate::net::auth::Keychain) of the network layer. The order
//! and all forms are in docs/CREDENTIALS.md.
//!
//! Places block, so they are written as plain code, and the chain asks them on threads for that, a few at
//! a time. Files are read whenever they are asked: they are small, and what they say may change. What a
//! program says is remembered for a while.
//!
//! Errors name the place and what is wrong with it, and nothing of what it holds.

mod chain;
mod environment;
mod files;
mod given;
mod goduration;
mod helper;
mod plugin;
mod programs;
mod record;
mod remembered;
mod server;
mod sources;

pub use chain::{Chain, Place, Trouble};
pub use environment::Environment;
pub use files::{AuthFile, SecretFiles};
pub use given::{Given, GivenEntry, LoginKind};
pub use helper::Helpers;
pub use plugin::{Plugins, PluginsError};
pub use programs::{Output, ProgramError, Programs, Runner};
pub use record::user_and_password;
pub use server::Server;
pub use sources::{Credentials, Sources, SourcesError};
