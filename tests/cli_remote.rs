//! Commands that look at images, given images in a registry: what they print and write, by whose settings and
//! credentials they ask, and what they refuse.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use support::building;
use support::clock::VirtualClock;
use support::registry::{Access, Content, Door, Fault, Registry, Setup, USER, When, basic};

const REPOSITORY: &str = "team/app";

/// A registry with an image, and the settings that lead there by a name that nobody else knows.
struct Bench {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("source"), dir.path().join("image"));
        fs::create_dir_all(source.join("dir")).unwrap();
        fs::write(source.join("one"), vec![7; 300_000]).unwrap();
        fs::write(source.join("dir/two"), b"of its own").unwrap();
        building::build(&source, &out).unwrap();
        let mut content = Content::default();
        content.image(REPOSITORY, "1", &out, true);
        content.image(REPOSITORY, "unnamed", &out, false);
        let layer = content.blob(REPOSITORY, "an ordinary layer");
        content.manifest(REPOSITORY, "ordinary", &[("application/vnd.oci.image.layer.v1.tar", &layer)]);
        let setup = Setup { content, access: Access::Bearer, storage: true, numeric: true, ..Setup::default() };
        let registry = Registry::start(setup, &VirtualClock::new()).await;
        let bench = Self { dir, registry };
        // A login is for a server by its own name.
        let (host, login) = (bench.registry.host(Door::Registry), basic(USER, &bench.registry.keys().password));
        bench.write("auth.json", &json!({"auths": {host: {"auth": login}}}).to_string());
        let (config, auth) = (bench.registry.url(Door::Registry), bench.at("auth.json"));
        let config = format!("docker_config = {auth:?}\n[registry.\"made.example\"]\nserver = {config:?}\n");
        bench.write("config.toml", &config);
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).unwrap();
    }

    /// Runs the program with these settings on a thread of its own, as the registry is served by this one.
    async fn rafsd(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        for name in std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("RAFSD_")) {
            command.env_remove(name);
        }
        command.args(args).env("RAFSD_CONFIG", self.at("config.toml")).env("HOME", self.dir.path());
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    async fn works(&self, args: &[&str]) -> String {
        let output = self.rafsd(args).await;
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says when it fails.
    async fn fails(&self, args: &[&str], status: i32) -> String {
        let output = self.rafsd(args).await;
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {told}");
        told
    }
}

fn image(tag: &str) -> String {
    format!("docker://made.example/{REPOSITORY}:{tag}")
}

