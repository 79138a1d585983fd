//! Images in registries, over the control socket.

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};

use super::{Body, Shared, awaited, blocking, body, nowhere};
use crate::daemon::api::{PullRequest, ResolveRequest};
use crate::oci::OciError;

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/v1/resolve", post(resolve))
        .route("/v1/pulls", get(list).post(pull))
        .route("/v1/pulls/{id}", get(one).delete(cancel))
}

async fn resolve(State(shared): State<Shared>, request: Body<ResolveRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    awaited(shared, move |daemon, asker| daemon.resolve(&request, asker), |_, _| ()).await
}

async fn pull(State(shared): State<Shared>, request: Body<PullRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.pull(&request)).await
}

async fn list(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.list_pulls())).await
}

async fn one(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    // Anything else than a number is the name of nothing.
    let Ok(id) = id.parse() else { return nowhere().await };
    blocking(shared, move |daemon| daemon.get_pull(id)).await
}

async fn cancel(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    let Ok(id) = id.parse() else { return nowhere().await };
    blocking(shared, move |daemon| daemon.cancel_pull(id)).await
}

/// What a failure to find or to take an image is: ours, the registry's, or of what was asked for.
pub(super) fn status(error: &OciError) -> StatusCode {
    match error {
        OciError::NotFound { .. } | OciError::Unknown { .. } => StatusCode::NOT_FOUND,
        OciError::Refused { .. }
        | OciError::Fetch(_)
        | OciError::Failed { .. }
        | OciError::Forged { .. }
        | OciError::Length { .. } => StatusCode::BAD_GATEWAY,
        OciError::Document { .. }
        | OciError::TooDeep { .. }
        | OciError::NoManifest { .. }
        | OciError::NoPlatform { .. }
        | OciError::NotRafs { .. }
        | OciError::Unsupported { .. }
        | OciError::Bootstrap { .. }
        | OciError::Stranger { .. } => StatusCode::UNPROCESSABLE_ENTITY,
    }
}
