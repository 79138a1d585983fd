//! What can be seen of a running daemon: status, metrics, logs, the live view; and who may see it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::libc::EIO;
use rafsd::net::server::Fault;
use serde_json::{Value, json};

use super::fixture::{FILE, Fixture, content, read_byte};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("status_tells_what_is_here_and_what_is_not", Place::Both, status_tells_what_is_here_and_what_is_not),
    case("what_cannot_be_served_is_told_and_unmounted", Place::Both, what_cannot_be_served_is_told_and_unmounted),
    case("status_tells_who_waits_and_why", Place::Here, status_tells_who_waits_and_why),
    case("answers_are_as_the_schema_says", Place::Here, answers_are_as_the_schema_says),
    case("metrics_count_what_happened", Place::Both, metrics_count_what_happened),
    case("metrics_are_told_on_the_loopback_only", Place::Host, metrics_are_told_on_the_loopback_only),
    case("a_successor_counts_what_it_took_over", Place::Host, a_successor_counts_what_it_took_over),
    case("a_failed_read_is_one_line_with_its_request", Place::Here, a_failed_read_is_one_line_with_its_request),
    case("the_log_level_changes_while_running", Place::Host, the_log_level_changes_while_running),
    case("nothing_told_holds_a_secret", Place::Host, nothing_told_holds_a_secret),
    case("strangers_are_refused_whatever_the_modes", Place::Host, strangers_are_refused_whatever_the_modes),
    case("top_shows_a_frame", Place::Host, top_shows_a_frame),
    case("top_gives_the_terminal_back", Place::Host, top_gives_the_terminal_back),
];

/// The body of `GET path`, and the head before it.
fn get(run: &Path, path: &str) -> anyhow::Result<(String, String)> {
    let mut socket = UnixStream::connect(run.join("rafsd.sock"))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: rafsd\r\nConnection: close\r\n\r\n")?;
    answer(socket)
}

fn answer(mut from: impl std::io::Read) -> anyhow::Result<(String, String)> {
    let mut text = String::new();
    from.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("an answer has a head")?;
    Ok((head.to_owned(), body.to_owned()))
}

fn get_json(run: &Path, path: &str) -> anyhow::Result<Value> {
    let (head, body) = get(run, path)?;
    serde_json::from_str(&body).with_context(|| format!("{path}: {head}\n{body}"))
}

/// The only line of `log` that contains `text`, as an object.
fn only_line(log: &str, text: &str) -> anyhow::Result<Value> {
    let lines: Vec<_> = log.lines().filter(|line| line.contains(text)).collect();
    ensure!(lines.len() == 1, "{} lines say {text:?}:\n{log}", lines.len());
    Ok(serde_json::from_str(lines[0])?)
}