fn assert_is_source(found: &Path, source: &Path) {
    for name in ["one", "dir/two"] {
        assert_eq!(fs::read(found.join(name)).unwrap(), fs::read(source.join(name)).unwrap(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_in_a_registry_is_looked_at_and_taken_out_like_one_in_a_file() {
    let bench = Bench::new().await;
    let (remote, file) = (image("1"), bench.at("image/bootstrap"));
    let file = file.to_str().unwrap();

    let report: Value =
        serde_json::from_str(&bench.works(&["check", &remote, "--depth", "data", "--json"]).await).unwrap();
    assert_eq!((&report["errors"], &report["depth"]), (&json!(0), &json!("data")), "{report}");
    let unpacked = bench.at("unpacked");
    bench.works(&["unpack", &remote, "-o", unpacked.to_str().unwrap(), "--no-same-owner"]).await;
    assert_is_source(&unpacked, &bench.at("source"));
    for args in [["inspect", "--dump"].as_slice(), &["inspect", "--path", "/dir/two", "--json"]] {
        let of = |image: &str| [&args[..1], &[image], &args[1..]].concat().into_iter().map(str::to_owned).collect();
        let (remote, local): (Vec<String>, Vec<String>) = (of(&remote), of(file));
        let [remote, local] = [&remote, &local].map(|args| args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(bench.works(&remote).await, bench.works(&local).await, "{args:?}");
    }
    let stat: Value = serde_json::from_str(&bench.works(&["stat", &remote, file, "--json"]).await).unwrap();
    assert_eq!(stat["images"][0]["name"], remote);
    assert_eq!(stat["total"]["shared_blobs"], 1, "{stat}");
    let (disk, other) = (bench.at("disk"), bench.at("other"));
    bench.works(&["export", &remote, "-o", disk.to_str().unwrap()]).await;
    bench.works(&["export", file, "-o", other.to_str().unwrap()]).await;
    assert!(fs::read(disk).unwrap() == fs::read(other).unwrap(), "the same disk");

    // The bootstrap from a file, the blobs from the registry.
    let blobs = format!("docker://made.example/{REPOSITORY}");
    bench.works(&["check", file, "--blobs", &blobs, "--depth", "data"]).await;
    assert_eq!(bench.registry.leaks(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_as_the_manifest_says_is_refused() {
    let bench = Bench::new().await;
    let out = bench.at("out");
    let out = out.to_str().unwrap();

    let told = bench.fails(&["unpack", &image("unnamed"), "-o", out], 1).await;
    assert!(told.contains("its manifest does not name"), "{told}");
    bench.fails(&["check", &image("unnamed"), "--depth", "data"], 2).await;
    bench.works(&["inspect", &image("unnamed")]).await;
    let blobs = bench.at("image/blobs");
    bench.works(&["check", &image("unnamed"), "--depth", "data", "--blobs", blobs.to_str().unwrap()]).await;

    let told = bench.fails(&["stat", &image("ordinary")], 1).await;
    assert!(told.contains("an ordinary OCI image") && told.contains("nydusify convert"), "{told}");
    let told = bench.fails(&["check", &image("missing")], 2).await;
    assert!(told.contains("the tag \"missing\" is not in made.example/team/app"), "{told}");
    let told =
        bench.fails(&["check", bench.at("image/bootstrap").to_str().unwrap(), "--platform", "linux/amd64"], 2).await;
    assert!(told.contains("--platform is about images in registries"), "{told}");

    // Every byte is wrong from here on, that of the bootstrap first.
    bench.registry.fault(Door::Storage, When::Always, 0, Fault::Flip).await;
    bench.fails(&["inspect", &image("1")], 1).await;
    bench.fails(&["unpack", &image("1"), "-o", out], 1).await;
    assert!(!Path::new(out).exists(), "nothing was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_and_settings_are_those_of_the_daemon() {
    let bench = Bench::new().await;
    let auth = fs::read_to_string(bench.at("auth.json")).unwrap();

    bench.write("auth.json", "{\"auths\": {}}");
    let told = bench.fails(&["inspect", &image("1")], 1).await;
    assert!(told.contains("gives no token"), "{told}");
    bench.write("auth.json", &auth);
    bench.works(&["inspect", &image("1")]).await;

    // A mirror that is not there is passed over.
    let config = fs::read_to_string(bench.at("config.toml")).unwrap();
    bench.write("config.toml", &format!("{config}[registry.\"made.example\".host.\"http://127.0.0.1:9\"]\n"));
    bench.works(&["inspect", &image("1")]).await;
    bench.write("config.toml", &format!("{config}serve = 1\n"));
    let told = bench.fails(&["inspect", &image("1")], 1).await;
    assert!(told.contains("registry \"made.example\": unknown key \"serve\"; did you mean \"server\"?"), "{told}");
    assert_eq!(bench.registry.leaks(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_too_are_got_around_a_dead_proxy_if_that_is_allowed() {
    let bench = Bench::new().await;
    let config = fs::read_to_string(bench.at("config.toml")).unwrap();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxied = format!("{config}[registry.\"made.example\".rafsd]\nproxy = \"http://{nobody}\"\n");

    bench.write("config.toml", &format!("{proxied}proxy_fallback = false\n"));
    bench.fails(&["inspect", &image("1")], 1).await;
    for door in Door::ALL {
        assert_eq!(bench.registry.seen(door).len(), 0, "{door:?} was asked without the proxy");
    }
    bench.write("config.toml", &proxied);
    bench.works(&["inspect", &image("1")]).await;
    assert_eq!(bench.registry.seen(Door::Tokens).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_go_through_a_proxy_that_is_well() {
    let bench = Bench::new().await;
    let config = fs::read_to_string(bench.at("config.toml")).unwrap();
    let proxy = bench.registry.url(Door::Proxy);
    bench.write("config.toml", &format!("{config}[registry.\"made.example\".rafsd]\nproxy = \"{proxy}\"\n"));

    bench.works(&["inspect", &image("1")]).await;

    for door in [Door::Registry, Door::Tokens, Door::Storage] {
        let seen = bench.registry.seen(door);
        assert!(!seen.is_empty() && seen.iter().all(|seen| seen.proxied), "{door:?}");
    }
}
