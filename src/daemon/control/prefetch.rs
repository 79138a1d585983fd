//! Prefetches over the control socket.

use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::get;

use super::{Body, Shared, blocking, body, nowhere};
use crate::daemon::api::{PrefetchRequest, PrefetchTarget};

pub(super) fn routes() -> Router<Shared> {
    Router::new().route("/v1/prefetch", get(list).post(start).delete(cancel)).route("/v1/prefetch/{id}", get(one))
}

async fn start(State(shared): State<Shared>, request: Body<PrefetchRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.prefetch(&request)).await
}

async fn list(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.list_prefetches())).await
}

async fn one(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    // Anything else than a number is the name of nothing.
    let Ok(id) = id.parse() else { return nowhere().await };
    blocking(shared, move |daemon| daemon.get_prefetch(id)).await
}

async fn cancel(State(shared): State<Shared>, request: Body<PrefetchTarget>) -> Response {
    let target = match body(request) {
        Ok(target) => target,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.cancel_prefetch(&target)).await
}
