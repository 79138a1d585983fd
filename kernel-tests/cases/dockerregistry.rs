//! Debian's `docker-registry`, started for a case, and images put into it.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rafsd::codec::sha256;
use serde_json::{Value, json};

use crate::support::nydusform;

/// Who may use a registry.
pub(crate) const USER: &str = "alice";
/// With which password.
pub(crate) const PASSWORD: &str = "correct horse battery staple";

/// A registry on the loopback interface. Dropping it kills it.
pub(crate) struct DockerRegistry {
    dir: PathBuf,
    port: u16,
    secure: bool,
    child: Option<Child>,
}

/// One answer of a registry.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) path: String,
    /// Of the body.
    pub(crate) bytes: u64,
}

/// What a registry is asked by those who fill it.
pub(crate) struct Pusher<'a> {
    registry: &'a DockerRegistry,
    runtime: tokio::runtime::Runtime,
    client: reqwest::Client,
}

impl DockerRegistry {
    /// Starts one that keeps its things below `dir`; `secure` lets it speak TLS and ask for a password.
    pub(crate) fn start(dir: &Path, secure: bool) -> anyhow::Result<Self> {
        fs::create_dir_all(dir.join("data"))?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        if secure {
            let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()])?;
            fs::write(dir.join("cert.pem"), key.cert.pem())?;
            fs::write(dir.join("key.pem"), key.signing_key.serialize_pem())?;
            let made = Command::new("htpasswd").args(["-nbB", USER, PASSWORD]).output().context("run htpasswd")?;
            ensure!(made.status.success(), "htpasswd: {}", String::from_utf8_lossy(&made.stderr));
            fs::write(dir.join("htpasswd"), made.stdout)?;
        }
        let mut this = Self { dir: dir.to_owned(), port, secure, child: None };
        this.write_config()?;
        this.start_again()?;
        Ok(this)
    }

    fn write_config(&self) -> anyhow::Result<()> {
        let (dir, port) = (self.dir.display(), self.port);
        let mut text = format!(
            "version: 0.1\nlog:\n  level: warn\n  accesslog:\n    disabled: false\nstorage:\n  filesystem:\n    rootdirectory: {dir}/data\n\
             http:\n  addr: 127.0.0.1:{port}\n"
        );
        if self.secure {
            text += &format!("  tls:\n    certificate: {dir}/cert.pem\n    key: {dir}/key.pem\n");
            text += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {dir}/htpasswd\n");
        }
        Ok(fs::write(self.dir.join("config.yml"), text)?)
    }

    /// Starts it again after [`DockerRegistry::stop`], at the same port and with the same data.
    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log"))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(self.dir.join("config.yml")).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(command.spawn().context("run docker-registry")?);
        let until = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let gone = self.child.as_mut().expect("just started").try_wait()?;
            let log = || fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            ensure!(gone.is_none() && Instant::now() < until, "docker-registry does not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends it. Whoever asks it then finds nobody.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What it has answered so far, in order.
    pub(crate) fn answers(&self) -> anyhow::Result<Vec<Served>> {
        // HOST - USER [TIME] "METHOD PATH VERSION" STATUS BYTES ...
        let served = |line: &str| {
            let mut parts = line.split('"');
            let request = parts.nth(1)?;
            let bytes = parts.next()?.split_whitespace().nth(1)?.parse().ok()?;
            Some(Served { path: request.split(' ').nth(1)?.to_owned(), bytes })
        };
        Ok(fs::read_to_string(self.dir.join("log"))?.lines().filter_map(served).collect())
    }

    /// `HOST:PORT`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// PEM file that its certificate can be checked with.
    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.join("cert.pem")
    }

    /// What docker would keep in its `config.json` for this registry.
    pub(crate) fn docker_config(&self, password: &str) -> String {
        json!({"auths": {self.host(): {"username": USER, "password": password}}}).to_string()
    }

    /// Somebody who may write to it.
    pub(crate) fn pusher(&self) -> anyhow::Result<Pusher<'_>> {
        rafsd::net::install_tls();
        let mut client = reqwest::Client::builder().no_proxy();
        if self.secure {
            client = client.tls_certs_only(reqwest::Certificate::from_pem_bundle(&fs::read(self.ca())?)?);
        } else {
            client = client.tls_certs_only([]);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Pusher { registry: self, runtime, client: client.build()? })
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Pusher<'_> {
    fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<reqwest::Response> {
        let request = if self.registry.secure { request.basic_auth(USER, Some(PASSWORD)) } else { request };
        self.runtime.block_on(async {
            let answer = request.send().await?;
            let (status, url) = (answer.status(), answer.url().clone());
            if !status.is_success() {
                bail!("{url}: {status}: {}", answer.text().await?);
            }
            Ok(answer)
        })
    }

    fn url(&self, path: &str) -> String {
        let scheme = if self.registry.secure { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.registry.host())
    }

    /// Puts a blob there; gives its descriptor without a media type.
    pub(crate) fn blob(&self, repository: &str, bytes: &[u8]) -> anyhow::Result<Value> {
        let begun = self.send(self.client.post(self.url(&format!("/v2/{repository}/blobs/uploads/"))))?;
        let place = begun.headers().get("location").context("a place to upload to")?.to_str()?;
        let digest = format!("sha256:{}", sha256(bytes));
        let mut url = reqwest::Url::parse(&self.url("/"))?.join(place)?;
        url.query_pairs_mut().append_pair("digest", &digest);
        let content = ("content-type", "application/octet-stream");
        self.send(self.client.put(url).header(content.0, content.1).body(bytes.to_vec()))?;
        Ok(json!({"digest": digest, "size": bytes.len()}))
    }

    /// Puts a manifest or an index there, with or without a tag; gives its descriptor.
    pub(crate) fn document(&self, repository: &str, tag: Option<&str>, document: &Value) -> anyhow::Result<Value> {
        let text = document.to_string();
        let digest = format!("sha256:{}", sha256(text.as_bytes()));
        let kind = document["mediaType"].as_str().context("a media type")?;
        let url = self.url(&format!("/v2/{repository}/manifests/{}", tag.unwrap_or(&digest)));
        self.send(self.client.put(url).header("content-type", kind).body(text.clone()))?;
        Ok(json!({"mediaType": kind, "digest": digest, "size": text.len()}))
    }

    /// Puts the image in `dir`, as `rafsd build` leaves it, there under a tag, in the form in which nydusify puts one;
    /// gives the descriptor of its manifest.
    pub(crate) fn image(&self, repository: &str, tag: Option<&str>, dir: &Path) -> anyhow::Result<Value> {
        let manifest = self.manifest(repository, dir, true)?;
        self.document(repository, tag, &manifest)
    }

    /// The manifest of the image in `dir`, whose layers are put there; with or without its blobs.
    pub(crate) fn manifest(&self, repository: &str, dir: &Path, with_blobs: bool) -> anyhow::Result<Value> {
        let mut manifest = self.manifest_about(repository, dir, None)?;
        if !with_blobs && let Some(layers) = manifest["layers"].as_array_mut() {
            layers.drain(..layers.len() - 1);
        }
        Ok(manifest)
    }

    /// The same, with its blobs. If they are tables, it is said which layer they are `about`.
    pub(crate) fn manifest_about(&self, repository: &str, dir: &Path, about: Option<&str>) -> anyhow::Result<Value> {
        let mut layers = Vec::new();
        for entry in fs::read_dir(dir.join("blobs"))? {
            let bytes = fs::read(entry?.path())?;
            let mut layer = nydusform::blob_layer(self.blob(repository, &bytes)?);
            if let Some(about) = about {
                layer["annotations"]["containerd.io/snapshot/nydus-ref"] = about.into();
            }
            layers.push(layer);
        }
        let bootstrap = nydusform::bootstrap_tar(&fs::read(dir.join("bootstrap"))?)?;
        layers.push(nydusform::bootstrap_layer(self.blob(repository, &bootstrap)?));
        self.over_config(repository, &layers)
    }

    /// An image of one layer that is a plain tar, as docker pushes it.
    pub(crate) fn ordinary(&self, repository: &str) -> anyhow::Result<Value> {
        let layer = self.blob(repository, &nydusform::bootstrap_tar(b"no bootstrap at all")?)?;
        self.over_config(repository, &[nydusform::ordinary_layer(layer)])
    }

    fn over_config(&self, repository: &str, layers: &[Value]) -> anyhow::Result<Value> {
        Ok(nydusform::manifest(self.blob(repository, nydusform::config().as_bytes())?, layers))
    }
}
