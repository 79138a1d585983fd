//! Mounting, listing, unmounting, and what is left afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::fixture::{FILE, Fixture, content, drop_caches};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("doctor_finds_the_backend_under_test", Place::Both, doctor_finds_the_backend_under_test),
    case(
        "who_has_too_few_descriptors_is_told_so_and_nothing_else",
        Place::Host,
        who_has_too_few_descriptors_is_told_so,
    ),
    case("a_client_that_stalls_does_not_hold_up_a_stop", Place::Both, a_client_that_stalls_does_not_hold_up_a_stop),
    case(
        "the_demo_runs_and_cleans_up_even_when_interrupted",
        Place::Host,
        the_demo_runs_and_cleans_up_even_when_interrupted,
    ),
    case("umount_by_anybody_is_noticed", Place::Both, umount_by_anybody_is_noticed),
    case("a_busy_mount_is_refused_and_then_lazily_taken", Place::Both, a_busy_mount_is_refused_and_then_lazily_taken),
    case("mounting_starts_a_daemon_that_leaves_when_idle", Place::Both, mounting_starts_a_daemon_that_leaves_when_idle),
    case("what_others_do_at_a_mount_point_is_left_alone", Place::Here, what_others_do_at_a_mount_point_is_left_alone),
    case("bad_requests_name_the_thing_and_leave_nothing", Place::Both, bad_requests_name_the_thing_and_leave_nothing),
    case("anybody_mounts_a_registered_image", Place::Guest, anybody_mounts_a_registered_image),
    case(
        "a_settled_blob_has_no_events_and_no_daemon_time",
        Place::Host,
        a_settled_blob_has_no_events_and_no_daemon_time,
    ),
];

fn doctor_finds_the_backend_under_test(ctx: &Ctx) -> Outcome {
    let cache = ctx.dir.join("cache");
    let output = Command::new(&ctx.rafsd).args(["doctor", "--json", "--cache"]).arg(&cache).output()?;

    ensure!(output.status.success(), "{output:?}");
    let host: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let is_first = matches!(ctx.backend, Backend::Fanotify | Backend::Cachefiles);
    ensure!(!is_first || host["choice"] == ctx.backend.name(), "{host}");
    let finding = match ctx.backend {
        Backend::Fanotify => "pre-content-events",
        Backend::Cachefiles => "cachefiles",
        Backend::FuseDevice => "fuse-device",
        Backend::FuseTree => "fuse",
    };
    let finding = host["findings"].as_array().into_iter().flatten().find(|it| it["name"] == finding);
    ensure!(finding.is_some_and(|finding| finding["works"] == true), "{host}");
    ensure!(!cache.exists(), "the directory that doctor made is left");
    let memory = tempfile::tempdir_in("/dev/shm")?;
    let elsewhere = memory.path().join("cache");
    let elsewhere = Command::new(&ctx.rafsd).args(["doctor", "--json", "--cache"]).arg(elsewhere).output()?;
    let host: serde_json::Value = serde_json::from_slice(&elsewhere.stdout)?;
    let events = host["findings"].as_array().into_iter().flatten().find(|f| f["name"] == "pre-content-events");
    ensure!(events.is_some_and(|finding| finding["works"] == false), "events on tmpfs: {host}");
    Ok(())
}

fn who_has_too_few_descriptors_is_told_so(ctx: &Ctx) -> Outcome {
    let cache = ctx.dir.join("cache");
    let findings = |limit: u32| -> anyhow::Result<Option<Vec<serde_json::Value>>> {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}")).arg(&ctx.rafsd).args(["doctor", "--json", "--cache"]).arg(&cache);
        let output = command.output()?;
        // With too few it cannot even begin.
        let Ok(host) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else { return Ok(None) };
        Ok(Some(host["findings"].as_array().context("findings")?.clone()))
    };
    let all = findings(1024)?.context("with enough of them")?;
    let mut told = 0;
    for limit in 4..40 {
        for (finding, expected) in findings(limit)?.iter().flatten().zip(&all) {
            let (detail, remedy) = (finding["detail"].as_str().unwrap_or_default(), finding["remedy"].as_str());
            let is_told = remedy.is_some_and(|remedy| remedy.contains("more open files"));
            // What needs another finding is not tried.
            let is_skipped = detail.starts_with("not tried");
            ensure!(finding == expected || is_told || is_skipped, "with {limit} descriptors: {finding}");
            told += usize::from(is_told && finding["name"] == "pre-content-events");
        }
    }
    let has_events = all.iter().any(|finding| finding["name"] == "pre-content-events" && finding["works"] == true);
    ensure!(told > 0 || !has_events, "it never came to the events");
    Ok(())
}

