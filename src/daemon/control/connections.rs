//! Connections of clients: so many at once, each with a time by which it must have said what it wants.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{FromRequest as _, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;

use super::failure;

/// How a listener treats those who connect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manners {
    /// How long each may take for the head of a request.
    pub(super) patience: Duration,
    /// Most connections at once; further ones wait to be taken.
    pub(super) most: usize,
    /// When a connection is cut, whatever is under way over it.
    pub(super) longest: Option<Duration>,
}

/// For those who may control the daemon, and wait long for what they asked.
pub(super) const TRUSTED: Manners = Manners { patience: PATIENCE, most: Semaphore::MAX_PERMITS, longest: None };

/// For whoever reaches the address.
pub(super) const ANYBODY: Manners = Manners { patience: PATIENCE, most: 64, longest: Some(Duration::from_secs(30)) };

/// How long a client may take for the head of a request, counted from when it could have begun; and again for
/// its body.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes of a request: a list of everything in a large image that is to be prefetched.
pub(super) const MOST_BODY: usize = 128 << 20;

/// Answers who connects to `listener` until `until` is over, and then those whose requests are under way. `router`
/// is what answers a connection.
///
/// # Errors
/// None: what goes wrong with a connection ends that one. The type is that of whatever else may end serving.
pub(super) async fn serve<L: Listener>(
    mut listener: L,
    router: impl Fn(&L::Io) -> Router,
    manners: Manners,
    until: impl Future<Output = ()>,
) -> io::Result<()> {
    let (graceful, slots) = (GracefulShutdown::new(), Arc::new(Semaphore::new(manners.most)));
    let mut until = pin!(until);
    loop {
        let next = async {
            let slot = slots.clone().acquire_owned().await.expect("nobody closes it");
            (listener.accept().await.0, slot)
        };
        let (stream, slot) = tokio::select! { next = next => next, () = &mut until => break };
        let service = TowerToHyperService::new(router(&stream));
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(manners.patience);
        let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            let longest = manners.longest.unwrap_or(Duration::MAX);
            match tokio::time::timeout(longest, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a client's connection has ended"),
                Err(_) => tracing::debug!("a client's connection was cut: it took too long"),
            }
            drop(slot);
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// Takes in the body of a request, for which it has `patience`, before anybody acts on it.
pub(super) async fn take_in(State(patience): State<Duration>, request: Request, next: Next) -> Response {
    if request.body().size_hint().lower() > MOST_BODY as u64 {
        return failure(StatusCode::PAYLOAD_TOO_LARGE, format!("a request has at most {MOST_BODY} bytes"));
    }
    let (head, body) = request.into_parts();
    let whole = Bytes::from_request(Request::from_parts(head.clone(), body), &());
    match tokio::time::timeout(patience, whole).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(head, Body::from(bytes))).await,
        Ok(Err(rejection)) => failure(rejection.status(), rejection.body_text()),
        Err(_) => {
            let text = format!("the request did not arrive within {} s", patience.as_secs_f64());
            failure(StatusCode::REQUEST_TIMEOUT, text)
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::middleware;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    /// All that a server answers to `request`, until it hangs up.
    async fn answer(request: &str, patience: Duration) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let router = Router::new()
            .fallback(|body: String| async move { format!("heard {body}") })
            .layer(middleware::from_fn_with_state(patience, take_in));
        let server = tokio::spawn(serve(
            listener,
            move |_| router.clone(),
            Manners { patience, ..TRUSTED },
            std::future::pending(),
        ));
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // Nothing else ends this read, since the client does not hang up.
        client.read_to_string(&mut answer).await.unwrap();
        server.abort();
        answer
    }

    #[tokio::test]
    async fn who_does_not_say_what_he_wants_is_hung_up_on() {
        for request in ["", "POST / HTT", "POST / HTTP/1.1\r\nHost: localhost\r\n"] {
            let answer = answer(request, SHORT).await;
            assert!(!answer.contains("heard"), "{request:?}: {answer}");
        }
        let answer = answer("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf", SHORT).await;
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("within 0.1 s"), "{answer}");
    }

    #[tokio::test]
    async fn whole_requests_are_answered_one_after_the_other() {
        let request = "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n";
        let both = format!("{request}\r\none{request}Connection: close\r\n\r\ntwo");
        let answer = answer(&both, PATIENCE).await;
        assert!(answer.contains("heard one") && answer.contains("heard two"), "{answer}");
    }

    /// Who never reads what he asked for is in nobody's way for long.
    #[tokio::test]
    async fn who_reads_nothing_is_cut_off_and_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let router = Router::new().fallback(|| async { "x".repeat(1 << 20) });
        let manners = Manners { patience: PATIENCE, most: 1, longest: Some(SHORT) };
        let server = tokio::spawn(serve(listener, move |_| router.clone(), manners, std::future::pending()));
        let mut idler = UnixStream::connect(&path).await.unwrap();
        idler.write_all(&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(64)).await.unwrap();

        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut first = [0; 12];
        client.read_exact(&mut first).await.unwrap();

        assert_eq!(&first, b"HTTP/1.1 200");
        server.abort();
    }

    #[tokio::test]
    async fn what_is_too_long_is_refused() {
        let answer = answer(
            "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\nConnection: close\r\n\r\nhalf",
            PATIENCE,
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
}
