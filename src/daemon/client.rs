//! The other end of the control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::api::observe::{Activity, LogRules};
use super::api::{
    BlobfsRequest, Failure, ImageReport, Info, MountRequest, PrefetchReport, PrefetchRequest, PrefetchTarget,
    PullReport, PullRequest, RegisterRequest, ResolveReport, ResolveRequest, TraceReport, TraceRequest, TraceResult,
    UnmountRequest, Unmounted, UnregisterRequest, UpgradeRequest,
};
use super::control::SOCKET;

/// How long an answer may take that needs no work.
const PATIENCE: Duration = Duration::from_secs(30);

/// Talks to the daemon of one run directory.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    socket: PathBuf,
}

/// Why a daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("no daemon answers at {}; `rafsd serve` runs one", socket.display())]
    NoDaemon { socket: PathBuf },
    /// Somebody may answer, but not to this user.
    #[error("{} is not for this user; run as root", socket.display())]
    NotAllowed { socket: PathBuf },
    /// The socket cannot be used: its path is too long, or it is something else.
    #[error("cannot talk to a daemon at {}", socket.display())]
    Unusable {
        socket: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// It is there and says nothing.
    #[error("the daemon at {} does not answer within {} s; it may be stopped or stuck", socket.display(), PATIENCE.as_secs())]
    Silent { socket: PathBuf },
    /// The connection broke.
    #[error("the daemon at {} hung up", socket.display())]
    HungUp {
        socket: PathBuf,
        #[source]
        cause: reqwest::Error,
    },
    /// The daemon refused.
    #[error("{0}")]
    Refused(String),
    /// The answer makes no sense.
    #[error("the daemon at {} gave an answer that cannot be understood", socket.display())]
    Garbled {
        socket: PathBuf,
        #[source]
        cause: reqwest::Error,
    },
}

impl Client {
    /// A client for the daemon below `run`. Connects at the first request.
    pub fn new(run: &Path) -> reqwest::Result<Self> {
        crate::net::install_tls();
        let socket = run.join(SOCKET);
        let http = reqwest::Client::builder().unix_socket(socket.clone()).no_proxy().tls_certs_only([]).build()?;
        Ok(Self { http, socket })
    }

    /// Facts about the daemon.
    pub async fn info(&self) -> Result<Info, ClientError> {
        self.call(Method::GET, "info", &()).await
    }

    /// What it serves.
    pub async fn list(&self) -> Result<Vec<ImageReport>, ClientError> {
        self.call(Method::GET, "mounts", &()).await
    }

    /// Mounts an image; returns when it is usable.
    pub async fn mount(&self, request: &MountRequest) -> Result<ImageReport, ClientError> {
        self.call(Method::POST, "mounts", request).await
    }

    /// Shows a directory with blobs in it; returns when it is usable, and what is served there.
    pub async fn mount_blobfs(&self, request: &BlobfsRequest) -> Result<Vec<ImageReport>, ClientError> {
        self.call(Method::POST, "blobfs", request).await
    }

    /// Unmounts.
    pub async fn unmount(&self, request: &UnmountRequest) -> Result<Unmounted, ClientError> {
        self.call(Method::DELETE, "mounts", request).await
    }

    /// Begins a prefetch.
    pub async fn prefetch(&self, request: &PrefetchRequest) -> Result<PrefetchReport, ClientError> {
        self.call(Method::POST, "prefetch", request).await
    }

    /// How a prefetch is getting on.
    pub async fn get_prefetch(&self, id: u64) -> Result<PrefetchReport, ClientError> {
        self.call(Method::GET, &format!("prefetch/{id}"), &()).await
    }

    /// Stops all prefetches of an image; gives those that were under way.
    pub async fn cancel_prefetch(&self, target: &PrefetchTarget) -> Result<Vec<PrefetchReport>, ClientError> {
        self.call(Method::DELETE, "prefetch", target).await
    }

    /// Where a reference leads, and how it would be mounted.
    pub async fn resolve(&self, request: &ResolveRequest) -> Result<ResolveReport, ClientError> {
        self.call(Method::POST, "resolve", request).await
    }