fn umount_by_anybody_is_noticed(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let dir = fixture.mount("mnt")?;
    ensure!(fixture.list()?.len() == 1, "listed");

    umount(&dir)?;

    fixture.wait_for_list("empty", <[_]>::is_empty)?;
    let again = fixture.mount("mnt")?;
    ensure!(fs::read(again.join("0"))? == content(0, FILE), "mounted again");
    fixture.finish()
}

fn a_busy_mount_is_refused_and_then_lazily_taken(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let dir = fixture.mount("mnt")?;
    let mut open = fs::File::open(dir.join("0"))?;
    let text = dir.to_str().context("UTF-8")?;

    let refused = fixture.command(&["umount", text])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains(text) && said.contains("--lazy"), "{said}");

    let said = fixture.must(&["umount", "--lazy", text])?;
    ensure!(said.contains("still served"), "nothing is said of the open file: {said:?}");
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "still in the tree");
    let mut got = Vec::new();
    std::io::Read::read_to_end(&mut open, &mut got)?;
    ensure!(got == content(0, FILE), "the open file is still served");
    drop(open);
    fixture.finish()
}

fn a_client_that_stalls_does_not_hold_up_a_stop(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let half =
        b"POST /v1/mounts HTTP/1.1\r\nHost: rafsd\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{";
    for signals in [1, 2] {
        let mut client = UnixStream::connect(fixture.run().join("rafsd.sock"))?;
        client.write_all(half)?;
        // An answer to a later client: the daemon has taken up the first one.
        fixture.list()?;
        let clock = Instant::now();
        if signals == 2 {
            kill(Pid::from_raw(i32::try_from(fixture.pid())?), Signal::SIGTERM)?;
            let socket = fixture.run().join("rafsd.sock");
            wait_until("the stop begins", || Ok(!socket.exists()))?;
        }
        fixture.stop()?;
        let took = clock.elapsed();
        let grace = rafsd::daemon::control::GRACE;
        ensure!((took >= grace) == (signals == 1), "{signals} signal(s): stopped after {took:?}");
        drop(client);
        fixture.start(&[])?;
    }
    fixture.finish()
}

