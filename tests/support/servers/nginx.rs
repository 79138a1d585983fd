//! Debian's nginx: a static server of blobs, or a cache in front of another server.

use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;

use super::{Program, certify, free_port, private_dir};

/// One request as the access log tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which connection of this nginx it came by.
    pub connection: u64,
    /// From which address.
    pub peer: String,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub protocol: String,
    pub method: String,
    /// Without the query.
    pub path: String,
    pub range: Option<String>,
    pub status: u16,
    /// `HIT`, `MISS` and so on, where it has a cache.
    pub cache: Option<String>,
}

/// A running nginx.
pub struct Nginx {
    program: Program,
    secure: bool,
    /// Where it tells how it is, without TLS.
    status: u16,
    /// How often it was asked that since it was started.
    asked: Cell<u64>,
}

/// What one should do.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Speaks TLS and HTTP/2.
    pub secure: bool,
    /// Directives of `http`.
    pub http: String,
    /// Directives of `server`, besides those that serve files of the directory `www`.
    pub server: String,
    /// Files below `www`.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Setup {
    /// A cache of slices in front of `upstream`, an URL without a path.
    pub fn cache(upstream: &str, slice: &str) -> Self {
        Self {
            http: "proxy_cache_path cache keys_zone=blobs:1m max_size=1g inactive=1h;".to_owned(),
            server: format!(
                "location / {{
                    slice {slice};
                    proxy_pass {upstream};
                    proxy_set_header Host $proxy_host;
                    proxy_set_header Range $slice_range;
                    proxy_http_version 1.1;
                    proxy_cache blobs;
                    proxy_cache_key $uri$slice_range;
                    proxy_cache_valid 200 206 1h;
                    proxy_cache_lock on;
                }}"
            ),
            ..Self::default()
        }
    }
}

impl Nginx {
    pub fn start(setup: &Setup) -> Self {
        let (dir, port, status) = (private_dir(), free_port(), free_port());
        let root = dir.path().join("www");
        fs::create_dir(&root).unwrap();
        for (path, bytes) in &setup.files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let mut listen = format!("listen 127.0.0.1:{port};");
        if setup.secure {
            certify(dir.path());
            // Since 1.25.1 that is a directive of its own; this form is still understood.
            listen =
                format!("listen 127.0.0.1:{port} ssl http2; ssl_certificate cert.pem; ssl_certificate_key key.pem;");
        }
        let (here, http, server) = (dir.path().display(), &setup.http, &setup.server);
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("{kind}_temp_path {here}/{kind};\n"))
            .collect();
        let config = format!(
            "daemon off; master_process off; pid {here}/pid; error_log stderr notice;
            events {{ worker_connections 512; }}
            http {{
                {temporary}
                log_format plain '$connection $remote_addr $server_protocol $request_method $uri \"$http_range\" $status $upstream_cache_status.';
                access_log {here}/access plain;
                default_type application/octet-stream;
                # Who does not ask for it must not get it.
                gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;
                {http}
                server {{
                    {listen}
                    root {here}/www;
                    {server}
                }}
                server {{ listen 127.0.0.1:{status}; stub_status; access_log off; }}
            }}"
        );
        fs::write(dir.path().join("nginx.conf"), config).unwrap();
        let args = ["-p", &here.to_string(), "-c", &format!("{here}/nginx.conf"), "-e", "stderr"].map(str::to_owned);
        let program = Program::start("nginx", args.into(), dir, port);
        // One connection so far has found out that it is there.
        Self { program, secure: setup.secure, status, asked: Cell::new(1) }
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.program.port)
    }

    pub fn url(&self) -> String {
        format!("{}://{}", if self.secure { "https" } else { "http" }, self.host())
    }

    /// PEM file that its certificate can be checked with.
    pub fn ca(&self) -> PathBuf {
        self.program.dir.path().join("cert.pem")
    }

    /// Everything it was asked so far, in the order of its answers.
    pub fn seen(&self) -> Vec<Seen> {
        // It is one thread, and has written down what it answered before it answers this. A dead one writes nothing more.
        let _ = self.ask_status();
        self.program.read("access").lines().map(|line| read_line(line).expect("a line of our form")).collect()
    }

    /// How many connections others than this value made to it since it was started, whatever they were for.
    pub fn accepts(&self) -> u64 {
        let answer = self.ask_status().unwrap();
        // "server accepts handled requests" and below it the numbers.
        let numbers = answer.lines().skip_while(|line| !line.starts_with("server accepts")).nth(1);
        let all: Option<u64> = numbers.and_then(|line| line.split_whitespace().next()?.parse().ok());
        all.expect("a status of nginx") - self.asked.get()
    }

    fn ask_status(&self) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.status))?;
        self.asked.set(self.asked.get() + 1);
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    pub fn kill(&mut self) {
        self.program.kill();
    }

    pub fn start_again(&mut self) {
        self.program.start_again();
        self.asked.set(1);
    }
}

fn read_line(line: &str) -> Option<Seen> {
    let mut quoted = line.split('"');
    let (head, range, tail) = (quoted.next()?, quoted.next()?, quoted.next()?);
    let mut head = head.split_whitespace();
    let mut tail = tail.split_whitespace();
    let some = |text: &str| (!text.is_empty() && text != "-").then(|| text.to_owned());
    Some(Seen {
        connection: head.next()?.parse().ok()?,
        peer: head.next()?.to_owned(),
        protocol: head.next()?.to_owned(),
        method: head.next()?.to_owned(),
        path: head.next()?.to_owned(),
        range: some(range),
        status: tail.next()?.parse().ok()?,
        cache: some(tail.next()?.trim_end_matches('.')),
    })
}
