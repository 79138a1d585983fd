//! Against a server that says whatever a case wants; a real one is in `tests/objects.rs`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;
use crate::base::Class;

/// Answers each request with what `answer` makes of its head, and tells the heads.
fn server(answer: impl Fn(&str) -> String + Send + 'static) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let head: String = lines.take_while(|line| !line.is_empty()).map(|line| line + "\n").collect();
            let reply = answer(&head);
            let _ = stream.write_all(reply.as_bytes());
            if tell.send(head).is_err() {
                return;
            }
        }
    });
    (address, told)
}

fn reply(status: &str, headers: &str, body: &str) -> String {
    let len =
        if headers.contains("Content-Length") { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    format!(
        "HTTP/1.1 {status}\r\n{len}Last-Modified: Tue, 15 Nov 1994 12:45:26 GMT\r\nETag: \"a\"\r\n{headers}Connection: close\r\n\r\n{body}"
    )
}

fn part(body: &str) -> String {
    reply("206 Partial Content", "Content-Range: bytes 2-5/10\r\n", body)
}

async fn pour(upstream: &ObjectUpstream) -> Result<String, Failure> {
    let mut all = Vec::new();
    let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60));
    let range = ByteRange::new(2, 6).unwrap();
    let poured = upstream.pour(&"blob".parse().unwrap(), range, ctx, &mut |piece| all.extend_from_slice(&piece)).await;
    poured.map(|()| String::from_utf8(all).unwrap())
}

fn upstream(endpoint: &str, more: &str) -> ObjectUpstream {
    ObjectUpstream::new(&format!("s3://b/pre-?endpoint={endpoint}{more}"), &ClientOptions::default(), Clock::default())
        .unwrap()
}

#[tokio::test]
async fn answers_are_judged_like_those_of_any_server() {
    for (answer, outcome) in [
        (part("2345"), "2345"),
        (part("23"), "sent more or less"),
        (reply("206 Partial Content", "Content-Range: bytes 0-3/10\r\n", "0123"), "it sent 0+4 when asked for 2+4"),
        (
            reply("206 Partial Content", "Content-Range: bytes 2-5/10\r\nContent-Length: 9\r\n", "2345"),
            "it announced 9 bytes",
        ),
        (
            reply("206 Partial Content", "Content-Range: bytes 2-5/10\r\nContent-Encoding: gzip\r\n", "2345"),
            "it compressed the body",
        ),
        (reply("206 Partial Content", "", "2345"), "it sent a part without saying which"),
        (reply("200 OK", "", "0123456789"), "it sent the whole object instead of a part"),
        (reply("404 Not Found", "", "<Error/>"), "blob blob is not at"),
        (reply("403 Forbidden", "", "<Error>secret</Error>"), "refused blob blob (status 403)"),
        (reply("416 Range Not Satisfiable", "Content-Range: bytes */4\r\n", ""), "has 4 bytes, too few for"),
        (reply("503 Slow Down", "Retry-After: 7\r\n", ""), "it answered with status 503, after 7s"),
        (reply("429 Too Many Requests", "", ""), "it answered with status 429"),
        (
            reply("307 Temporary Redirect", "Location: http://127.0.0.1:1/\r\n", ""),
            "cannot be trusted: it sends us somewhere else (status 307)",
        ),
    ] {
        let (endpoint, heads) = server(move |_| answer.clone());
        let told = match pour(&upstream(&endpoint, "&anonymous=true")).await {
            Ok(bytes) => bytes,
            Err(Failure { error, retry_after: Some(after) }) => format!("{error}, after {after:?}"),
            Err(Failure { error, .. }) => error.to_string(),
        };
        let expected = if outcome == "sent more or less" { "it announced 2 bytes" } else { outcome };
        assert!(told.contains(expected), "{told:?} instead of {expected:?}");
        assert!(!told.contains("secret"), "{told}");
        let head = heads.recv().unwrap();
        assert!(head.starts_with("GET /b/pre-blob HTTP/1.1\n") && head.contains("range: bytes=2-5\n"), "{head}");
        assert!(heads.try_recv().is_err(), "asked once, and then somebody else decides");
    }
}

