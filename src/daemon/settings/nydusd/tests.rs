use super::super::{ConfigText, resolve};
use super::*;

/// As nydus-snapshotter writes it.
const SNAPSHOTTER: &str = r#"{
  "device": {
    "id": "/17",
    "backend": {
      "type": "registry",
      "config": {
        "readahead": false, "host": "registry.example:5000", "repo": "team/app", "auth": "bWU6aHVudGVyMg==",
        "blob_url_scheme": "http", "scheme": "http", "skip_verify": true, "timeout": 5, "connect_timeout": 3,
        "retry_limit": 2, "ca_cert_files": ["/etc/ssl/own.pem"],
        "proxy": {"url": "http://p2p:65001", "ping_url": "http://p2p:40901/server/ping", "fallback": false,
                  "check_interval": 7, "use_http": true}
      }
    },
    "cache": {"type": "blobcache", "config": {"work_dir": "/var/lib/nydus/cache", "disable_indexed_map": false}}
  },
  "mode": "direct", "digest_validate": false, "iostats_files": true, "enable_xattr": true,
  "amplify_io": 33554432,
  "fs_prefetch": {"enable": true, "threads_count": 10, "merging_size": 131072, "bandwidth_rate": 1048576}
}"#;

/// What is printed, after it was seen that the daemon would take it.
fn config(text: &str) -> (Imported, String) {
    let imported = import(text).unwrap_or_else(|error| panic!("{error}"));
    let config = imported.config();
    let resolved = resolve(Some(ConfigText { text: &config, dir: Path::new("/etc/rafsd") }), &[]);
    assert_eq!(resolved.mistakes, [], "{config}");
    assert_eq!(resolved.settings.registries, imported.registries, "{config}");
    (imported, config)
}

