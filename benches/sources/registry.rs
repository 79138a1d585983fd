//! A registry in this process: documents and blobs in memory, ranges, and a count of who asked for what.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::image::digest;

/// What a registry has, by path.
#[derive(Default)]
pub(crate) struct Content(HashMap<String, (String, Bytes)>);

impl Content {
    /// Lays down a blob; gives its descriptor without a media type.
    pub(crate) fn blob(&mut self, repository: &str, bytes: Bytes) -> Value {
        let descriptor = json!({"digest": digest(&bytes), "size": bytes.len()});
        let path = format!("/v2/{repository}/blobs/{}", digest(&bytes));
        self.0.insert(path, ("application/octet-stream".to_owned(), bytes));
        descriptor
    }

    /// Lays down a manifest by tag and digest.
    pub(crate) fn manifest(&mut self, repository: &str, tag: &str, kind: &str, bytes: Bytes) {
        for name in [tag, &digest(&bytes)] {
            self.0.insert(format!("/v2/{repository}/manifests/{name}"), (kind.to_owned(), bytes.clone()));
        }
    }
}

/// What it was asked, method, path and range, in the order of its coming.
pub(crate) type Asked = Vec<String>;

struct Shared {
    content: Content,
    asked: Mutex<Asked>,
    sent: AtomicU64,
}

/// A running registry, on a thread of its own, until it is dropped.
pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Registry {
    pub(crate) fn start(content: Content) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { content, asked: Mutex::default(), sent: AtomicU64::new(0) });
        let service = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("registry".into()).spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listening socket");
                tokio::select! {
                    _ = stopped => {}
                    _ = async { axum::serve(listener, service).await } => {}
                }
            });
        })?;
        Ok(Self { address, shared, running: Some((stop, thread)) })
    }

    /// What it was asked since this was called the last time.
    pub(crate) fn take_asked(&self) -> Asked {
        std::mem::take(&mut self.shared.asked.lock().unwrap())
    }
}

impl Registry {
    /// Bytes of bodies that it answered since this was called the last time.
    pub(crate) fn take_sent(&self) -> u64 {
        self.shared.sent.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let path = request.uri().path();
    let range = request.headers().get("range").and_then(|value| value.to_str().ok());
    shared.asked.lock().unwrap().push(format!("{} {path} {}", request.method(), range.unwrap_or_default()));
    let status = |status: u16| Response::builder().status(status);
    let Some((kind, bytes)) = shared.content.0.get(path) else {
        return status(404).body(Body::empty()).expect("a status");
    };
    let len = bytes.len();
    let answer = match range.map(|range| within(range, len)) {
        None => status(200).header("content-length", len),
        Some(None) => {
            return status(416).header("content-range", format!("bytes */{len}")).body(Body::empty()).expect("digits");
        }
        Some(Some((start, end))) => {
            shared.sent.fetch_add((end - start) as u64, Ordering::Relaxed);
            let place = format!("bytes {start}-{}/{len}", end - 1);
            let answer = status(206).header("content-range", place).header("content-length", end - start);
            return answer.header("content-type", kind).body(Body::from(bytes.slice(start..end))).expect("digits");
        }
    };
    let answer = answer.header("content-type", kind).header("docker-content-digest", digest_of(path, bytes));
    let body = if request.method() == "HEAD" { Body::empty() } else { Body::from(bytes.clone()) };
    answer.body(body).expect("digits")
}

/// The digest that a path names, or that of the document: nobody asks for a large one by tag.
fn digest_of(path: &str, bytes: &Bytes) -> String {
    match path.rsplit_once('/') {
        Some((_, name)) if name.starts_with("sha256:") => name.to_owned(),
        _ => digest(bytes),
    }
}

/// Start and end of `bytes=FIRST-LAST` in something of `len` bytes.
fn within(range: &str, len: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().unwrap_or(usize::MAX));
    (first < len && first <= last).then(|| (first, last.saturating_add(1).min(len)))
}