/// The log behind its first `from` bytes, once `count` of its lines contain `text`: a reader has its
/// answer before the line about it is written.
fn log_with(fixture: &Fixture<'_>, from: usize, text: &str, count: usize) -> anyhow::Result<String> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let log = fixture.log()[from..].to_owned();
        if log.lines().filter(|line| line.contains(text)).count() >= count {
            return Ok(log);
        }
        ensure!(Instant::now() < until, "fewer than {count} lines say {text:?}:\n{log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads a byte far from those that earlier reads may have fetched ahead, and is denied.
fn read_denied(path: &Path) -> anyhow::Result<()> {
    let got = read_byte(path, 2 << 20);
    ensure!(got == Err(Some(EIO)), "{got:?}");
    Ok(())
}

fn status_tells_what_is_here_and_what_is_not(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    let dir = mount.to_str().context("UTF-8")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "file 0");

    let status: Value = serde_json::from_str(&fixture.must(&["status", "--json", dir])?)?;
    let total: u64 = 2 * FILE as u64;
    let health = &status["devices"][0]["health"];
    ensure!(status["state"] == "lazy" && status["backend"] == ctx.backend.name(), "{status}");
    ensure!(health["needed_bytes"] == total, "{health}");
    let present = health["present_bytes"].as_u64().context("a number")?;
    ensure!((FILE as u64..total).contains(&present), "{present} of {total} are here");
    let others = status["others"].as_array().context("a list")?;
    ensure!(others.len() == 3, "{status}");
    for other in others {
        let is_told = other["why_not"].as_str().is_some_and(|why| why.len() > 10);
        ensure!(other["backend"] != status["backend"] && is_told, "{other}");
    }
    ensure!(status["keeper_alive"] == true, "{status}");
    let text = fixture.must(&["status", dir])?;
    for words in
        ["lazy: what is missing is fetched", "kernel path", "not ", "waiting        no read", "errors         none"]
    {
        ensure!(text.contains(words), "{words:?} is not in\n{text}");
    }
    // By digest as well, and the whole daemon.
    let digest = status["image"].as_str().context("a digest")?;
    ensure!(fixture.must(&["status", &digest[..8]])? == fixture.must(&["status", dir])?, "by digest");
    ensure!(fixture.must(&["status"])?.contains("images         1 lazy"), "overview");
    ensure!(!fixture.command(&["status", "/nowhere"])?.status.success(), "nothing is mounted there");

    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "file 1");
    fixture.wait_for_list("completion", |images| images[0]["state"] == "complete")?;
    let text = fixture.must(&["status", dir])?;
    ensure!(text.contains("complete: ") && text.contains("(100%)"), "{text}");
    fixture.finish()
}

fn what_cannot_be_served_is_told_and_unmounted(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    let place = mount.to_str().context("UTF-8")?;
    fixture.kill()?;
    fs::remove_dir_all(fixture.cache().join("bootstraps"))?;
    fixture.start(&[])?;

    let (list, status) = (fixture.must(&["list"])?, fixture.command(&["status"])?);
    ensure!(list.contains(&format!("{place}: not served")) && fixture.list()?.is_empty(), "{list}");
    let said = String::from_utf8_lossy(&status.stdout);
    ensure!(status.status.code() == Some(1) && said.contains(place), "{said}");
    let status = fixture.command(&["status", place])?;
    let said = String::from_utf8_lossy(&status.stderr);
    ensure!(status.status.code() == Some(1) && said.contains("is not served"), "{said}");
    let counted = || number(&get(&fixture.run(), "/metrics")?.1, "rafsd_unserved_mounts");
    ensure!(counted()? == 1.0, "in the metrics");
    let cold = fs::read(mount.join("1"));
    ensure!(cold.is_err(), "{:?}", cold.map(|bytes| bytes[0]));
    fixture.umount(&mount)?;
    let until = Instant::now() + Duration::from_secs(10);
    while !fixture.info()?.unserved.is_empty() {
        ensure!(Instant::now() < until, "still told: {:?}", fixture.info()?.unserved);
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(counted()? == 0.0, "in the metrics, afterwards");
    let again = fixture.mount("mnt")?;
    ensure!(fs::read(again.join("1"))? == content(1, FILE), "mounted again");
    fixture.umount(&again)?;
    fixture.finish()
}

fn status_tells_who_waits_and_why(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--deadline", if ctx.in_guest { "20" } else { "3" }])?;
    let mount = fixture.mount("mnt")?;
    let dir = mount.to_str().context("UTF-8")?;
    fixture.server.set_fault(Fault::StallHead);

    let path = mount.join("0");
    let reader = std::thread::spawn(move || read_byte(&path, 0));
    let waits = |images: &[Value]| images[0]["devices"][0]["health"]["waiting"].as_u64() >= Some(1);
    fixture.wait_for_list("a waiting reader", waits)?;
    std::thread::sleep(Duration::from_millis(300));
    let health = fixture.list()?[0]["devices"][0]["health"].clone();
    ensure!(health["oldest_wait_ms"].as_u64().is_some_and(|ms| ms >= 300), "{health}");
    let text = fixture.must(&["status", dir])?;
    ensure!(text.contains("read, for ") || text.contains("the first for "), "{text}");

    ensure!(reader.join().expect("a reader") == Err(Some(EIO)), "past the deadline");
    let output = fixture.command(&["status", dir])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(!output.status.success() && text.contains("degraded: "), "{text}");
    ensure!(text.contains("units by cause: source ") && text.contains("(failing, "), "{text}");
    ensure!(text.contains("waiting        no read"), "{text}");

    fixture.server.set_fault(Fault::None);
    // That it was late is remembered for a moment.
    std::thread::sleep(Duration::from_millis(250));
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "after it came back");
    let text = fixture.must(&["status", dir])?;
    ensure!(!text.contains("degraded") && text.contains("works again"), "{text}");
    fixture.finish()
}

