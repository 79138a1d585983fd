//! A token server on loopback that does what a test says and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use tokio::sync::Semaphore;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub method: String,
    pub uri: String,
    pub authorization: Option<String>,
    pub body: String,
}

/// What the next answers are.
#[derive(Clone, Debug)]
pub enum Answer {
    /// A token with a number, in force for so many seconds.
    Token(u64),
    /// This body.
    Body(String),
    Status(u16),
    /// A busy server that names a pause in seconds.
    Busy(u64),
    Redirect(String),
    /// Only for this value of `Authorization`; 401 for others.
    OnlyFor(String),
}

pub struct TokenServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    answer: Mutex<Answer>,
    asked: Mutex<Vec<Asked>>,
    /// Answers wait for a permit each.
    gate: Semaphore,
}

impl TokenServer {
    pub async fn start(answer: Answer) -> Self {
        let gate = Semaphore::new(Semaphore::MAX_PERMITS);
        let shared = Arc::new(Shared { answer: Mutex::new(answer), asked: Mutex::default(), gate });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port of loopback");
        let address = listener.local_addr().expect("its address");
        let router = Router::new().fallback(answer_one).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, shared }
    }

    pub fn set(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap() = answer;
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.asked().len()
    }

    /// Has requests wait until [`TokenServer::open`].
    pub fn close(&self) {
        self.shared.gate.forget_permits(Semaphore::MAX_PERMITS);
    }

    pub fn open(&self) {
        self.shared.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    /// Ends when it has been asked `count` times.
    pub async fn until_asked(&self, count: usize) {
        while self.count() < count {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    /// A challenge that names this server.
    pub fn challenge(&self) -> String {
        format!("Bearer realm=\"http://{}/token\",service=\"registry\"", self.address)
    }
}

async fn answer_one(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let authorization = headers.get("authorization").map(|value| value.to_str().expect("text").to_owned());
    let number = {
        let mut asked = shared.asked.lock().unwrap();
        asked.push(Asked {
            method: method.to_string(),
            uri: uri.to_string(),
            authorization: authorization.clone(),
            body: String::from_utf8_lossy(&body).into_owned(),
        });
        asked.len()
    };
    let _permit = shared.gate.acquire().await;
    let token = |seconds: u64| {
        let issued = "1970-01-01T00:00:00Z";
        format!(r#"{{"token":"t{number}","access_token":"t{number}","expires_in":{seconds},"issued_at":"{issued}"}}"#)
    };
    let answer = shared.answer.lock().unwrap().clone();
    match answer {
        Answer::Token(seconds) => token(seconds).into_response(),
        Answer::Body(body) => body.into_response(),
        Answer::Status(status) => StatusCode::from_u16(status).expect("a status").into_response(),
        Answer::Busy(seconds) => {
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", seconds.to_string())]).into_response()
        }
        Answer::Redirect(to) => (StatusCode::TEMPORARY_REDIRECT, [("location", to)]).into_response(),
        Answer::OnlyFor(value) if authorization.as_deref() == Some(&value) => token(300).into_response(),
        Answer::OnlyFor(_) => StatusCode::UNAUTHORIZED.into_response(),
    }
}
