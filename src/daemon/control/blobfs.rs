//! Directories with blobs in them over the control socket.

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;

use super::{Body, Shared, blocking, body};
use crate::daemon::api::BlobfsRequest;

pub(super) fn routes() -> Router<Shared> {
    Router::new().route("/v1/blobfs", post(mount))
}

async fn mount(State(shared): State<Shared>, request: Body<BlobfsRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.mount_blobfs(&request)).await
}