fn answers_are_as_the_schema_says(ctx: &Ctx) -> Outcome {
    let schema: Value = serde_json::from_str(include_str!("../../docs/api.schema.json"))?;
    let check = |name: &str, value: &Value| {
        let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
        compiler.add_resource("api.json", schema.clone()).map_err(|e| anyhow::anyhow!("{e}"))?;
        let index = compiler.compile(&format!("api.json#/$defs/{name}"), &mut schemas);
        let index = index.map_err(|e| anyhow::anyhow!("{e}"))?;
        schemas.validate(value, index).map_err(|e| anyhow::anyhow!("{name}: {e}\n{value}"))
    };
    let fixture = Fixture::files(ctx, 1)?;
    let (run, mount) = (fixture.run(), fixture.mount("mnt")?);
    fixture.server.set_fault(Fault::Status { code: 403, retry_after: None });
    read_denied(&mount.join("0"))?;
    fixture.server.set_fault(Fault::None);
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "after the fault");

    let images = get_json(&run, "/v1/mounts")?;
    check("ImageReport", &images[0])?;
    ensure!(images[0]["devices"][0]["health"]["last_error"].is_object(), "the error is told: {images}");
    check("Info", &get_json(&run, "/v1/info")?)?;
    check("Activity", &get_json(&run, "/v1/activity")?)?;
    check("LogRules", &get_json(&run, "/v1/log")?)?;
    check("Failure", &get_json(&run, "/v1/nowhere")?)?;
    ensure!(check("Info", &images[0]).is_err(), "the schema tells types apart");
    fixture.finish()
}

/// The number behind `series` in an exposition.
fn number(metrics: &str, series: &str) -> anyhow::Result<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {series} in\n{metrics}"))?.parse()?)
}

