//! The daemon behind a Unix socket: JSON over HTTP, so that `curl --unix-socket` works too.

mod awaited;
mod blobfs;
mod cache;
mod connections;
mod credentials;
mod observe;
mod peer;
mod prefetch;
mod registry;
mod trace;

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinError;

use self::awaited::awaited;
use self::connections::{MOST_BODY, PATIENCE, TRUSTED};
use self::peer::Peer;
use super::api::{
    Failure, ImageReport, MountRequest, RegisterRequest, UnmountRequest, UnregisterRequest, UpgradeRequest,
};
use super::{Daemon, DaemonError, Ending};
use crate::base::Chain;
use crate::export::AttachError;
use crate::reader::MapError;
use crate::reader::tarfile::TarFileError;
use crate::telemetry::logging::LogControl;

/// Name of the control socket in the run directory.
pub const SOCKET: &str = "rafsd.sock";

/// How long requests under way have to end once the daemon is asked to stop.
pub const GRACE: Duration = Duration::from_secs(5);

/// How long those then have to hear that what they asked for was given up.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The listening socket.
pub struct Control {
    listener: UnixListener,
    file: SocketFile,
    log: LogControl,
    metrics: Option<TcpListener>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("listener", &self.listener).field("file", &self.file).finish_non_exhaustive()
    }
}

/// The socket's name, removed with this value; nothing for a socket of somebody else.
#[derive(Debug)]
struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

#[derive(Clone)]
struct Shared {
    daemon: Arc<Daemon>,
    stop: Arc<Notify>,
    log: LogControl,
}

