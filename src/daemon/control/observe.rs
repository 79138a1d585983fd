//! Requests that ask how the daemon is doing, and how much it logs.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use super::connections::ANYBODY;
use super::{Body, Daemon, Shared, blocking, body, connections, failure, nowhere, wrong_method};
use crate::daemon::api::observe::LogRules;
use crate::telemetry::CONTENT_TYPE;

/// The routes of this file.
pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/metrics", get(|State(shared): State<Shared>| metrics(shared.daemon)))
        .route("/v1/activity", get(activity))
        .route("/v1/log", get(log).put(set_log))
}

async fn activity(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.activity())).await
}

async fn metrics(daemon: Arc<Daemon>) -> Response {
    match tokio::task::spawn_blocking(move || daemon.metrics()).await {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn log(State(shared): State<Shared>) -> Response {
    Json(LogRules { level: shared.log.rules() }).into_response()
}

async fn set_log(State(shared): State<Shared>, request: Body<LogRules>) -> Response {
    let wanted = match body(request) {
        Ok(wanted) => wanted,
        Err(refusal) => return refusal,
    };
    if let Err(error) = shared.log.set(&wanted.level) {
        return failure(StatusCode::UNPROCESSABLE_ENTITY, error.to_string());
    }
    let level = shared.log.rules();
    tracing::info!(level, "logs by other rules from now on");
    Json(LogRules { level }).into_response()
}

/// Answers `GET /metrics` and nothing else on `listener`, without end. Nobody is asked who they are,
/// so it must be one of the loopback interface.
pub(super) async fn serve_metrics(listener: TcpListener, daemon: Arc<Daemon>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let router = Router::new()
        .route("/metrics", get(|State(daemon): State<Arc<Daemon>>| metrics(daemon)))
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .with_state(daemon);
    let listener = tokio::net::TcpListener::from_std(listener)?;
    connections::serve(listener, |_| router.clone(), ANYBODY, std::future::pending()).await
}
