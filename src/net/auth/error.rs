//! Why nobody can say who we are.

use std::time::Duration;

use super::KeychainError;
use crate::base::{Chain, Fault};
use crate::net::{ClientError, SendError};

/// Why there is nothing to send to a registry. `Clone` because one request for a token answers all who
/// wait for it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuthError {
    /// A place of credentials could not be asked.
    #[error(transparent)]
    Keychain(#[from] KeychainError),
    /// The token server knows us and refuses, or does not know us.
    #[error("{server} gives no token for {repository} of {registry} (status {status}); {}", remedy(registry, origin.as_deref()))]
    Denied {
        server: String,
        registry: String,
        repository: String,
        status: u16,
        /// Where the credentials came from; `None` if there were none.
        origin: Option<String>,
    },
    /// The token server cannot be reached, or is not well.
    #[error("{server} gives no token for {registry}: {detail}")]
    Unavailable {
        server: String,
        registry: String,
        detail: String,
        /// Nobody is asked before this time has passed.
        retry_after: Duration,
    },
    /// The registry names a token server that must not be asked.
    #[error("{registry} wants a token of {server}, which cannot be trusted: {why}")]
    Untrusted { registry: String, server: String, why: String },
    /// No client can be built.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Whoever needs it does not wait longer.
    #[error("no token for {registry} in time")]
    Late { registry: String },
}

impl AuthError {
    /// How long it will be just this that is said.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } => Some(*retry_after),
            Self::Keychain(_) | Self::Denied { .. } | Self::Untrusted { .. } | Self::Client(_) | Self::Late { .. } => {
                None
            }
        }
    }

    /// The same, but so long.
    pub(super) fn for_now(mut self, pause: Duration) -> Self {
        if let Self::Unavailable { retry_after, .. } = &mut self {
            *retry_after = pause;
        }
        self
    }

    /// What a caller may do about it.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Keychain(_) | Self::Unavailable { .. } | Self::Late { .. } => Fault::Transient,
            Self::Denied { .. } | Self::Untrusted { .. } | Self::Client(_) => Fault::Permanent,
        }
    }
}

impl From<AuthError> for SendError {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::Late { .. } => Self::Late,
            AuthError::Untrusted { .. } => Self::Untrusted(error.to_string()),
            other => Self::Unauthorized {
                fault: other.fault(),
                detail: Chain(&other).to_string(),
                retry_after: other.retry_after(),
            },
        }
    }
}

/// What a person can do.
fn remedy(registry: &str, origin: Option<&str>) -> String {
    let set = format!("`rafsd credentials set {registry} --user NAME --password-stdin`");
    match origin {
        Some(origin) => format!("check the credentials, which came from {origin}, or give others with {set}"),
        None => format!("no credentials are known for it; give some with {set}, or see docs/CREDENTIALS.md"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_says_where_the_credentials_came_from_and_what_to_do() {
        let denied = |origin: Option<&str>| AuthError::Denied {
            server: "https://a.example/token".into(),
            registry: "r.example".into(),
            repository: "a/b".into(),
            status: 401,
            origin: origin.map(Into::into),
        };

        assert_eq!(
            denied(Some("/home/alice/.docker/config.json")).to_string(),
            "https://a.example/token gives no token for a/b of r.example (status 401); check the credentials, which \
             came from /home/alice/.docker/config.json, or give others with `rafsd credentials set r.example --user NAME \
             --password-stdin`"
        );
        assert!(denied(None).to_string().contains("no credentials are known for it"), "{}", denied(None));
        assert_eq!(denied(None).fault(), Fault::Permanent);
    }
}
