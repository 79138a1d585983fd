//! What a client tells of credentials.

use reqwest::Method;

use super::api::{CredentialsReport, CredentialsRequest, CredentialsTarget};
use super::client::{Client, ClientError};

impl Client {
    /// Gives credentials to the daemon, in place of those for the same repositories.
    pub async fn set_credentials(&self, request: &CredentialsRequest) -> Result<CredentialsReport, ClientError> {
        self.call(Method::PUT, "credentials", request).await
    }

    /// Takes credentials away.
    pub async fn remove_credentials(&self, target: &CredentialsTarget) -> Result<(), ClientError> {
        self.call(Method::DELETE, "credentials", target).await
    }

    /// What was given, without secrets.
    pub async fn list_credentials(&self) -> Result<Vec<CredentialsReport>, ClientError> {
        self.call(Method::GET, "credentials", &()).await
    }
}
