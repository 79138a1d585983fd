//! Whoever asked for something that takes its time. What nobody waits for any more is given up: because the client has
//! hung up, or because the daemon ends.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::{Daemon, DaemonError};
use crate::base::{BlobId, ByteRange};
use crate::source::{BlobSource, BoxFuture, ReadCtx, SourceError, Verdict};

/// Whoever asked, as those see it who do what was asked for.
#[derive(Clone, Debug)]
pub struct Asker {
    /// Closed when the client has gone; `None` if whoever asked stays.
    client: Option<watch::Receiver<()>>,
    /// Whether the daemon gives up what it has not done yet.
    daemon: watch::Receiver<bool>,
}

/// A client that waits. Dropping it tells that it has gone.
#[derive(Debug)]
pub(super) struct Waiting(#[expect(dead_code, reason = "its end is what it tells")] watch::Sender<()>);

impl Daemon {
    /// Somebody who waits for as long as it takes, or until the daemon ends.
    pub fn asker(&self) -> Asker {
        Asker { client: None, daemon: self.gives_up.subscribe() }
    }

    /// A client, and how those see it who work for it.
    pub(super) fn client(&self) -> (Waiting, Asker) {
        let (waiting, client) = watch::channel(());
        (Waiting(waiting), Asker { client: Some(client), ..self.asker() })
    }

    /// Gives up what somebody waits for and what is not done yet. Only before the end.
    pub(super) fn give_up(&self) {
        self.gives_up.send_replace(true);
    }
}

impl Asker {
    /// Whether it is a client that has gone.
    pub(super) fn has_left(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.has_changed().is_err())
    }

    /// Why what was asked for is to be given up, if it is.
    pub(super) fn refusal(&self) -> Option<DaemonError> {
        if *self.daemon.borrow() {
            return Some(DaemonError::Stopping);
        }
        self.has_left().then_some(DaemonError::Abandoned)
    }

    /// # Errors
    /// Why what was asked for is to be given up.
    pub(super) fn ensure_wanted(&self) -> Result<(), DaemonError> {
        self.refusal().map_or(Ok(()), Err)
    }

    /// Runs `work` on `runtime` for as long as it is wanted. Blocks.
    ///
    /// # Errors
    /// It was given up.
    pub(super) fn block_on<T>(&self, runtime: &Handle, work: impl Future<Output = T>) -> Result<T, DaemonError> {
        runtime.block_on(self.while_wanted(work)).ok_or_else(|| self.refusal().unwrap_or(DaemonError::Stopping))
    }

    /// What comes of `work`; `None` if it was given up.
    async fn while_wanted<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.end() => None,
        }
    }

    /// Waits until what was asked for is to be given up.
    async fn end(&self) {
        let client = async {
            match self.client.clone() {
                // Nothing is ever said over it.
                Some(mut client) => while client.changed().await.is_ok() {},
                None => std::future::pending().await,
            }
        };
        let mut daemon = self.daemon.clone();
        tokio::select! {
            () = client => {}
            // A daemon that is not there any more does nothing for anybody.
            _ = daemon.wait_for(|gives_up| *gives_up) => {}
        }
    }
}

/// A source that is asked for as long as somebody waits for the answers.
pub(super) struct WhileWanted {
    pub(super) source: Arc<dyn BlobSource>,
    pub(super) asker: Asker,
}

impl WhileWanted {
    async fn ask<T>(&self, blob: &BlobId, work: BoxFuture<'_, Result<T, SourceError>>) -> Result<T, SourceError> {
        let given_up = || SourceError::Unavailable {
            blob: blob.clone(),
            place: self.source.describe(),
            detail: "nobody waits for it any more".to_owned(),
        };
        self.asker.while_wanted(work).await.unwrap_or_else(|| Err(given_up()))
    }
}

impl BlobSource for WhileWanted {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(self.ask(blob, self.source.len(blob, ctx)))
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(self.ask(blob, self.source.read(blob, stored, ctx)))
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.ask(blob, self.source.stream(blob, stored, ctx, take)))
    }

    fn judged(&self, blob: &BlobId, stored: ByteRange, verdict: Verdict) {
        self.source.judged(blob, stored, verdict);
    }

    fn places(&self) -> usize {
        self.source.places()
    }

    fn describe(&self) -> String {
        self.source.describe()
    }
}

#[cfg(test)]
impl Asker {
    /// One who waits for ever.
    pub(super) fn patient() -> Self {
        Self { client: None, daemon: watch::channel(false).1 }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::base::Class;

    /// A client's asker with its two ends.
    fn asker() -> (Waiting, watch::Sender<bool>, Asker) {
        let (waiting, client) = watch::channel(());
        let (gives_up, daemon) = watch::channel(false);
        (Waiting(waiting), gives_up, Asker { client: Some(client), daemon })
    }

    /// Never answers.
    struct Dead;

    impl BlobSource for Dead {
        fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
            Box::pin(std::future::pending())
        }

        fn read<'a>(&'a self, _: &'a BlobId, _: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            Box::pin(std::future::pending())
        }

        fn describe(&self) -> String {
            "dead".to_owned()
        }
    }

    #[test]
    fn work_is_done_while_somebody_waits_and_given_up_then() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        for client_goes in [true, false] {
            let (waiting, gives_up, asker) = asker();
            asker.ensure_wanted().unwrap();
            assert_eq!(asker.block_on(runtime.handle(), async { 7 }).unwrap(), 7);

            let end = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                if client_goes {
                    drop(waiting);
                    return (None, gives_up);
                }
                gives_up.send_replace(true);
                (Some(waiting), gives_up)
            });
            let refused = asker.block_on(runtime.handle(), std::future::pending::<()>()).unwrap_err();
            let kept = end.join().unwrap();

            assert_eq!(matches!(refused, DaemonError::Abandoned), client_goes, "{refused:?}");
            assert_eq!(matches!(refused, DaemonError::Stopping), !client_goes, "{refused:?}");
            assert_eq!(asker.has_left(), client_goes);
            assert!(asker.ensure_wanted().is_err());
            drop(kept);
        }
    }

    #[test]
    fn a_source_is_not_waited_for_once_nobody_waits() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (waiting, _daemon, asker) = asker();
        let (source, blob) = (WhileWanted { source: Arc::new(Dead), asker }, "b".parse().unwrap());
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60));
        drop(waiting);

        let range = ByteRange::at(0, 1).unwrap();
        let mut take = |_| ();
        let outcomes = runtime.block_on(async {
            let (len, read) = (source.len(&blob, ctx).await, source.read(&blob, range, ctx).await);
            [len.map(drop), read.map(drop), source.stream(&blob, range, ctx, &mut take).await]
        });

        for outcome in outcomes {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("nobody waits for it any more"), "{error}");
        }
    }
}