fn metrics_count_what_happened(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    let metrics = || get(&fixture.run(), "/metrics");
    let (head, before) = metrics()?;
    ensure!(head.contains("content-type: application/openmetrics-text"), "{head}");
    ensure!(read_byte(&mount.join("0"), 0) == Ok(content(0, FILE)[0]), "a byte of file 0");
    fixture.server.set_fault(Fault::Status { code: 403, retry_after: None });
    read_denied(&mount.join("1"))?;

    let (_, after) = metrics()?;
    let backend = ctx.backend.name();
    let source = format!("source=\"{}\"", fixture.server.url().trim_end_matches('/'));
    let gained = |series: &str| Ok::<_, anyhow::Error>(number(&after, series)? - number(&before, series)?);
    for (series, least) in [
        (format!("rafsd_reads_total{{backend=\"{backend}\",answer=\"filled\"}}"), 1.0),
        (format!("rafsd_reads_total{{backend=\"{backend}\",answer=\"denied\"}}"), 1.0),
        (format!("rafsd_read_duration_seconds_count{{backend=\"{backend}\"}}"), 2.0),
        ("rafsd_misses_total{class=\"on_demand\"}".to_owned(), 2.0),
        ("rafsd_read_queue_seconds_count".to_owned(), 1.0),
        ("rafsd_fetch_duration_seconds_count{class=\"on_demand\"}".to_owned(), 1.0),
        ("rafsd_land_duration_seconds_count{class=\"on_demand\"}".to_owned(), 1.0),
        ("rafsd_units_failed_total{cause=\"source\"}".to_owned(), 1.0),
        (format!("rafsd_source_reads_total{{{source},class=\"on_demand\",outcome=\"refused\"}}"), 1.0),
    ] {
        ensure!(gained(&series)? >= least, "{series}: {} more", gained(&series)?);
    }
    let bytes: f64 = ["on_demand", "prefetch"]
        .iter()
        .map(|class| gained(&format!("rafsd_source_bytes_total{{{source},class=\"{class}\"}}")))
        .sum::<anyhow::Result<f64>>()?;
    ensure!(bytes >= 1048576.0, "{bytes} bytes were fetched for a unit of 1 MiB");
    ensure!(number(&after, &format!("rafsd_reads_waiting{{backend=\"{backend}\"}}"))? == 0.0, "nobody waits");
    ensure!(number(&after, &format!("rafsd_images{{backend=\"{backend}\"}}"))? == 1.0, "one image");
    ensure!(number(&after, "rafsd_cache_bytes")? > 0.0, "the bootstrap is there at least");
    // The answers are those that the program says it counted.
    let reads = get_json(&fixture.run(), "/v1/activity")?["reads"].clone();
    let of = reads.as_array().and_then(|all| all.iter().find(|reads| reads["backend"] == backend)).context("reads")?;
    let denied = number(&after, &format!("rafsd_reads_total{{backend=\"{backend}\",answer=\"denied\"}}"))?;
    ensure!(of["denied"].as_f64() == Some(denied), "{of} and {denied}");
    fixture.server.set_fault(Fault::None);
    fixture.finish()
}

fn a_successor_counts_what_it_took_over(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    let counts = |run: &Path| {
        let (_, metrics) = get(run, "/metrics")?;
        let filled = "rafsd_adopted_reads_total{answer=\"filled\"}";
        let series = ["rafsd_adoptions_total", "rafsd_adopted_mounts_total", filled];
        series.iter().map(|series| number(&metrics, series)).collect::<anyhow::Result<Vec<_>>>()
    };
    ensure!(counts(&fixture.run())? == [0.0, 0.0, 0.0], "before: {:?}", counts(&fixture.run())?);
    fixture.server.set_fault(Fault::StallHead);
    let path = mount.join("0");
    let reader = std::thread::spawn(move || read_byte(&path, 0));
    let waits = |images: &[Value]| images[0]["devices"][0]["health"]["waiting"].as_u64() >= Some(1);
    fixture.wait_for_list("a waiting reader", waits)?;
    fixture.kill()?;
    fixture.server.set_fault(Fault::None);

    fixture.start(&[])?;

    ensure!(reader.join().expect("a reader") == Ok(content(0, FILE)[0]), "served by the successor");
    let after = counts(&fixture.run())?;
    ensure!(after[..2] == [1.0, 1.0] && after[2] >= 1.0, "after: {after:?}");
    fixture.umount(&mount)?;
    fixture.finish()
}

fn metrics_are_told_on_the_loopback_only(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.stop()?;
    let refused = fixture.start(&["--metrics-listen", "0.0.0.0:9660"]).err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(refused.contains("not of the loopback interface"), "{refused}");
    // A port that is free now; nobody else takes it in this moment.
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    fixture.start(&["--metrics-listen", &address.to_string()])?;

    let ask = |path: &str| {
        let mut socket = std::net::TcpStream::connect(address)?;
        write!(socket, "GET {path} HTTP/1.1\r\nHost: rafsd\r\nConnection: close\r\n\r\n")?;
        answer(socket)
    };
    let (head, body) = ask("/metrics")?;
    ensure!(head.starts_with("HTTP/1.1 200") && body.ends_with("# EOF\n"), "{head}\n{body}");
    let (head, _) = ask("/v1/info")?;
    ensure!(head.starts_with("HTTP/1.1 404"), "{head}");
    fixture.finish()
}

