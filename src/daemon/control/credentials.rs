//! Credentials over the control socket. They go in; only names come out.

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::get;

use super::{Body, Shared, blocking, failure};
use crate::daemon::api::{CredentialsRequest, CredentialsTarget};

pub(super) fn routes() -> Router<Shared> {
    Router::new().route("/v1/credentials", get(list).put(set).delete(remove))
}

/// As [`super::body`], but what was wrong is not repeated: it may be a password in the wrong place.
#[expect(clippy::result_large_err, reason = "handed on at once as the answer")]
fn body<T>(request: Body<T>) -> Result<T, Response> {
    let text = "the request is not of the form that docs/CONTROL.md describes";
    request.map(|axum::Json(request)| request).map_err(|rejection| failure(rejection.status(), text.to_owned()))
}

async fn list(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.list_credentials())).await
}

async fn set(State(shared): State<Shared>, request: Body<CredentialsRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.set_credentials(&request)).await
}

async fn remove(State(shared): State<Shared>, request: Body<CredentialsTarget>) -> Response {
    let target = match body(request) {
        Ok(target) => target,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.remove_credentials(&target)).await
}