fn the_demo_runs_and_cleans_up_even_when_interrupted(ctx: &Ctx) -> Outcome {
    let source = ctx.dir.join("source");
    fs::create_dir_all(source.join("bin"))?;
    // Under a name that the demo looks for, with arguments that any shell takes.
    fs::copy(fs::canonicalize("/bin/sh")?, source.join("bin/bash"))?;
    (0..3).try_for_each(|i| fs::write(source.join(i.to_string()), content(i, FILE)))?;
    let demo = |delay: &str| {
        let mut command = Command::new(&ctx.rafsd);
        command.args(["demo", "--json", "--delay", delay, "--scratch"]).arg(&ctx.dir);
        command.arg("--source").arg(&source).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let ensure_clean = || -> Outcome {
        let left = crate::mounts::below(&ctx.dir)?;
        ensure!(left.is_empty(), "mounts are left: {left:?}");
        let names = fs::read_dir(&ctx.dir)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>()?;
        ensure!(names == ["source"], "left: {names:?}");
        Ok(())
    };

    let output = demo("1").output()?;
    ensure!(output.status.success(), "{output:?}");
    let show: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let number = |value: &serde_json::Value| value.as_u64().context("a number");
    let stored = number(&show["build"]["blobs"][0]["stored_bytes"])?;
    let fetched = number(&show["fetched_bytes"])?;
    ensure!(fetched > 0 && fetched < stored, "fetched {fetched} of {stored}");
    ensure!(number(&show["pull"]["bytes"])? >= stored, "{show}");
    ensure!(show["program"][0] == "bin/bash" && show["image"]["backend"] == ctx.backend.name(), "{show}");
    ensure_clean()?;

    // While it waits for its own cold read, and while a whole image is fetched.
    for (signal, moment, status) in [(Signal::SIGINT, "mounted", 130), (Signal::SIGTERM, "for comparison", 143)] {
        let mut child = demo("700").spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let mut lines = BufReader::new(child.stderr.take().context("piped")?).lines();
        let reached = lines.by_ref().map_while(Result::ok).any(|line| line.starts_with(moment));
        ensure!(reached, "the demo never says {moment:?}");
        kill(pid, signal)?;
        // A second one, in the middle of the cleaning up.
        let noticed = lines.by_ref().map_while(Result::ok).any(|line| line.starts_with("interrupted"));
        ensure!(noticed, "{signal} goes unnoticed");
        kill(pid, Signal::SIGINT)?;
        let rest: Vec<_> = lines.map_while(Result::ok).collect();
        let ended = child.wait()?;
        ensure!(ended.code() == Some(status), "ended with {ended}: {rest:?}");
        ensure_clean().with_context(|| format!("after {signal} when {moment}: {rest:?}"))?;
    }
    Ok(())
}

fn wait_until(what: &str, holds: impl Fn() -> anyhow::Result<bool>) -> Outcome {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds()? {
        ensure!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn mounting_starts_a_daemon_that_leaves_when_idle(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.stop()?;
    let cache = fixture.cache();
    let dir = fixture.mount_with("mnt", &["--cache", cache.to_str().context("UTF-8")?])?;
    ensure!(fs::read(dir.join("0"))? == content(0, FILE), "served by the started daemon");

    fixture.umount(&dir)?;

    let sockets = ["rafsd.sock", "keeper.sock", "keeper-spare.sock"].map(|name| fixture.run().join(name));
    wait_until("the daemon leaves", || Ok(!sockets.iter().any(|socket| socket.exists())))?;
    // The socket goes first, the process a moment later.
    std::thread::sleep(Duration::from_secs(1));
    Ok(())
}

fn bad_requests_name_the_thing_and_leave_nothing(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let (bootstrap, url) = (fixture.bootstrap(), fixture.server.url());
    let dir = ctx.dir.join("mnt");
    fs::create_dir(&dir)?;
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let empty = ctx.dir.join("empty");
    fs::create_dir(&empty)?;
    let garbage = ctx.dir.join("garbage");
    fs::write(&garbage, content(9, 8192))?;
    let cut = ctx.dir.join("cut");
    fs::write(&cut, &fs::read(&bootstrap)?[..4096])?;
    let (good, dir_text, missing) = (text(&bootstrap), text(&dir), text(&ctx.dir.join("missing")));
    let refusals: &[(&[&str], &str)] = &[
        (&["mount", &missing, &dir_text, "--blobs", &url], &missing),
        (&["mount", &good, &missing, "--blobs", &url], &missing),
        (&["mount", &text(&garbage), &dir_text, "--blobs", &url], "RAFS v6 bootstrap"),
        (&["mount", &text(&cut), &dir_text, "--blobs", &url], "RAFS v6 bootstrap"),
        (&["mount", &good, &dir_text, "--blobs", &text(&empty)], "is not at"),
        (&["mount", &good, &dir_text, "--blobs", "ftp://host/x"], "http"),
        (&["mount", &good, &dir_text, "--blobs", "http://127.0.0.1:9/x"], "127.0.0.1:9"),
        (&["umount", &dir_text], &dir_text),
        (&["mount", &good, "/", "--blobs", &url], "its own files"),
        (&["mount", &good, &text(&fixture.cache()), "--blobs", &url], "its own files"),
        (&["mount", &good, &text(&fixture.run().join("served")), "--blobs", &url], "its own files"),
    ];

    let before = left_behind(&fixture)?;
    for (args, expected) in refusals {
        let output = fixture.command(args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{args:?} ended with {}: {said}", output.status);
        ensure!(said.contains(expected), "{args:?} says {said:?}, not {expected:?}");
        ensure!(fixture.list()?.is_empty() && crate::mounts::below(&ctx.dir)?.is_empty(), "{args:?} left something");
        let after = left_behind(&fixture)?;
        ensure!(after == before, "{args:?} left {:?}", after.difference(&before));
    }
    let mounted = fixture.mount("mnt")?;
    ensure!(fs::read(mounted.join("0"))? == content(0, FILE), "the daemon is well");
    ensure!(left_behind(&fixture)?.len() > before.len(), "what is mounted would show");
    fixture.finish()
}

fn what_others_do_at_a_mount_point_is_left_alone(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let dir = fixture.mount("mnt")?;
    let place = dir.to_str().context("UTF-8")?;
    let cover = || mount(None::<&str>, &dir, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("tmpfs");
    let precious = dir.join("precious");

    cover()?;
    fs::write(&precious, "precious")?;
    let refused = fixture.command(&["umount", place])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("something else is mounted over"), "{said}");
    ensure!(precious.exists(), "another one's file system was unmounted");
    umount(&dir)?;
    ensure!(fs::read(dir.join("0"))? == content(0, FILE), "what is beneath is served on");

    // Somebody unmounts it, a file of it is open, and somebody else is there by now.
    let open = fs::File::open(dir.join("0"))?;
    umount2(&dir, MntFlags::MNT_DETACH)?;
    cover()?;
    fs::write(&precious, "precious")?;
    let told = fixture.must(&["umount", place])?;
    ensure!(told.contains("still served") && precious.exists(), "{told}");
    umount(&dir)?;
    let again = fixture.mount("mnt").context("the place is free")?;
    umount2(&again, MntFlags::MNT_DETACH)?;
    fixture.mount("mnt").context("and again, whoever unmounted")?;
    drop_caches()?;
    let mut byte = [0];
    open.read_exact_at(&mut byte, 1 << 20)?;
    ensure!(byte[0] == content(0, FILE)[1 << 20], "the open file is served on");
    drop(open);
    // By another of its names.
    let link = ctx.dir.join("link");
    std::os::unix::fs::symlink(&dir, &link)?;
    fixture.must(&["umount", link.to_str().context("UTF-8")?])?;
    // The end of a daemon.
    fixture.mount("mnt")?;
    cover()?;
    fs::write(&precious, "precious")?;
    fixture.stop()?;
    ensure!(precious.exists(), "the end of a daemon unmounted another one's file system");
    umount(&dir)?;
    fixture.start(&[])?;
    // Complete, it may need no daemon any more.
    umount(&dir).context("what was beneath")?;
    fixture.finish()
}

/// Files of a daemon that are about images: copies of bootstraps, blobs, and records.
pub(super) fn left_behind(fixture: &Fixture<'_>) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![fixture.cache().join("bootstraps"), fixture.cache().join("v1"), fixture.run().join("served")];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(&path)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?);
        } else if path.exists() {
            found.insert(path);
        }
    }
    Ok(found)
}

fn anybody_mounts_a_registered_image(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let (bootstrap, url) = (fixture.bootstrap(), fixture.server.url());
    let bootstrap = bootstrap.to_str().context("UTF-8")?;
    for (id, domain) in [("alone", None), ("one", Some("shared")), ("two", Some("shared"))] {
        let mut args = vec!["register", bootstrap, "--blobs", &url, "--id", id];
        args.extend(domain.into_iter().flat_map(|domain| ["--domain", domain]));
        let said = fixture.must(&args)?;
        ensure!(said.contains(&format!("fsid={id}")), "{said}");
        let dir = ctx.dir.join(id);
        fs::create_dir(&dir)?;
        let options = domain.map_or(format!("fsid={id}"), |domain| format!("fsid={id},domain_id={domain}"));
        mount(None::<&str>, &dir, Some("erofs"), MsFlags::MS_RDONLY, Some(options.as_str())).context("mount")?;
        fixture.server.reset_stats();
        ensure!(fs::read(dir.join("0"))? == content(0, FILE), "{id}");
        let fetched = fixture.fetched().len();
        ensure!((fetched == 0) == (id == "two"), "{id} fetched {fetched} ranges");
    }

    let busy = fixture.command(&["unregister", "--id", "none"])?;
    ensure!(!busy.status.success(), "an unknown name was forgotten");
    fixture.must(&["unregister", "--id", "alone"])?;
    drop_caches()?;
    ensure!(fs::read(ctx.dir.join("alone/0"))? == content(0, FILE), "a mounted image stays served");
    for id in ["alone", "one", "two"] {
        umount(&ctx.dir.join(id))?;
    }
    fixture.finish()
}

fn a_settled_blob_has_no_events_and_no_daemon_time(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 3)?;
    let mount = fixture.mount_with("mnt", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| {
        images.iter().all(|image| image["devices"][0]["stats"]["complete"] == true)
    })?;
    drop_caches()?;
    let before = (events(&fixture)?, cpu_ticks(fixture.pid())?);

    for number in 0..3 {
        ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number}");
    }

    let after = (events(&fixture)?, cpu_ticks(fixture.pid())?);
    ensure!(before.0 == after.0, "events went from {} to {}", before.0, after.0);
    ensure!(after.1 - before.1 <= 2, "the daemon worked for {} ticks", after.1 - before.1);
    fixture.finish()
}

/// Events of the daemon so far, by its control socket.
pub(crate) fn events(fixture: &Fixture<'_>) -> anyhow::Result<u64> {
    let client = rafsd::daemon::client::Client::new(&fixture.run())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let info = runtime.block_on(client.info())?;
    Ok(info.events_hit + info.events_missed)
}

/// Processor time of a process in clock ticks.
fn cpu_ticks(pid: u32) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat[stat.rfind(')').context("a name")? + 2..].split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}
