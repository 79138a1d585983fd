//! The settings: what the program accepts, what it prints, and what `docs/CONFIG.md` says are one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rafsd::daemon::settings::{Field, Setting, TABLE};
use serde_json::Value;

/// Runs the program with no other settings in its environment than these.
fn rafsd(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    for name in std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("RAFSD_")) {
        command.env_remove(name);
    }
    command.args(args).envs(env.iter().copied()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn file(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("config.toml");
    fs::write(&path, text).unwrap();
    path
}

/// The table of `docs/CONFIG.md`, made from the schema.
fn documented() -> String {
    let mut out = String::from("| Key | Value | Default | Meaning |\n| --- | --- | --- | --- |\n");
    for setting in TABLE {
        let value = match setting.field {
            Field::Path(_) => "a path".to_owned(),
            Field::PathOrNone(_) => "`none`, or a path".to_owned(),
            Field::Paths(_) => "a list of paths".to_owned(),
            Field::Switch(_) => "`true`, `false`; as a flag `on`, `off`".to_owned(),
            Field::Backends(_) => "a list of `cachefiles`, `fanotify`, `fuse-device`, `fuse-tree`".to_owned(),
            Field::Transport(_) => "`dev`, `io-uring`".to_owned(),
            Field::Restart(_) => "`auto`, `keepers`, `never`".to_owned(),
            Field::LogRules(_) => "a level, or rules".to_owned(),
            Field::LogFormat(_) => "`text`, `json`".to_owned(),
            Field::LoopbackOrNone(_) => "`none`, or an address of the loopback interface".to_owned(),
            Field::Size(..) => ranged("a size", setting),
            Field::SizeOrNone(..) => ranged("`none`, or a size", setting),
            Field::Percent(..) => ranged("a percentage", setting),
            Field::Count(..) => ranged("a number", setting),
            Field::Time(..) => ranged("a time", setting),
            Field::TimeOrNever(..) => ranged("`never`, or a time", setting),
        };
        let default = if setting.default.is_empty() { String::new() } else { format!("`{}`", setting.default) };
        out += &format!("| `{}` | {value} | {default} | {} |\n", setting.key, setting.help);
    }
    out
}

fn ranged(what: &str, setting: &Setting) -> String {
    let (least, most) = setting.field.range().unwrap();
    format!("{what}, {least} to {most}")
}

#[test]
fn the_documentation_lists_exactly_what_the_program_knows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIG.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("| Key |").expect("the table");
    let end = rest.find("\n\n").map_or(rest.len(), |at| at + 1);
    let after = &rest[end..];
    let wanted = format!("{before}{}{after}", documented());
    if std::env::var_os("RAFSD_WRITE_GOLDEN").is_some() {
        return fs::write(&path, &wanted).unwrap();
    }
    assert!(text == wanted, "docs/CONFIG.md differs from the settings; RAFSD_WRITE_GOLDEN=1 writes it anew");
}

#[test]
fn every_setting_is_a_flag_of_serve_and_a_variable_and_a_key() {
    let help = stdout(&rafsd(&["serve", "--help"], &[]));
    let words: BTreeSet<_> = help.split(|c: char| c.is_whitespace() || "[],=".contains(c)).collect();
    for setting in TABLE {
        assert!(words.contains(format!("--{}", setting.flag()).as_str()), "--{} in:\n{help}", setting.flag());
        assert!(words.contains(setting.env().as_str()), "{} in:\n{help}", setting.env());
    }

    let printed: Value =
        serde_json::from_str(&stdout(&rafsd(&["config", "print", "--defaults", "--json"], &[]))).unwrap();
    let keys: BTreeSet<_> = printed["settings"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, TABLE.iter().map(|setting| setting.key.to_owned()).collect());
}

#[test]
fn the_effective_settings_are_printed_with_their_origins() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "deadline = \"5s\"\nfetches = 5\nrun = \"/run/elsewhere\"\n");
    let args = ["config", "print", "--config", path.to_str().unwrap(), "--deadline", "7s", "--json"];
    let output = rafsd(&args, &[("RAFSD_FETCHES", "6"), ("RAFSD_DEADLINE", "6s"), ("RAFSD_LOG", "debug")]);
    let printed: Value = serde_json::from_str(&stdout(&output)).unwrap();

    let told = |key: &str| (printed["settings"][key]["value"].clone(), printed["settings"][key]["origin"].clone());
    assert_eq!(told("deadline"), ("7s".into(), "flag".into()));
    assert_eq!(told("fetches"), (6.into(), "environment".into()));
    assert_eq!(told("log"), ("debug".into(), "environment".into()));
    assert_eq!(told("run"), ("/run/elsewhere".into(), "file".into()));
    assert_eq!(told("gap"), ("64KiB".into(), "default".into()));
    assert_eq!(printed["file"], path.canonicalize().unwrap().to_str().unwrap());

    let text = stdout(&rafsd(&args[..6], &[]));
    assert!(text.lines().any(|line| line.starts_with("deadline = \"7s\" ") && line.ends_with("# flag")), "{text}");
}

