//! Who we are to a server.
//!
//! A [`Keychain`] knows how to log in. [`Tokens`] turns that into what is sent: after a server has asked
//! for it ([`challenge`]), a password or a short-lived token, which it fetches once for all who need it.

pub mod challenge;
mod error;
mod exchange;
mod passes;
mod tokens;

pub use error::AuthError;
pub use tokens::{TokenOptions, Tokens};

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use crate::base::Secret;

/// What somebody can say to prove who they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Login {
    /// A name and a password, for a registry or its token server.
    Basic { user: String, password: Secret },
    /// A refresh token, which the token server changes into short ones (docker's `identitytoken`).
    Identity(Secret),
    /// A bearer token that is used as it is (docker's `registrytoken`).
    Bearer(Secret),
}

/// Why a place of credentials could not be asked. That it has none for somebody is no error.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot get credentials for {registry} from {from}: {detail}")]
pub struct KeychainError {
    /// The registry, as `HOST[:PORT]`.
    pub registry: String,
    /// The file, program or other place.
    pub from: String,
    /// What went wrong, without secrets.
    pub detail: String,
}

/// An owned future, so that the trait below can be made into an object.
pub type LoginFuture<'a> = Pin<Box<dyn Future<Output = Result<Option<Login>, KeychainError>> + Send + 'a>>;

/// Where credentials come from. It is asked again whenever a token is needed, so that what it says may
/// change while images are mounted; it remembers for itself what is costly to find out.
pub trait Keychain: Send + Sync + fmt::Debug {
    /// How to log in to `registry`, which is `HOST[:PORT]`, for `repository`; `None` for nobody in
    /// particular.
    fn login<'a>(&'a self, registry: &'a str, repository: &'a str) -> LoginFuture<'a>;

    /// The registry has refused what `login` gave last, so that nothing remembered is given again.
    fn refused(&self, _registry: &str, _repository: &str, _login: &Login) {}

    /// Grows whenever what was given earlier is void: logins were replaced or taken back.
    fn generation(&self) -> u64 {
        0
    }

    /// Which file, program or other place `login` gave its last answer from, for messages.
    fn origin(&self, _registry: &str, _repository: &str) -> Option<String> {
        None
    }
}

/// No credentials for anybody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Keychain for Nobody {
    fn login<'a>(&'a self, _registry: &'a str, _repository: &'a str) -> LoginFuture<'a> {
        Box::pin(std::future::ready(Ok(None)))
    }
}