fn a_failed_read_is_one_line_with_its_request(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&[
        "--deadline",
        if ctx.in_guest { "10" } else { "2" },
        "--log-format",
        "json",
        "--log",
        "debug",
    ])?;
    let mount = fixture.mount("mnt")?;
    let denials = || -> anyhow::Result<usize> {
        let reads = get_json(&fixture.run(), "/v1/activity")?["reads"].clone();
        let reads = reads.as_array().context("a list")?;
        Ok(usize::try_from(reads.iter().filter_map(|reads| reads["denied"].as_u64()).sum::<u64>())?)
    };
    ensure!(denials()? == 0, "what the daemon denies itself, to try the way, is no reader's");
    fixture.server.set_fault(Fault::StallHead);
    read_denied(&mount.join("0"))?;

    let said = if ctx.backend == Backend::Cachefiles { "read failed" } else { "read denied" };
    // The reader may be gone before the last answer is counted and told.
    let until = Instant::now() + Duration::from_secs(5);
    let log = loop {
        let (log, denied) = (fixture.log(), denials()?);
        let told = log.lines().filter(|line| line.contains(said)).count();
        if told == denied && denied > 0 {
            break log;
        }
        ensure!(Instant::now() < until, "{told} lines for {denied} answers:\n{log}");
        std::thread::sleep(Duration::from_millis(10));
    };
    // The last may be half written.
    let lines =
        log.lines().filter(|line| line.contains(said)).filter_map(|line| serde_json::from_str::<Value>(line).ok());
    // The first who asked, who need not be the first who is told of: the kernel asks again at once.
    let line = lines.min_by_key(|line| line["fields"]["request"].as_u64()).context("a line")?;
    let fields = &line["fields"];
    let request = fields["request"].as_u64().context("a request")?;
    ensure!(request > 0 && fields["class"] == "on_demand", "{line}");
    ensure!(fields["decoded"].as_str().is_some_and(|range| range.contains('+')), "{line}");
    let error = fields["error"].as_str().context("an error")?;
    ensure!(error.contains("could not be fetched: ") && error.contains("in time"), "the causes: {error}");
    let [queue, service] = ["queue_ms", "service_ms"].map(|name| fields[name].as_u64());
    ensure!(queue < Some(1000) && service >= Some(1500), "it was the source: {line}");
    // The same number in the line of the source.
    only_line(&log, &format!("\"message\":\"not fetched\",\"request\":{request},"))?;
    fixture.server.set_fault(Fault::Status { code: 403, retry_after: None });
    // That it was late is remembered for a moment.
    std::thread::sleep(Duration::from_millis(250));
    let before = fixture.log().len();
    read_denied(&mount.join("0"))?;
    // The source says so, and the answer: the kernel may still be told of the first failure as well.
    let log = log_with(&fixture, before, "403", 2)?;
    let is_new = |line: &&str| line.contains(said) && line.contains("403");
    let denied: Value = serde_json::from_str(log.lines().find(is_new).context("a line")?)?;
    let request = denied["fields"]["request"].as_u64().context("a request")?;
    let line = only_line(&log, &format!("\"message\":\"not fetched\",\"request\":{request},"))?;
    ensure!(line["fields"]["error"].as_str().is_some_and(|error| error.contains("403")), "{line}");
    fixture.server.set_fault(Fault::None);
    fixture.finish()
}