#[test]
fn what_is_printed_is_a_config_file() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["config", "print", "--defaults"][..], &["config", "print"]] {
        let path = file(dir.path(), &stdout(&rafsd(args, &[])));
        let output = rafsd(&["config", "check", path.to_str().unwrap()], &[]);
        assert_eq!(stdout(&output), format!("{}: {} settings, no mistakes\n", path.display(), TABLE.len()));
    }
}

#[test]
fn mistakes_in_the_environment_are_told_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, "deadlin = 1\n").unwrap();
    let check = |environment: &[(&str, &str)]| {
        let output = rafsd(&["config", "check", path.to_str().unwrap()], environment);
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let environment = [("RAFSD_DEADLINE", "soon"), ("RAFSD_CACHE_LIMITS", "3GiB"), ("RAFSD_ELSEWHERE", "x")];
    let (is_well, told) = check(&environment);
    for text in [
        "RAFSD_DEADLINE: \"soon\" is not a length of time",
        "RAFSD_CACHE_LIMITS is no variable of rafsd; did you mean RAFSD_CACHE_LIMIT?",
        "unknown key \"deadlin\"",
    ] {
        assert!(told.contains(text), "{told}");
    }
    assert!(!is_well && !told.contains("ELSEWHERE"), "{told}");
    std::fs::write(&path, "deadline = 1\n").unwrap();
    assert!(check(&[("RAFSD_DEADLINE", "3s")]).0, "nothing is wrong");
    let (is_well, told) = check(&environment[..1]);
    assert!(!is_well && !told.contains("no mistakes"), "{told}");
}

#[test]
fn a_check_tells_every_mistake_and_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "dedline = 1\ngap = \"wide\"\nmemory = \"16MiB\"\n");

    let output = rafsd(&["config", "check", path.to_str().unwrap()], &[]);

    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stdout).unwrap();
    let name = path.display();
    assert_eq!(
        told,
        format!(
            "{name}: line 1: unknown key \"dedline\"; did you mean \"deadline\"?\n\
             {name}: line 2: gap: \"wide\" is not a size such as 64MiB\n\
             {name}: memory_reserve: it must not be more than memory\n"
        )
    );
}

#[test]
fn a_daemon_does_not_start_with_wrong_settings() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "fetch = 1\n");
    let run = dir.path().join("run");
    let serve = |args: &[&str], env: &[(&str, &str)]| {
        let output = rafsd(&[&["serve", "--run", run.to_str().unwrap()], args].concat(), env);
        let told = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), told.lines().next().unwrap_or_default().to_owned())
    };

    let (code, told) = serve(&["--config", path.to_str().unwrap()], &[]);
    assert_eq!(code, Some(1));
    assert!(told.contains("line 1: unknown key \"fetch\"; did you mean \"fetches\"?"), "{told}");
    let (code, told) = serve(&["--deadline", "0"], &[]);
    assert_eq!((code, told.as_str()), (Some(2), "error: --deadline: 0 is out of range; it must be from 100ms to 1h"));
    let (code, told) = serve(&[], &[("RAFSD_BACKEND", "fuse")]);
    let wanted = "error: RAFSD_BACKEND: \"fuse\" is not a list of cachefiles, fanotify, fuse-device and fuse-tree";
    assert_eq!((code, told.as_str()), (Some(2), wanted));
    assert_eq!(serve(&["--config", "/nowhere.toml"], &[]).0, Some(1));
    assert!(!run.exists(), "nothing was made");
}

#[test]
fn clients_look_for_the_daemon_where_the_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    // A mistake elsewhere in the file is the daemon's to tell.
    let path = file(dir.path(), &format!("run = {:?}\nnonsense = 1\n", run.to_str().unwrap()));

    let output = rafsd(&["stop"], &[("RAFSD_CONFIG", path.to_str().unwrap())]);

    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains(run.to_str().unwrap()), "{told}");
}

