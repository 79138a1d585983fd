//! Credentials that the running daemon is given, replaced and taken away again. They are in its memory
//! only: the next daemon does not have them.

use super::api::{CredentialsReport, CredentialsRequest, CredentialsTarget, LoginRequest};
use super::{Daemon, DaemonError};
use crate::base::Secret;
use crate::credentials::{GivenEntry, Server};
use crate::net::auth::Login;

impl Daemon {
    /// Takes credentials, in place of those for the same repositories. Tokens that were got before are not
    /// used any more.
    pub fn set_credentials(&self, request: &CredentialsRequest) -> Result<CredentialsReport, DaemonError> {
        let server = server(&request.registry, request.repository.as_deref())?;
        let login = login(&request.login)?;
        let report = report(self.options.credentials.given().set(server.clone(), login));
        tracing::info!(registry = %server, user = report.user, "credentials were given");
        Ok(report)
    }

    /// Forgets credentials.
    pub fn remove_credentials(&self, target: &CredentialsTarget) -> Result<(), DaemonError> {
        let server = server(&target.registry, target.repository.as_deref())?;
        if !self.options.credentials.given().remove(&server) {
            return Err(DaemonError::NoCredentials(server.to_string()));
        }
        tracing::info!(registry = %server, "credentials were taken away");
        Ok(())
    }

    /// What was given, without secrets.
    pub fn list_credentials(&self) -> Vec<CredentialsReport> {
        self.options.credentials.given().list().into_iter().map(report).collect()
    }
}

fn server(registry: &str, repository: Option<&str>) -> Result<Server, DaemonError> {
    let is_host = !registry.contains('/');
    // What is no part of a repository's name would never fit.
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
    let is_host = is_host && repository.is_none_or(|repository| repository.chars().all(is_name));
    let text = repository.map_or_else(|| registry.to_owned(), |repository| format!("{registry}/{repository}"));
    let server = Server::parse(&text).filter(|server| is_host && server.is_plain());
    // Not repeated: somebody may have put a password there.
    server.ok_or(DaemonError::NotARegistry)
}

fn login(request: &LoginRequest) -> Result<Login, DaemonError> {
    let token = |token: &Secret| {
        let is_sendable = !token.is_empty() && token.expose().bytes().all(|b| b.is_ascii_graphic());
        if is_sendable { Ok(token.clone()) } else { Err(DaemonError::BadLogin("a token is one word of ASCII")) }
    };
    match request {
        LoginRequest::Password { user, .. } if user.is_empty() || user.contains([':', '\n', '\r', '\0']) => {
            Err(DaemonError::BadLogin("a name has at least one sign, and neither a colon nor a line break"))
        }
        LoginRequest::Password { user, password } => {
            Ok(Login::Basic { user: user.clone(), password: password.0.clone() })
        }
        LoginRequest::IdentityToken(hidden) => Ok(Login::Identity(token(&hidden.0)?)),
        LoginRequest::RegistryToken(hidden) => Ok(Login::Bearer(token(&hidden.0)?)),
    }
}

fn report(entry: GivenEntry) -> CredentialsReport {
    let path = entry.server.path();
    CredentialsReport {
        registry: entry.server.host().to_owned(),
        repository: (!path.is_empty()).then(|| path.to_owned()),
        user: entry.user,
        kind: entry.kind.into(),
    }
}