fn the_log_level_changes_while_running(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fixture.must(&["log"])?.trim() == "rafsd=info,warn", "{}", fixture.must(&["log"])?);
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "file 0");
    ensure!(!fixture.log().contains("fetched"), "nothing is said at info:\n{}", fixture.log());

    ensure!(fixture.must(&["log", "debug"])?.trim() == "rafsd=debug,warn", "the rules are given back");
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "file 1");
    ensure!(fixture.log().contains("fetched"), "{}", fixture.log());
    let refused = fixture.command(&["log", "loud"])?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && text.contains("\"loud\" is not a log level"), "{text}");
    ensure!(get_json(&fixture.run(), "/v1/log")? == json!({"level": "rafsd=debug,warn"}), "nothing changed");
    fixture.finish()
}

fn nothing_told_holds_a_secret(ctx: &Ctx) -> Outcome {
    const SECRETS: [&str; 2] = ["hunter2", "s3cr3t"];
    let mut fixture = Fixture::files(ctx, 3)?;
    fixture.restart(&["--deadline", if ctx.in_guest { "10" } else { "2" }, "--log", "trace"])?;
    let url = fixture.server.url();
    let host = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
    let secret = format!("http://user:{}@{host}/?token={}", SECRETS[0], SECRETS[1]);
    let (dir, bootstrap) = (ctx.dir.join("mnt"), fixture.bootstrap());
    fs::create_dir(&dir)?;
    let [dir_text, bootstrap] = [&dir, &bootstrap].map(|path| path.to_str().unwrap_or_default().to_owned());
    fixture.must(&["mount", &bootstrap, &dir_text, "--blobs", &secret, "--backend", ctx.backend.name()])?;
    let mut told = Vec::new();
    ensure!(read_byte(&dir.join("0"), 0) == Ok(content(0, FILE)[0]), "a byte of file 0");
    let location = format!("http://user:{}@127.0.0.1:1/x?token={}", SECRETS[0], SECRETS[1]);
    for fault in [
        Fault::Status { code: 403, retry_after: None },
        Fault::Status { code: 500, retry_after: None },
        Fault::Redirect { location },
        Fault::Reset { after: 10 },
        Fault::StallHead,
    ] {
        fixture.server.set_fault(fault);
        read_denied(&dir.join("1"))?;
        told.push(get(&fixture.run(), "/v1/mounts")?.1);
        told.push(get(&fixture.run(), "/v1/activity")?.1);
    }
    fixture.server.set_fault(Fault::None);
    let again = fixture.command(&["mount", &bootstrap, &dir_text, "--blobs", &secret])?;
    ensure!(!again.status.success(), "something is mounted there");
    let bad = fixture.command(&["mount", &bootstrap, &dir_text, "--blobs", &secret.replace("http:", "ftp:")])?;
    ensure!(!bad.status.success(), "nobody speaks ftp");
    for output in [&again, &bad] {
        told.push(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    for path in ["/v1/info", "/metrics", "/v1/log"] {
        told.push(get(&fixture.run(), path)?.1);
    }
    for args in [&["status", &dir_text][..], &["status"], &["list"], &["top", "--once"], &["top", "--once", "--json"]] {
        let output = fixture.command(args)?;
        told.push(String::from_utf8([output.stdout, output.stderr].concat())?);
    }
    told.push(fixture.log());
    ensure!(fixture.log().contains("asking again"), "the log says much:\n{}", fixture.log());
    for text in &told {
        // What is said must name the server, or nothing was looked at.
        for secret in SECRETS {
            ensure!(!text.contains(secret), "{secret} in\n{text}");
        }
    }
    ensure!(told.iter().filter(|text| text.contains(&host)).count() > 10, "the source is told of");
    fixture.finish()
}

fn strangers_are_refused_whatever_the_modes(ctx: &Ctx) -> Outcome {
    const NOBODY: u32 = 65534;
    let fixture = Fixture::files(ctx, 1)?;
    let program = ctx.dir.join("rafsd");
    fs::copy(&ctx.rafsd, &program)?;
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    let mut dir = Some(ctx.dir.as_path());
    while let Some(at) = dir.filter(|at| *at != Path::new("/var/tmp") && at.parent().is_some()) {
        let mode = fs::metadata(at)?.permissions().mode();
        open(at, mode | 0o055)?;
        dir = at.parent();
    }
    open(&program, 0o755)?;
    let ask = || {
        let mut command = Command::new(&program);
        command.args(["list", "--run"]).arg(fixture.run()).uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
        let output = command.output()?;
        anyhow::Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let (done, text) = ask()?;
    ensure!(!done && text.contains("run as root"), "modes as they are: {text}");

    open(&fixture.run(), 0o755)?;
    open(&fixture.run().join("rafsd.sock"), 0o666)?;
    let (done, text) = ask()?;
    ensure!(!done && text.contains("user 65534 may not control this daemon"), "modes loosened: {text}");
    let (head, _) = get(&fixture.run(), "/v1/info")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "root still may: {head}");
    fixture.finish()
}

fn top_shows_a_frame(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "file 0");

    let frame = fixture.must(&["top", "--once"])?;
    ensure!(frame.lines().count() <= 24 && frame.lines().all(|line| line.chars().count() <= 80), "{frame}");
    for words in ["images: ", "latency   p50", "SOURCE", "IMAGE"] {
        ensure!(frame.contains(words), "{words} is not in\n{frame}");
    }
    let object: Value = serde_json::from_str(&fixture.must(&["top", "--once", "--json"])?)?;
    ensure!(object["rates"]["interval_ms"].as_u64() >= Some(900), "{object}");
    ensure!(object["activity"]["images"][0]["misses"].as_u64() >= Some(1), "{object}");
    let refused = fixture.command(&["top"])?;
    ensure!(!refused.status.success(), "there is no terminal");
    fixture.finish()
}

fn top_gives_the_terminal_back(ctx: &Ctx) -> Outcome {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};

    let fixture = Fixture::files(ctx, 1)?;
    for (how, keys) in [("q", Some(b"q")), ("Ctrl-C", Some(b"\x03")), ("SIGTERM", None)] {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave: OwnedFd = fs::File::options().read(true).write(true).open(Path::new(name.to_str()?))?.into();
        let modes = || anyhow::Ok(tcgetattr(&slave)?.local_modes);
        let before = modes()?;
        let mut command = Command::new(&ctx.rafsd);
        command.args(["top", "--run"]).arg(fixture.run()).stdin(slave.try_clone()?).stdout(slave.try_clone()?);
        let mut top = command.spawn()?;
        drop(command);
        let mut terminal = fs::File::from(master);
        let mut shown = Vec::new();
        let mut until = |words: &str| {
            let mut buffer = [0; 4096];
            while !String::from_utf8_lossy(&shown).contains(words) {
                let len = terminal.read(&mut buffer)?;
                shown.extend_from_slice(&buffer[..len]);
            }
            anyhow::Ok(())
        };
        until("q quits")?;
        ensure!(!modes()?.intersects(LocalModes::ECHO | LocalModes::ICANON), "{how}: keys come one by one");
        match keys {
            Some(key) => drop(rustix::io::write(&terminal, key)?),
            None => nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(top.id())?),
                nix::sys::signal::Signal::SIGTERM,
            )?,
        }
        let ends = Instant::now() + Duration::from_secs(10);
        while top.try_wait()?.is_none() {
            ensure!(Instant::now() < ends, "{how} does not end it");
            std::thread::sleep(Duration::from_millis(10));
        }
        ensure!(top.wait()?.success(), "{how}");
        ensure!(modes()? == before, "{how}: the terminal is not as it was");
        let mut rest = [0; 65536];
        let len = terminal.read(&mut rest)?;
        shown.extend_from_slice(&rest[..len]);
        let shown = String::from_utf8_lossy(&shown);
        ensure!(shown.starts_with("\x1b[?1049h") && shown.contains("\x1b[?1049l"), "{how}: {shown:?}");
    }
    fixture.finish()
}