fn backend(kind: &str, config: &str) -> String {
    format!(r#"{{"device": {{"backend": {{"type": "{kind}", "config": {config}}}}}, "mode": "direct"}}"#)
}

fn remarks(imported: &Imported) -> Vec<&str> {
    imported.remarks.iter().map(|remark| remark.key.as_str()).collect()
}

#[test]
fn what_the_snapshotter_writes_becomes_settings_a_registry_and_a_mount() {
    let (imported, config) = config(SNAPSHOTTER);

    assert_eq!(
        config,
        r#"# rafsd mount BOOTSTRAP DIR --blobs docker://registry.example:5000/team/app --prefetch=all
cache = "/var/lib/nydus/cache"
readahead_first = "32MiB"
readahead_most = "32MiB"
prefetch_fetches = 10
prefetch_window = "128KiB"
prefetch_rate = "1MiB"

[registry."registry.example:5000"]
server = "http://registry.example:5000/v2"
ca = ["/etc/ssl/own.pem"]
dial_timeout = "3s"

[registry."registry.example:5000".rafsd]
proxy = "http://p2p:65001/"
proxy_ping = "http://p2p:40901/server/ping"
proxy_fallback = false
"#
    );
    assert_eq!(
        remarks(&imported),
        [
            "device.id",
            "device.backend.config.auth",
            "device.backend.config.timeout",
            "device.backend.config.retry_limit",
            "device.backend.config.proxy.check_interval",
            "device.backend.config.proxy.use_http",
            "device.backend.config.blob_url_scheme",
            "device.cache.config.work_dir",
            "digest_validate",
            "iostats_files",
            "amplify_io",
        ]
    );
}

#[test]
fn secrets_are_shown_nowhere_and_kept_where_they_are_looked_for() {
    let (mut imported, config) = config(SNAPSHOTTER);
    let shown = format!("{config}{:?}{:?}{}", imported.remarks, imported, imported.command());
    assert!(!shown.contains("hunter2") && !shown.contains("bWU6"), "{shown}");
    let told = &imported.remarks[1].text;
    assert!(
        told.contains("rafsd credentials set registry.example:5000/team/app --user NAME --password-stdin"),
        "{told}"
    );

    let file: serde_json::Value = serde_json::from_str(imported.credentials().unwrap().expose()).unwrap();
    assert_eq!(file["auths"]["registry.example:5000/team/app"]["auth"], "bWU6aHVudGVyMg==");
    imported.keep_credentials_in("/etc/rafsd/auth.json");
    assert!(imported.config().contains("docker_config = \"/etc/rafsd/auth.json\"\n"));
    assert!(!remarks(&imported).contains(&"device.backend.config.auth"));

    let token = backend("registry", r#"{"host": "h", "repo": "r", "registry_token": "hunter2"}"#);
    let imported = import(&token).unwrap();
    assert!(imported.credentials().unwrap().expose().contains(r#""registrytoken": "hunter2""#));
    assert!(imported.remarks[0].text.contains("--registry-token-stdin"));
}

fn behind(proxy: &str) -> String {
    backend("registry", &format!(r#"{{"host": "h", "repo": "r", "proxy": {proxy}}}"#))
}

#[test]
fn a_proxy_with_a_login_is_taken_and_its_login_left_to_be_written() {
    let imported = import(&behind(r#"{"url": "http://me:hunter2@p:3128", "fallback": false}"#)).unwrap();
    let config = imported.config();

    assert!(config.contains("proxy = \"http://***@p:3128/\" # login not shown\nproxy_fallback = false\n"), "{config}");
    assert_eq!(remarks(&imported), ["device.backend.config.proxy.url", "device.cache.type"]);
    assert!(imported.remarks[0].text.contains("USER:PASSWORD@"));
    assert!(!format!("{config}{imported:?}").contains("hunter2"));
    let written = config.replace("***@", "me:hunter2@");
    let resolved = resolve(Some(ConfigText { text: &written, dir: Path::new("/etc/rafsd") }), &[]);
    assert_eq!((resolved.mistakes, resolved.settings.registries), (Vec::new(), imported.registries));
}

#[test]
fn a_proxy_that_must_not_be_gone_around_is_never_left_out() {
    let error = import(&behind(r#"{"url": "socks5://me:hunter2@p:1", "fallback": false}"#)).unwrap_err().to_string();
    assert!(error.starts_with("device.backend.config.proxy.url must be an http or https URL"), "{error}");
    assert!(!error.contains("hunter2"));

    let (imported, config) = config(&behind(r#"{"url": "socks5://me:hunter2@p:1"}"#));
    assert_eq!(remarks(&imported), ["device.backend.config.proxy.url", "device.cache.type"]);
    assert!(!config.contains("proxy"), "{config}");
}

#[test]
fn what_is_about_a_proxy_is_told_of_where_none_is_named() {
    for proxy in [
        r#"{"url": "", "ping_url": "http://p/ping", "fallback": false}"#,
        r#"{"ping_url": "http://p/ping", "fallback": false}"#,
    ] {
        let (imported, config) = config(&behind(proxy));
        let key = |key: &str| format!("device.backend.config.proxy.{key}");
        let told = [key("ping_url"), key("fallback"), "device.cache.type".to_owned()];
        assert_eq!(remarks(&imported), told, "{proxy}");
        assert!(!config.contains("proxy"), "{config}");
    }
    // As nydus-snapshotter writes it for nobody.
    let (imported, _) = config(&behind(r#"{"url": "", "ping_url": "", "fallback": true}"#));
    assert_eq!(remarks(&imported), ["device.cache.type"]);
}

#[test]
fn mirrors_that_make_no_sense_are_told_of_and_passed_over() {
    let remarked = |mirrors: &str| {
        let text = format!(r#"{{"host": "h", "repo": "r", "mirrors": {mirrors}}}"#);
        let (imported, config) = config(&backend("registry", &text));
        assert!(!format!("{config}{imported:?}").contains("hunter2"), "{config}");
        let mirrors = remarks(&imported).into_iter().filter(|key| key.contains("mirrors"));
        (mirrors.map(str::to_owned).collect::<Vec<_>>(), config.matches(".host.").count())
    };
    let key = |rest: &str| format!("device.backend.config.mirrors{rest}");

    assert_eq!(remarked("null"), (vec![], 0));
    assert_eq!(remarked("[]"), (vec![], 0));
    for mirrors in ["{}", "5", r#"{"host": "m"}"#] {
        assert_eq!(remarked(mirrors), (vec![key("")], 0), "{mirrors}");
    }
    for host in [r#""""#, "5", r#""http://me:hunter2@m""#, r#""m?hunter2""#] {
        let mirrors = format!(r#"[{{"host": {host}, "failure_limit": "x"}}, {{}}, 7, {{"host": "m"}}]"#);
        let told = vec![key("[0].host"), key("[1].host"), key("[2]"), key("")];
        assert_eq!(remarked(&mirrors), (told, 1), "{host}");
    }
}

#[test]
fn a_version_beside_a_device_is_what_version_1_does_not_know() {
    let device = r#""device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}}"#;
    for version in [r#""1""#, "1", "-1", "null", "{}", "3", r#""2""#] {
        let imported = import(&format!(r#"{{"version": {version}, {device}}}"#)).unwrap();
        assert_eq!(
            (imported.blobs.as_slice(), remarks(&imported)),
            (&["/b".to_owned()][..], vec!["device.cache.type"])
        );
    }
    let imported = import(&format!(r#"{{"version": 2, {device}}}"#)).unwrap();
    assert_eq!(remarks(&imported)[0], "backend", "it is the second version");
}

#[test]
fn version_2_is_read_as_toml_and_as_json() {
    let toml = "version = 2\nid = \"x\"\n[backend]\ntype = \"registry\"\n[backend.registry]\nhost = \"index.docker.io\"\n\
                repo = \"library/nginx\"\n[[backend.registry.mirrors]]\nhost = \"http://m.example:5000\"\n\
                headers = { a = \"hunter2\" }\n[backend.oss]\nendpoint = \"x\"\n[cache]\ntype = \"fscache\"\n\
                [cache.fscache]\nwork_dir = \"/c\"\n[cache.filecache]\nwork_dir = \"/d\"\n[cache.prefetch]\nenable = true\n\
                threads = 4\nbatch_size = 1\nprefetch_all = false\n[rafs]\nmode = \"cached\"\nvalidate = true\n";
    let (imported, config) = config(toml);

    assert_eq!(
        config,
        "# rafsd mount BOOTSTRAP DIR --blobs docker://docker.io/library/nginx --prefetch=hints\n\
         backend = [\"cachefiles\"]\nprefetch_fetches = 4\n\n[registry.\"docker.io\"]\n\
         server = \"https://registry-1.docker.io/v2\"\n\n[registry.\"docker.io\".host.\"http://m.example:5000/v2\"]\n"
    );
    assert!(!format!("{imported:?}").contains("hunter2"));
    assert_eq!(
        remarks(&imported),
        [
            "id",
            "backend.registry.mirrors[0].headers",
            "backend.registry.mirrors",
            "backend.oss",
            "cache.fscache.work_dir",
            "cache.filecache.work_dir",
            "rafs.mode",
            "cache.prefetch.batch_size",
        ]
    );
    let json =
        r#"{"version": 2, "backend": {"type": "http-proxy", "http-proxy": {"addr": "http://h:1/", "path": "/b/"}}}"#;
    assert_eq!(import(json).unwrap().mount(), ["--blobs", "http://h:1/b", "--prefetch=none"]);
}

#[test]
fn every_backend_becomes_a_place() {
    let id = "ab".repeat(32);
    let in_dir = format!(r#"{{"blob_file": "/srv/blobs/{id}"}}"#);
    for (kind, fields, places) in [
        ("localfs", r#"{"dir": "/srv/b", "alt_dirs": ["/srv/c d"]}"#, vec!["/srv/b", "/srv/c d"]),
        ("localfs", &in_dir, vec!["/srv/blobs"]),
        ("localfs", r#"{"blob_file": "/srv/one.blob"}"#, vec!["localdisk:///srv/one.blob?gpt=false&blob=ID"]),
        ("localdisk", r#"{"device_path": "/dev/vdb"}"#, vec!["localdisk:///dev/vdb"]),
        (
            "localdisk",
            r#"{"device_path": "/dev/v b", "disable_gpt": true}"#,
            vec!["localdisk:///dev/v%20b?gpt=false&blob=ID"],
        ),
        (
            "oss",
            r#"{"endpoint": "oss-cn-x.aliyuncs.com", "bucket_name": "b", "object_prefix": "n/"}"#,
            vec!["oss://b/n/?endpoint=oss-cn-x.aliyuncs.com"],
        ),
        (
            "s3",
            r#"{"scheme": "http", "endpoint": "127.0.0.1:9000", "bucket_name": "b", "region": "eu-1"}"#,
            vec!["s3://b/?region=eu-1&endpoint=http://127.0.0.1:9000"],
        ),
        ("registry", r#"{"host": "registry-1.docker.io", "repo": "a/b"}"#, vec!["docker://docker.io/a/b"]),
        ("registry", r#"{"host": "R.example:5000", "repo": "a/b"}"#, vec!["docker://r.example:5000/a/b"]),
    ] {
        let (imported, config) = config(&backend(kind, fields));
        assert_eq!(imported.blobs, places, "{kind}");
        assert!(imported.registries.is_empty(), "{config}");
    }
}

#[test]
fn the_keys_of_a_bucket_go_to_a_file_that_the_place_names() {
    let keys = r#"{"endpoint": "e", "bucket_name": "b", "access_key_id": "AK", "access_key_secret": "hunter2"}"#;
    let (mut imported, shown) = config(&backend("oss", keys));
    assert!(!shown.contains("hunter2") && !format!("{imported:?}").contains("hunter2"));

    assert_eq!(imported.credentials().unwrap().expose(), "aws_access_key_id = AK\naws_secret_access_key = hunter2\n");
    imported.keep_credentials_in("/etc/k x");
    assert_eq!(imported.blobs, ["oss://b/?endpoint=e&credentials=/etc/k%20x"]);
}

#[test]
fn words_of_the_command_are_quoted_and_cannot_leave_their_line() {
    let (imported, config) = config(&backend("localfs", r#"{"dir": "/a'b c"}"#));
    assert_eq!(imported.command(), "rafsd mount BOOTSTRAP DIR --blobs '/a'\\''b c' --prefetch=none");
    assert!(config.starts_with("# rafsd mount BOOTSTRAP DIR --blobs '/a'\\''b c'"), "{config}");
    let error = import(&backend("localfs", r#"{"dir": "/a\ncache = 1"}"#)).unwrap_err();
    assert!(matches!(error, ImportError::Kind { key, .. } if key == "device.backend.config.dir"));
}

#[test]
fn what_nydusd_would_not_take_is_refused_with_the_key() {
    let told = |text: &str| import(text).unwrap_err().to_string();
    for (text, wanted) in [
        ("", "it is no configuration of nydusd: it has neither `version = 2` nor the `device` of version 1"),
        ("{", "it is neither JSON (line 1, column 1) nor TOML (line 1)"),
        ("version: 3\nbackend:\n  type: local\n", "it is neither JSON (line 1, column 1) nor TOML (line 1)"),
        ("[]", "the file must be an object"),
        ("{}", "it is no configuration of nydusd: it has neither `version = 2` nor the `device` of version 1"),
        ("version = 3", "version 3 is not known; 1 and 2 are"),
        (r#"{"device": {}}"#, "device.backend.type is missing"),
        (r#"{"device": 1}"#, "device must be an object"),
        (
            &backend("http-proxy", "{}"),
            "device.backend.type is no backend that nydusd has: it has localdisk, localfs, oss, s3 and registry in version 1",
        ),
        (
            "version = 2\n[backend]\ntype = \"ceph\"\n",
            "backend.type is no backend that nydusd has: it has localdisk, localfs, oss, s3, registry and http-proxy",
        ),
        (
            "version = 2\n[cache]\ntype = \"ram\"\n",
            "cache.type is no cache that nydusd has: it has blobcache, filecache, fscache and dummycache",
        ),
        (
            &backend("registry", r#"{"host": "u:hunter2@h", "repo": "r"}"#),
            "device.backend.config.host must be HOST or HOST:PORT",
        ),
        (
            &backend("registry", r#"{"host": "h", "repo": "../r"}"#),
            "device.backend.config.repo must be the name of a repository",
        ),
        (
            &backend("registry", r#"{"host": "h", "repo": "r", "auth": 5}"#),
            "device.backend.config.auth must be a string without control characters",
        ),
        (
            &backend("registry", r#"{"host": "h", "repo": "r", "auth": "me:hunter2"}"#),
            "device.backend.config.auth must be base64 of USER:PASSWORD",
        ),
        (
            &backend("registry", r#"{"host": "h", "repo": "r", "auth": "aHVudGVyMg=="}"#),
            "device.backend.config.auth must be base64 of USER:PASSWORD",
        ),
        (&backend("s3", r#"{"bucket_name": "b", "endpoint": "e"}"#), "device.backend.config.region is missing"),
        (
            &backend("oss", r#"{"bucket_name": "b?x=1", "endpoint": "e"}"#),
            "device.backend.config.bucket_name must be a name without ?, # and @",
        ),
        (
            &backend("oss", r#"{"bucket_name": "b", "endpoint": "e", "timeout": "x", "ca_cert_files": [1]}"#),
            "device.backend.config.ca_cert_files must be a list of strings without control characters",
        ),
        (
            &backend("oss", r#"{"bucket_name": "b", "endpoint": "e", "object_prefix": "a//b"}"#),
            "device.backend.config.object_prefix must be what the name of an object can begin with",
        ),
        (
            &backend("s3", r#"{"bucket_name": "b", "region": "r", "object_prefix": "../"}"#),
            "device.backend.config.object_prefix must be what the name of an object can begin with",
        ),
        (
            &backend("localdisk", r#"{"device_path": "vdb"}"#),
            "device.backend.config.device_path must be an absolute path",
        ),
    ] {
        assert_eq!(told(text), wanted, "{text}");
    }
}

#[test]
fn unknown_keys_are_told_and_values_out_of_range_left_at_the_default() {
    let text = r#"{"device": {"backend": {"type": "localfs", "config": {"dir": "/b", "colour": 1}}, "deduplication": {"enable": true}},
        "warmup": 5, "id_mapping": [0, 1, 2], "extra": {}, "fs_prefetch": {"enable": false, "threads_count": 5000}}"#;
    let (imported, config) = config(text);
    assert_eq!(
        remarks(&imported),
        [
            "device.backend.config.colour",
            "device.cache.type",
            "device.deduplication",
            "fs_prefetch.threads_count",
            "warmup",
            "id_mapping",
            "extra"
        ]
    );
    assert_eq!(config, "# rafsd mount BOOTSTRAP DIR --blobs /b --prefetch=none\n");
}

#[test]
fn hostile_text_is_refused_and_survived() {
    let deep = "[".repeat(100_000);
    let nested = format!("{}1{}", r#"{"device":"#.repeat(120), "}".repeat(120));
    for text in [
        deep.as_str(),
        nested.as_str(),
        "\u{0}",
        "a = [[[",
        "version = 2\nbackend = 1",
        "version = 99999999999999999999",
    ] {
        assert!(import(text).is_err(), "{}", &text[..text.len().min(30)]);
    }
}

proptest::proptest! {
    #[test]
    fn any_change_of_a_file_is_an_answer_that_the_daemon_would_take(at in 0..SNAPSHOTTER.len(), byte in 32u8..127) {
        let mut text = SNAPSHOTTER.as_bytes().to_vec();
        text[at] = byte;
        if let Ok(imported) = import(std::str::from_utf8(&text).unwrap()) {
            let config = imported.config();
            let resolved = resolve(Some(ConfigText { text: &config, dir: Path::new("/etc/rafsd") }), &[]);
            proptest::prop_assert!(resolved.mistakes.is_empty(), "{:?} in {config}", resolved.mistakes);
        }
    }
}
