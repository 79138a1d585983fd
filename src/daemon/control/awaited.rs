//! What is of use to nobody but the client that asked for it. Once that has hung up it is given up, and undone if it was
//! done by then.
//!
//! hyper drops the future of a request when its client closes the connection, and that is how it is noticed. What is
//! written to a client's socket counts as answered: nobody can tell whether it was read.

use std::sync::Arc;

use axum::response::Response;
use serde::Serialize;
use tokio::runtime::Handle;

use super::{Shared, answer};
use crate::daemon::{Asker, Daemon, DaemonError};

/// Runs `work`, which blocks and may look at whether its asker is still there, off the runtime's own threads. If what
/// comes of it reaches nobody, `undo` gets it.
pub(super) async fn awaited<T, W, U>(shared: Shared, work: W, undo: U) -> Response
where
    T: Serialize + Send + 'static,
    W: FnOnce(&Arc<Daemon>, &Asker) -> Result<T, DaemonError> + Send + 'static,
    U: FnOnce(&Daemon, T) + Send + 'static,
{
    let daemon = shared.daemon;
    // Dropped with this future.
    let (_waiting, asker) = daemon.client();
    let undoing = daemon.clone();
    let undo = move |done| undo(&undoing, done);
    answer_awaited(move || work(&daemon, &asker), undo).await
}

async fn answer_awaited<T, U>(work: impl FnOnce() -> Result<T, DaemonError> + Send + 'static, undo: U) -> Response
where
    T: Serialize + Send + 'static,
    U: FnOnce(T) + Send + 'static,
{
    let runtime = Handle::current();
    let work = move || match work() {
        Ok(done) => Ok(Untold { done: Some((done, undo)), runtime }),
        Err(error) => {
            if matches!(error, DaemonError::Abandoned) {
                tracing::info!("a client has hung up, and what it asked for was given up");
            }
            Err(error)
        }
    };
    let outcome = tokio::task::spawn_blocking(work).await;
    answer(outcome.map(|outcome| outcome.map(Untold::tell)))
}

/// Something that was done, and that nobody has been told of. Dropped so, it is undone.
struct Untold<T, U>
where
    T: Send + 'static,
    U: FnOnce(T) + Send + 'static,
{
    /// Empty once it was told.
    done: Option<(T, U)>,
    runtime: Handle,
}

impl<T, U> Untold<T, U>
where
    T: Send + 'static,
    U: FnOnce(T) + Send + 'static,
{
    fn tell(mut self) -> T {
        self.done.take().expect("it is told once").0
    }
}

impl<T, U> Drop for Untold<T, U>
where
    T: Send + 'static,
    U: FnOnce(T) + Send + 'static,
{
    fn drop(&mut self) {
        if let Some((done, undo)) = self.done.take() {
            tracing::info!("a client has hung up, and what it asked for is undone");
            // Perhaps on a thread that must not block.
            drop(self.runtime.spawn_blocking(move || undo(done)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// Work that ends with 7 when it is let.
    fn work() -> (Sender<()>, impl FnOnce() -> Result<u32, DaemonError> + Send) {
        let (let_end, end) = channel();
        let work = move || {
            end.recv().unwrap();
            Ok(7)
        };
        (let_end, work)
    }

    /// What hears of the undoing.
    fn undo() -> (Receiver<u32>, impl FnOnce(u32) + Send) {
        let (tell, undone) = channel();
        (undone, move |done| tell.send(done).unwrap())
    }

    /// Polls once what has not ended yet.
    fn begin(future: std::pin::Pin<&mut impl Future<Output = Response>>) {
        assert!(future.poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_client_is_told_of_stays() {
        let ((let_end, work), (undone, undo)) = (work(), undo());
        let_end.send(()).unwrap();

        let response = answer_awaited(work, undo).await;

        assert_eq!(response.status(), 200);
        assert!(undone.recv().is_err(), "whoever could undo it is gone");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_done_for_a_client_that_has_gone_is_undone() {
        for is_done_before in [true, false] {
            let ((let_end, work), (undone, undo)) = (work(), undo());
            {
                let mut future = pin!(answer_awaited(work, undo));
                begin(future.as_mut());
                if is_done_before {
                    let_end.send(()).unwrap();
                    // Not looked at any more, done or almost done.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            if !is_done_before {
                let_end.send(()).unwrap();
            }
            assert_eq!(undone.recv_timeout(SOON), Ok(7), "done before: {is_done_before}");
        }
    }
}