    /// Begins to bring an image here whole.
    pub async fn pull(&self, request: &PullRequest) -> Result<PullReport, ClientError> {
        self.call(Method::POST, "pulls", request).await
    }

    /// How that is getting on.
    pub async fn get_pull(&self, id: u64) -> Result<PullReport, ClientError> {
        self.call(Method::GET, &format!("pulls/{id}"), &()).await
    }

    /// Stops that; what has come stays.
    pub async fn cancel_pull(&self, id: u64) -> Result<PullReport, ClientError> {
        self.call(Method::DELETE, &format!("pulls/{id}"), &()).await
    }

    /// Begins a trace.
    pub async fn start_trace(&self, request: &TraceRequest) -> Result<TraceReport, ClientError> {
        self.call(Method::POST, "trace", request).await
    }

    /// The traces under way.
    pub async fn list_traces(&self) -> Result<Vec<TraceReport>, ClientError> {
        self.call(Method::GET, "trace", &()).await
    }

    /// Ends a trace; gives what it recorded.
    pub async fn stop_trace(&self, target: &PrefetchTarget) -> Result<TraceResult, ClientError> {
        self.call(Method::DELETE, "trace", target).await
    }

    /// Makes an image known to the cachefiles backend.
    pub async fn register(&self, request: &RegisterRequest) -> Result<ImageReport, ClientError> {
        self.call(Method::POST, "images", request).await
    }

    /// Makes the cachefiles backend forget an image.
    pub async fn unregister(&self, request: &UnregisterRequest) -> Result<(), ClientError> {
        self.call(Method::DELETE, "images", request).await
    }

    /// What happened since its start, in numbers.
    pub async fn activity(&self) -> Result<Activity, ClientError> {
        self.call(Method::GET, "activity", &()).await
    }

    /// The rules by which it logs.
    pub async fn log_rules(&self) -> Result<LogRules, ClientError> {
        self.call(Method::GET, "log", &()).await
    }

    /// Lets it log by other rules; gives them back as it understood them.
    pub async fn set_log_rules(&self, rules: &LogRules) -> Result<LogRules, ClientError> {
        self.call(Method::PUT, "log", rules).await
    }

    /// Asks it to make room for another program.
    pub async fn upgrade(&self, request: &UpgradeRequest) -> Result<(), ClientError> {
        self.call(Method::POST, "upgrade", request).await
    }

    /// Asks it to unmount everything and exit.
    pub async fn stop(&self) -> Result<(), ClientError> {
        self.call(Method::POST, "stop", &()).await
    }

    fn no_answer(&self, cause: reqwest::Error) -> ClientError {
        let socket = self.socket.clone();
        // Looked at here because the library keeps the errno to itself.
        match UnixStream::connect(&socket) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => ClientError::NotAllowed { socket },
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                ClientError::NoDaemon { socket }
            }
            Err(cause) => ClientError::Unusable { socket, cause },
            Ok(_) if cause.is_timeout() => ClientError::Silent { socket },
            Ok(_) => ClientError::HungUp { socket, cause },
        }
    }

    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &(impl Serialize + Sync + ?Sized),
    ) -> Result<T, ClientError> {
        let garbled = |cause| ClientError::Garbled { socket: self.socket.clone(), cause };
        // The host is not looked at: the socket decides where this goes.
        let asks_only = method == Method::GET;
        let request = self.http.request(method, format!("http://rafsd/v1/{path}")).json(body);
        // What is only asked for is known at once; what is to be done may take its time.
        let request = if asks_only { request.timeout(PATIENCE) } else { request };
        let answer = request.send().await.map_err(|cause| self.no_answer(cause))?;
        if answer.status().is_success() {
            return answer.json().await.map_err(garbled);
        }
        let status = answer.status();
        let text = answer.text().await.map_err(garbled)?;
        let failure = serde_json::from_str::<Failure>(&text);
        Err(ClientError::Refused(failure.map_or_else(|_| format!("{status}: {text}"), |failure| failure.error)))
    }
}