#[tokio::test]
async fn the_length_is_that_of_the_object() {
    let (endpoint, heads) = server(|_| reply("200 OK", "Content-Length: 10\r\n", ""));
    let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60));

    let len = upstream(&endpoint, "&anonymous=true").len(&"blob".parse().unwrap(), ctx).await.unwrap();

    assert_eq!(len, 10);
    let head = heads.recv().unwrap();
    assert!(head.starts_with("HEAD /b/pre-blob "), "{head}");
    assert!(!head.to_ascii_lowercase().contains("authorization"), "nobody signs for nobody: {head}");
}

#[tokio::test]
async fn credentials_are_taken_anew_when_they_were_refused_and_have_changed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = |id: &str| {
        std::fs::write(file.path(), format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = hunter2\n"))
            .unwrap();
    };
    write("OLD");
    let (endpoint, heads) =
        server(|head| if head.contains("Credential=NEWER/") { part("2345") } else { reply("403 Forbidden", "", "") });
    let upstream = upstream(&endpoint, &format!("&region=eu-central-1&credentials={}", file.path().display()));

    let refused = pour(&upstream).await.unwrap_err();
    assert!(matches!(refused.error, SourceError::Refused { status: 403, .. }), "{refused:?}");
    assert!(heads.recv().unwrap().contains("Credential=OLD/"));
    assert!(heads.try_recv().is_err(), "the same credentials are not tried again");

    write("NEWER");
    assert_eq!(pour(&upstream).await.unwrap(), "2345");
    let asked: Vec<_> = heads.try_iter().map(|head| head.contains("/eu-central-1/s3/")).collect();
    assert_eq!(asked, [true, true]);
    assert!(!format!("{upstream:?} {}", upstream.describe()).contains("hunter2"));
}

#[tokio::test]
async fn a_clouds_own_services_are_not_asked_unless_somebody_says_so() {
    // With `instance_credentials` and no metadata service, asking fails; without, nobody asks for any.
    let (endpoint, heads) = server(|_| part("2345"));
    assert_eq!(pour(&upstream(&endpoint, "")).await.unwrap(), "2345");
    let head = heads.recv().unwrap().to_ascii_lowercase();
    assert!(!head.contains("authorization"), "{head}");
}

#[tokio::test]
async fn silence_ends_a_request_before_and_in_the_middle_of_an_answer() {
    let stalled = "HTTP/1.1 206 x\r\nContent-Range: bytes 2-5/10\r\nContent-Length: 4\r\nETag: a\r\n\r\n23";
    for said in ["", stalled] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let held = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // An answer before its question is not silence.
            let _ = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(said.as_bytes()).unwrap();
            stream
        });
        let options = ClientOptions { idle_timeout: Duration::from_millis(50), ..ClientOptions::default() };
        let spec = format!("s3://b/?anonymous=true&endpoint={endpoint}");

        let error = pour(&ObjectUpstream::new(&spec, &options, Clock::default()).unwrap()).await.unwrap_err().error;

        assert!(error.to_string().ends_with("it was silent for 50ms"), "{error}");
        drop(held.join());
    }
}

#[test]
fn credentials_that_are_of_no_use_are_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let told = |text: &str, query: &str| {
        std::fs::write(file.path(), text).unwrap();
        let spec = format!("s3://b/?credentials={}{query}", file.path().display());
        ObjectUpstream::new(&spec, &ClientOptions::default(), Clock::default()).unwrap_err().to_string()
    };
    let at = format!("cannot use the credentials in {}: ", file.path().display());

    assert_eq!(told("nonsense hunter2", ""), format!("{at}line 1 is not KEY = VALUE"));
    assert_eq!(told("hunter2 = hunter2", ""), format!("{at}line 1 has a key that is not known"));
    assert_eq!(told("[default]\n", "&profile=x"), format!("{at}there are none for this profile"));
}
