//! Traces over the control socket.

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::get;

use super::{Body, Shared, blocking, body};
use crate::daemon::api::{PrefetchTarget, TraceRequest};

pub(super) fn routes() -> Router<Shared> {
    Router::new().route("/v1/trace", get(list).post(start).delete(stop))
}

async fn start(State(shared): State<Shared>, request: Body<TraceRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.start_trace(&request)).await
}

async fn list(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.list_traces())).await
}

async fn stop(State(shared): State<Shared>, request: Body<PrefetchTarget>) -> Response {
    let target = match body(request) {
        Ok(target) => target,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.stop_trace(&target)).await
}
