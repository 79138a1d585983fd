//! Credentials that a running daemon is given. They go in, and do not come out again.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::base::Secret;
use crate::credentials::LoginKind;

/// `PUT /v1/credentials`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CredentialsRequest {
    /// The registry, as `HOST[:PORT]`.
    pub registry: String,
    /// Beginning of the names of the repositories that they are for, in whole parts; all if left out.
    #[serde(default)]
    pub repository: Option<String>,
    pub login: LoginRequest,
}

/// How to log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LoginRequest {
    Password {
        user: String,
        password: Hidden,
    },
    /// A refresh token, which the token server of the registry changes into short ones.
    IdentityToken(Hidden),
    /// A bearer token that is sent as it is.
    RegistryToken(Hidden),
}

/// Text on its way in. It has no form in which it could get into a message.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden(pub Secret);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Hidden {
    /// For the client, which sends it.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.expose())
    }
}

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Secret::new(String::deserialize(deserializer)?)))
    }
}

#[cfg(test)]
impl schemars::JsonSchema for Hidden {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        String::schema_name()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        String::json_schema(generator)
    }

    fn inline_schema() -> bool {
        true
    }
}

/// `DELETE /v1/credentials`: which ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CredentialsTarget {
    /// As they were set.
    pub registry: String,
    #[serde(default)]
    pub repository: Option<String>,
}

/// What is told of credentials that were given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CredentialsReport {
    pub registry: String,
    /// `null` for all.
    pub repository: Option<String>,
    /// `null` for tokens.
    pub user: Option<String>,
    pub kind: CredentialKind,
}

/// What kind of secret it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum CredentialKind {
    Password,
    IdentityToken,
    RegistryToken,
}

impl From<LoginKind> for CredentialKind {
    fn from(kind: LoginKind) -> Self {
        match kind {
            LoginKind::Password => Self::Password,
            LoginKind::IdentityToken => Self::IdentityToken,
            LoginKind::RegistryToken => Self::RegistryToken,
        }
    }
}

impl fmt::Display for CredentialKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password => "password",
            Self::IdentityToken => "identity token",
            Self::RegistryToken => "registry token",
        })
    }
}
