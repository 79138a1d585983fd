//! Directories with blobs in them over the control socket.

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;

use super::{Body, Shared, awaited, body};
use crate::daemon::Daemon;
use crate::daemon::api::{BlobfsRequest, ImageReport};

pub(super) fn routes() -> Router<Shared> {
    Router::new().route("/v1/blobfs", post(mount))
}

async fn mount(State(shared): State<Shared>, request: Body<BlobfsRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    // All of them are in one mount.
    let undo = |daemon: &Daemon, reports: Vec<ImageReport>| {
        reports.first().and_then(|report| report.dir.as_ref()).into_iter().for_each(|dir| daemon.take_back(dir));
    };
    awaited(shared, move |daemon, asker| daemon.mount_blobfs(&request, asker), undo).await
}