impl Control {
    /// Listens below `run`, for root only. Must be called on the runtime. Whoever succeeds a daemon knows
    /// that it has gone: what still answers are the descriptors of a process that is being ended.
    ///
    /// # Errors
    /// `AddrInUse` if another daemon answers there.
    pub fn bind(run: &Path, succeeds: bool) -> io::Result<Self> {
        let path = run.join(SOCKET);
        if !succeeds && std::os::unix::net::UnixStream::connect(&path).is_ok() {
            let text = format!("a daemon answers at {} already", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let file = SocketFile(Some(path.clone()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self::over(listener, file))
    }

    /// Listens on a socket that a service manager made, and that stays its own. Must be called on
    /// the runtime.
    ///
    /// # Errors
    /// `InvalidInput` if it is no listening Unix stream socket.
    pub fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let listens = getsockopt(&socket, sockopt::AcceptConn).unwrap_or(false);
        let is_stream = getsockopt(&socket, sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream);
        let listener = std::os::unix::net::UnixListener::from(socket);
        if !listens || !is_stream || listener.local_addr().is_err() {
            let text = "the socket that was handed over is no listening Unix stream socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        listener.set_nonblocking(true)?;
        Ok(Self::over(UnixListener::from_std(listener)?, SocketFile(None)))
    }

    fn over(listener: UnixListener, file: SocketFile) -> Self {
        Self { listener, file, log: LogControl::silent(), metrics: None }
    }

    /// Lets clients change what `log` logs.
    #[must_use]
    pub fn with_log(self, log: LogControl) -> Self {
        Self { log, ..self }
    }

    /// Answers `GET /metrics` on `listener` as well, to whoever asks: it must be of the loopback
    /// interface.
    #[must_use]
    pub fn with_metrics(self, listener: Option<TcpListener>) -> Self {
        Self { metrics: listener, ..self }
    }

    /// Answers requests until `stop` is notified, or, where `idle` is given, until the daemon has
    /// had nothing to serve for that long. Requests under way then have [`GRACE`] to end; another
    /// notice of `stop` cuts that short.
    pub async fn serve(self, daemon: Arc<Daemon>, stop: Arc<Notify>, idle: Option<Duration>) -> io::Result<()> {
        let shared = Shared { daemon: daemon.clone(), stop: stop.clone(), log: self.log };
        let router = Router::new()
            .route("/v1/info", get(info))
            .route("/v1/mounts", get(list).post(mount).delete(unmount))
            .route("/v1/images", post(register).delete(unregister))
            .route("/v1/stop", post(request_stop))
            .route("/v1/upgrade", post(upgrade))
            .merge(observe::routes())
            .merge(blobfs::routes())
            .merge(prefetch::routes())
            .merge(trace::routes())
            .merge(registry::routes())
            .merge(credentials::routes())
            .merge(cache::routes())
            .fallback(nowhere)
            .method_not_allowed_fallback(wrong_method)
            .layer(middleware::from_fn_with_state(PATIENCE, connections::take_in))
            .layer(DefaultBodyLimit::max(MOST_BODY))
            .layer(middleware::from_fn(peer::admit))
            .with_state(shared);
        let of_peer = move |stream: &UnixStream| router.clone().layer(Extension(ConnectInfo(Peer::of(stream))));
        let metrics = async {
            match self.metrics {
                Some(listener) => observe::serve_metrics(listener, daemon.clone()).await,
                None => std::future::pending().await,
            }
        };
        let file = self.file;
        let (tell, told) = oneshot::channel();
        let (again, watched, asked) = (stop.clone(), daemon.clone(), daemon.clone());
        let until = async move {
            match idle {
                Some(idle) => tokio::select! { () = stop.notified() => {}, () = idle_for(watched, idle) => {} },
                None => stop.notified().await,
            }
            // Gone before the daemon is: whoever comes now starts another one and waits for us.
            drop(file);
            let _ = tell.send(());
        };
        let cut = async move {
            // An error means that nobody will tell: serving has ended by itself.
            if told.await.is_err() {
                return std::future::pending().await;
            }
            tokio::select! { () = tokio::time::sleep(GRACE) => {}, () = again.notified() => {} }
            asked.give_up();
            tokio::time::sleep(LAST_WORDS).await;
            tracing::warn!("a client does not end its request; stopping all the same");
        };
        tokio::select! {
            served = connections::serve(self.listener, of_peer, TRUSTED, until) => served,
            () = cut => Ok(()),
            ended = metrics => ended,
        }
    }
}

async fn idle_for(daemon: Arc<Daemon>, idle: Duration) {
    let mut calm = 0u32;
    let step = Duration::from_millis(100);
    while step * calm < idle {
        tokio::time::sleep(step).await;
        calm = if daemon.is_idle() { calm + 1 } else { 0 };
    }
}

/// Runs `work`, which blocks, off the runtime's own threads.
async fn blocking<T, F>(shared: Shared, work: F) -> Response
where
    T: Serialize + Send + 'static,
    F: FnOnce(&Arc<Daemon>) -> Result<T, DaemonError> + Send + 'static,
{
    answer(tokio::task::spawn_blocking(move || work(&shared.daemon)).await)
}

/// What came of work that a client asked for, as the answer.
fn answer<T: Serialize>(outcome: Result<Result<T, DaemonError>, JoinError>) -> Response {
    match outcome {
        Ok(Ok(value)) => Json(value).into_response(),
        Ok(Err(error)) => failure(status(&error), Chain(&error).to_string()),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn failure(status: StatusCode, error: String) -> Response {
    tracing::warn!(%status, error, "request refused");
    (status, Json(Failure { error })).into_response()
}

fn status(error: &DaemonError) -> StatusCode {
    match error {
        DaemonError::Oci(error) | DaemonError::Unresolved { cause: error, .. } => registry::status(error),
        DaemonError::NotMounted(_)
        | DaemonError::NotRegistered(_)
        | DaemonError::NoImage(_)
        | DaemonError::NoPrefetch(_)
        | DaemonError::NoPull(_)
        | DaemonError::NoCredentials(_)
        | DaemonError::NotTraced(_) => StatusCode::NOT_FOUND,
        DaemonError::Mounted(_)
        | DaemonError::Unmount { .. }
        | DaemonError::Covered(_)
        | DaemonError::Attach(AttachError::Taken(_))
        | DaemonError::Contradiction { .. }
        | DaemonError::SeveralImages(_)
        | DaemonError::SeveralAt(_)
        | DaemonError::BlobTwice(_)
        | DaemonError::NotOpen(_)
        | DaemonError::TooManyPrefetches(_)
        | DaemonError::Traced(_)
        | DaemonError::TooManyTraces
        | DaemonError::TooManyPulls => StatusCode::CONFLICT,
        DaemonError::NotADirectory(_)
        | DaemonError::OwnPlace(_)
        | DaemonError::Settings(_)
        | DaemonError::Spec(_)
        | DaemonError::NotARegistry
        | DaemonError::BadLogin(_)
        | DaemonError::Relative(_)
        | DaemonError::NoTarget
        | DaemonError::NoImages
        | DaemonError::Blobfs { .. }
        | DaemonError::Image(_)
        | DaemonError::Attach(AttachError::Name { .. })
        | DaemonError::Bootstrap(_)
        | DaemonError::Load(_)
        | DaemonError::Tables(_)
        | DaemonError::Map(MapError::Tables(_))
        | DaemonError::TarFile(TarFileError::Unnamed { .. } | TarFileError::Differs { .. })
        | DaemonError::Reach(_)
        | DaemonError::SourceSpec(_)
        | DaemonError::NoBackend { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        DaemonError::Stock(error) => cache::status(error),
        DaemonError::Crowded => StatusCode::BAD_GATEWAY,
        // Nobody hears the second one.
        DaemonError::Stopping | DaemonError::Abandoned => StatusCode::SERVICE_UNAVAILABLE,
        DaemonError::NoSuccessor => StatusCode::CONFLICT,
        DaemonError::Io { .. }
        | DaemonError::Record { .. }
        | DaemonError::Start { .. }
        | DaemonError::Map(MapError::Fetch { .. })
        | DaemonError::TarFile(TarFileError::Read { .. })
        | DaemonError::Store(_)
        | DaemonError::Attach(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A request's body, or why there is none.
type Body<T> = Result<Json<T>, JsonRejection>;

/// Every refusal has the same form, those of the framework too.
#[expect(clippy::result_large_err, reason = "handed on at once as the answer")]
fn body<T>(request: Body<T>) -> Result<T, Response> {
    request.map(|Json(request)| request).map_err(|rejection| failure(rejection.status(), rejection.body_text()))
}

async fn wrong_method() -> Response {
    failure(StatusCode::METHOD_NOT_ALLOWED, "this cannot be done here; docs/CONTROL.md lists what can".to_owned())
}

async fn nowhere() -> Response {
    failure(StatusCode::NOT_FOUND, "there is nothing here; docs/CONTROL.md lists what there is".to_owned())
}

async fn info(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.info())).await
}

async fn list(State(shared): State<Shared>) -> Response {
    blocking(shared, |daemon| Ok(daemon.list())).await
}

async fn mount(State(shared): State<Shared>, request: Body<MountRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    let undo = |daemon: &Daemon, report: ImageReport| report.dir.iter().for_each(|dir| daemon.take_back(dir));
    awaited(shared, move |daemon, asker| daemon.mount(&request, asker), undo).await
}

async fn unmount(State(shared): State<Shared>, request: Body<UnmountRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.unmount(&request.dir, request.lazy)).await
}

async fn register(State(shared): State<Shared>, request: Body<RegisterRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    let (id, domain) = (request.id.clone(), request.domain.clone());
    // Somebody else may have been faster.
    let undo = move |daemon: &Daemon, _: ImageReport| drop(daemon.unregister(&id, domain.as_deref()));
    awaited(shared, move |daemon, asker| daemon.register(&request, asker), undo).await
}

async fn unregister(State(shared): State<Shared>, request: Body<UnregisterRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    blocking(shared, move |daemon| daemon.unregister(&request.id, request.domain.as_deref())).await
}

async fn upgrade(State(shared): State<Shared>, request: Body<UpgradeRequest>) -> Response {
    let request = match body(request) {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    let stop = shared.stop.clone();
    blocking(shared, move |daemon| {
        daemon.set_successor(&request.program)?;
        daemon.ask_to(Ending::Upgrade);
        stop.notify_one();
        Ok(())
    })
    .await
}

async fn request_stop(State(shared): State<Shared>) -> Response {
    shared.daemon.ask_to(Ending::Stop);
    shared.stop.notify_one();
    Json(()).into_response()
}
