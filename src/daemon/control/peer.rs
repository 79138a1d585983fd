//! Who may talk to the daemon: root, and the user that it runs as.
//!
//! The socket's mode and directory say so already. This says it again, for when somebody has loosened
//! them: whoever can mount can put any file anywhere.

use axum::extract::{ConnectInfo, Request};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use tokio::net::UnixStream;

use super::failure;

/// Who is at the other end of a connection, as the kernel knows it since it was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    uid: Option<u32>,
}

impl Peer {
    pub(super) fn of(stream: &UnixStream) -> Self {
        Self { uid: stream.peer_cred().ok().map(|peer| peer.uid()) }
    }

    fn may_control(self, own: u32) -> bool {
        self.uid.is_some_and(|uid| uid == 0 || uid == own)
    }
}

/// Lets a request through if its sender may control the daemon.
pub(super) async fn admit(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.may_control(nix::unistd::geteuid().as_raw()) {
        return next.run(request).await;
    }
    let who = peer.uid.map_or("a stranger".to_owned(), |uid| format!("user {uid}"));
    let error = format!("{who} may not control this daemon; only root and the user it runs as may");
    failure(StatusCode::FORBIDDEN, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_oneself_may_and_nobody_else() {
        let may = |uid, own| Peer { uid }.may_control(own);
        assert!(may(Some(0), 0) && may(Some(0), 1000) && may(Some(1000), 1000));
        assert!(!may(Some(1000), 0) && !may(Some(1001), 1000) && !may(None, 0));
    }
}