#[test]
fn tables_of_registries_are_checked_and_printed_without_the_values_of_headers() {
    let dir = tempfile::tempdir().unwrap();
    let text = "fetches = 3\n[registry.\"docker.io\".host.\"https://m.example\"]\nca = \"own.pem\"\n\
                [registry.\"docker.io\".host.\"https://m.example\".header]\nx-key = \"hunter2\"\n";
    let path = file(dir.path(), text);
    let check = |path: &Path| stdout(&rafsd(&["config", "check", path.to_str().unwrap()], &[]));
    assert_eq!(check(&path), format!("{}: 1 settings, 1 registry, no mistakes\n", path.display()));

    let printed = stdout(&rafsd(&["config", "print", "--config", path.to_str().unwrap()], &[]));
    assert!(printed.contains("[registry.\"docker.io\".host.\"https://m.example/v2\"]\n"), "{printed}");
    let own = path.canonicalize().unwrap().with_file_name("own.pem");
    assert!(printed.contains(&format!("ca = [\"{}\"]\n", own.display())), "{printed}");
    assert!(!printed.contains("hunter2"), "{printed}");
    fs::write(&path, printed).unwrap();
    assert_eq!(check(&path), format!("{}: {} settings, 1 registry, no mistakes\n", path.display(), TABLE.len()));
    let json = stdout(&rafsd(&["config", "print", "--config", path.to_str().unwrap(), "--json"], &[]));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["registries"]["docker.io"][0]["host"], "https://m.example/v2");

    fs::write(&path, "[registry.\"docker.io\".host.\"https://m.example\"]\nskip_verfy = true\n").unwrap();
    let output = rafsd(&["config", "check", path.to_str().unwrap()], &[]);
    let told = String::from_utf8(output.stdout).unwrap();
    let wanted = "line 2: registry \"docker.io\": unknown key \"skip_verfy\"; did you mean \"skip_verify\"?\n";
    assert_eq!((output.status.code(), told), (Some(1), format!("{}: {wanted}", path.display())));
}

#[test]
fn a_configuration_of_nydusd_becomes_one_of_ours_and_its_secrets_a_file_for_its_owner() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (nydusd, out, auth) = (at("nydusd.json"), at("config.toml"), at("auth.json"));
    let text = r#"{"device": {"backend": {"type": "registry", "config": {"host": "r.example", "repo": "a",
        "auth": "bWU6aHVudGVyMg==", "scheme": "http"}}, "cache": {"type": "blobcache", "config": {"work_dir": "/c"}}},
        "mode": "direct", "fs_prefetch": {"enable": true}}"#;
    fs::write(&nydusd, text).unwrap();

    let output = rafsd(&["config", "import-nydusd", &nydusd], &[]);
    let told = String::from_utf8(output.stderr.clone()).unwrap();
    let printed = stdout(&output);
    assert!(
        printed.starts_with("# rafsd mount BOOTSTRAP DIR --blobs docker://r.example/a --prefetch=all\n"),
        "{printed}"
    );
    assert!(told.starts_with("device.backend.config.auth: not shown; `rafsd credentials set r.example/a "), "{told}");
    assert!(!printed.contains("bWU6") && !told.contains("bWU6"));

    let args = ["config", "import-nydusd", &nydusd, "-o", &out, "--with-credentials", &auth];
    assert_eq!(stdout(&rafsd(&args, &[])), "rafsd mount BOOTSTRAP DIR --blobs docker://r.example/a --prefetch=all\n");
    assert_eq!(
        stdout(&rafsd(&["config", "check", &out], &[])),
        format!("{out}: 2 settings, 1 registry, no mistakes\n")
    );
    assert!(fs::read_to_string(&out).unwrap().contains(&format!("docker_config = \"{auth}\"\n")));
    assert_eq!(fs::metadata(&auth).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(fs::read_to_string(&auth).unwrap().contains("bWU6aHVudGVyMg=="));

    let told = String::from_utf8(rafsd(&args, &[]).stderr).unwrap();
    assert!(told.contains(&format!("cannot write {auth}: File exists")), "nothing is overwritten: {told}");
    assert!(Path::new(&out).exists() && Path::new(&auth).exists());
    fs::write(&nydusd, "backend: local\n").unwrap();
    let output = rafsd(&["config", "import-nydusd", &nydusd], &[]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
}

#[test]
fn an_import_that_fails_leaves_no_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (nydusd, out, auth) = (at("nydusd.json"), at("config.toml"), at("auth.json"));
    let text = r#"{"device": {"backend": {"type": "registry", "config": {"host": "r.example", "repo": "a",
        "auth": "bWU6aHVudGVyMg=="}}}, "mode": "direct"}"#;
    fs::write(&nydusd, text).unwrap();
    let import = |out: &str, auth: &str| {
        let output = rafsd(&["config", "import-nydusd", &nydusd, "-o", out, "--with-credentials", auth], &[]);
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let names = || {
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };

    let (code, told) = import(&at("nowhere/config.toml"), &auth);
    assert_eq!((code, names()), (Some(1), vec!["nydusd.json".into()]), "{told}");
    assert!(told.contains(&format!("cannot write {}: No such file", at("nowhere/config.toml"))), "{told}");

    let (code, told) = import(&out, &at("./config.toml"));
    assert_eq!((code, names()), (Some(1), vec!["nydusd.json".into()]), "{told}");
    assert!(told.contains("--out and --with-credentials name the same file"), "{told}");

    fs::write(&out, "mine").unwrap();
    assert_eq!(import(&out, &auth).0, Some(1));
    assert_eq!((fs::read_to_string(&out).unwrap().as_str(), Path::new(&auth).exists()), ("mine", false));

    fs::remove_file(&out).unwrap();
    assert_eq!(import(&out, &auth).0, Some(0));
    assert_eq!(names(), ["auth.json", "config.toml", "nydusd.json"]);
}
