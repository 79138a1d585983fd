//! `/v1/cache`: what is in the cache, and what may be done to it.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{delete, get, post, put};

use super::{Body, Shared, blocking, body};
use crate::cache::StockError;
use crate::daemon::api::{BlobRequest, GcRequest, PinRequest};

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/v1/cache", get(report))
        .route("/v1/cache/usage", get(usage))
        .route("/v1/cache/gc", post(collect))
        .route("/v1/cache/verify", post(verify))
        .route("/v1/cache/pins", put(pin))
        .route("/v1/cache/blobs", delete(drop_blob))
}

pub(super) fn status(error: &StockError) -> StatusCode {
    match error {
        StockError::Unknown(_) => StatusCode::NOT_FOUND,
        StockError::InUse(_) | StockError::Pinned(_) => StatusCode::CONFLICT,
        StockError::Ambiguous(_) => StatusCode::UNPROCESSABLE_ENTITY,
        StockError::UsesUnknown => StatusCode::SERVICE_UNAVAILABLE,
        StockError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn report(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| daemon.cache_report()).await
}

async fn usage(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| daemon.cache_usage()).await
}

async fn collect(State(shared): State<Shared>, request: Body<GcRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.collect(&request)).await
}

async fn verify(State(shared): State<Shared>, request: Body<BlobRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.verify(&request.blob)).await
}

async fn pin(State(shared): State<Shared>, request: Body<PinRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.pin(&request.blob, request.pinned)).await
}

async fn drop_blob(State(shared): State<Shared>, request: Body<BlobRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.drop_blob(&request.blob)).await
}
