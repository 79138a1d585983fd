//! Several upgrades at the same time: one takes place, and each command tells what happened.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::daemon::keeper;
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches};
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "upgrades_at_the_same_time_are_one",
        needs: NEEDS,
        place: Place::Here,
        run: upgrades_at_the_same_time_are_one,
    },
    Case {
        name: "an_upgrade_to_another_program_is_told_from_this_one",
        needs: NEEDS,
        place: Place::Host,
        run: an_upgrade_to_another_program,
    },
    Case {
        name: "a_program_that_cannot_go_on_is_refused_and_nothing_ends",
        needs: NEEDS,
        place: Place::Host,
        run: a_program_that_cannot_go_on,
    },
    Case {
        name: "a_program_that_dies_of_its_start_makes_way_for_the_one_before",
        needs: NEEDS,
        place: Place::Host,
        run: a_program_that_dies_of_its_start,
    },
    Case {
        name: "a_program_that_dies_after_it_took_over_makes_way_as_well",
        needs: NEEDS,
        place: Place::Here,
        run: a_program_that_dies_after_it_took_over,
    },
    Case {
        name: "an_upgrade_to_settings_that_are_wrong_is_refused",
        needs: NEEDS,
        place: Place::Host,
        run: an_upgrade_to_wrong_settings,
    },
];

/// Runs these commands at once. What each has printed, or why it failed.
fn at_once(fixture: &Fixture<'_>, commands: &[Vec<&str>]) -> anyhow::Result<Vec<Result<Value, String>>> {
    let start = |words: &Vec<&str>| {
        let mut command = Command::new(&fixture.ctx.rafsd);
        command.args(["upgrade", "--json"]).args(words).arg("--run").arg(fixture.run());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let children = commands.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    let end = |child: std::process::Child| {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            return Ok(Err(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        Ok(Ok(serde_json::from_slice(&output.stdout)?))
    };
    children.into_iter().map(end).collect()
}

/// Ends a daemon that a keeper started.
fn stop(mut fixture: Fixture<'_>) -> Outcome {
    fixture.forget_daemon()?;
    fixture.must(&["stop"])?;
    let until = Instant::now() + Duration::from_secs(10);
    while !keeper::statuses(&fixture.run()).is_empty() {
        ensure!(Instant::now() < until, "keepers are left");
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(crate::mounts::below(&fixture.ctx.dir)?.is_empty(), "still mounted");
    Ok(())
}

fn an_upgrade_to_wrong_settings(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let config = ctx.dir.join("config.toml");
    fs::write(&config, "deadline = \"50s\"\n")?;
    fixture.restart(&["--restart", "keepers", "--config", config.to_str().context("UTF-8")?])?;
    let mount = fixture.mount("mnt")?;
    let before = fixture.info()?.pid;

    fs::write(&config, "deadlin = \"50s\"\n")?;
    let refused = fixture.command(&["upgrade"])?;
    let said = String::from_utf8_lossy(&refused.stderr);

    ensure!(!refused.status.success() && said.contains("did you mean \"deadline\""), "{said}");
    ensure!(fixture.info()?.pid == before, "the daemon was ended for one that cannot start");
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "and serves on");
    fixture.umount(&mount)?;
    fixture.finish()
}

fn upgrades_at_the_same_time_are_one(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--restart", "keepers"])?;
    let mount = fixture.mount("mnt")?;
    let over = Arc::new(AtomicBool::new(false));
    let reader = {
        let (over, path, bytes) = (over.clone(), mount.join("0"), content(0, FILE));
        std::thread::spawn(move || -> Outcome {
            let (file, mut at, mut page) = (File::open(path)?, 0, [0; 4096]);
            while !over.load(Ordering::Relaxed) {
                file.read_exact_at(&mut page, at as u64)?;
                ensure!(page == bytes[at..at + 4096], "a wrong byte at {at}");
                at = (at + 4096 * 37) % FILE;
            }
            Ok(())
        })
    };
    let mut served = BTreeSet::from([u64::from(fixture.info()?.pid)]);
    for count in [2, 5, 5, 10] {
        let said = at_once(&fixture, &vec![Vec::new(); count])?;
        println!("{said:?}");
        let mut new = BTreeSet::new();
        let mut done = 0;
        for said in said {
            let said = said.map_err(|error| anyhow::anyhow!("a false alarm: {error}\n{}", fixture.log()))?;
            new.insert(said["pid"].as_u64().context("a process")?);
            done += usize::from(said["by_another"] == false);
        }
        // One that comes late finds nobody at it, and does it again.
        ensure!(done == new.len() && done < count, "{done} have done it, processes {new:?}");
        ensure!(new.is_disjoint(&served), "an old process: {new:?}, {served:?}");
        let now = u64::from(fixture.info()?.pid);
        ensure!(new.contains(&now), "process {now} serves, not one of {new:?}");
        served.extend(new);
        fixture.forget_daemon()?;
    }
    over.store(true, Ordering::Relaxed);
    reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let takeovers = fixture.log().matches("took over from a daemon that has gone").count();
    ensure!(takeovers == served.len() - 1, "{takeovers} takeovers, {served:?}");
    fixture.umount(&mount)?;
    stop(fixture)
}

fn an_upgrade_to_another_program(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--restart", "keepers"])?;
    let mount = fixture.mount("mnt")?;
    let other = ctx.dir.join("rafsd-next");
    fs::copy(&ctx.rafsd, &other)?;

    // Whoever comes first, each gets its own program.
    let (own, next) = (ctx.rafsd.to_str().context("UTF-8")?, other.to_str().context("UTF-8")?);
    for said in at_once(&fixture, &[vec!["--program", next], vec!["--program", own]])? {
        let said = said.map_err(|error| anyhow::anyhow!("{error}\n{}", fixture.log()))?;
        ensure!(said["by_another"] == false, "{said}");
    }
    fixture.forget_daemon()?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "afterwards");
    fixture.umount(&mount)?;
    stop(fixture)
}

/// A script that can be run, at a new file `name`.
fn script(ctx: &Ctx, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = ctx.dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Answers what is asked before an upgrade, and dies of its start.
const DIES: &str = "case \"$*\" in --version) echo rafsd 9;; *--only-check) ;; *) exit 7;; esac";

/// What `rafsd upgrade` to `program` says, which must fail.
fn refusal(fixture: &Fixture<'_>, program: &Path) -> anyhow::Result<String> {
    let said = at_once(fixture, &[vec!["--program", program.to_str().context("UTF-8")?]])?.remove(0);
    let error = said.err().context("it tells of success")?;
    ensure!(error.lines().count() == 1, "{error}");
    Ok(error)
}

fn a_program_that_cannot_go_on(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--restart", "keepers"])?;
    let mount = fixture.mount("mnt")?;
    let before = fixture.info()?.pid;
    let text = ctx.dir.join("text");
    fs::write(&text, "not a program")?;
    let refuses =
        "[ $1 = --version ] && echo rafsd 0.0 && exit\necho \"rafsd: unexpected argument '--restart'\" >&2\nexit 2";
    for (program, words) in [
        (text, "Permission denied"),
        (PathBuf::from("/bin/true"), "it does not answer --version as rafsd does, but: something else"),
        (script(ctx, "fails", "exit 1")?, "it does not answer --version as rafsd does, but: exit status: 1"),
        (script(ctx, "refuses", refuses)?, "could not use the settings: unexpected argument '--restart'"),
    ] {
        let error = refusal(&fixture, &program)?;
        ensure!(error.contains(words), "{}: {error}", program.display());
        ensure!(fixture.info()?.pid == before, "the daemon was ended for {}", program.display());
    }
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "it serves on");
    fixture.umount(&mount)?;
    fixture.finish()
}

fn a_program_that_dies_after_it_took_over(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let token = fixture.run().join("token");
    fixture.set_environment("RAFSD_FAULT_POINT", format!("examined:{}", token.display()));
    fixture.restart(&["--restart", "keepers"])?;
    let mount = fixture.mount("mnt")?;
    let next = ctx.dir.join("rafsd-next");
    fs::copy(&ctx.rafsd, &next)?;
    let before = fixture.info()?.pid;
    fs::write(&token, b"")?;

    let error = refusal(&fixture, &next)?;

    let now = fixture.info()?.pid;
    ensure!(!token.exists() && now != before, "nobody died: {error}");
    ensure!(error.contains("rafsd-next has ended in its start"), "{error}");
    let runs = |pid: u32| fs::metadata(format!("/proc/{pid}/exe")).map(|exe| exe.ino());
    ensure!(runs(now)? == fs::metadata(&ctx.rafsd)?.ino(), "the program that died goes on: {error}\n{}", fixture.log());
    fixture.forget_daemon()?;
    drop_caches()?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "by the program before");
    fixture.umount(&mount)?;
    stop(fixture)
}

fn a_program_that_dies_of_its_start(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--restart", "keepers"])?;
    let mount = fixture.mount("mnt")?;
    let bad = script(ctx, "rafsd-bad", DIES)?;
    let before = fixture.info()?.pid;

    let error = refusal(&fixture, &bad)?;

    let now = fixture.info()?.pid;
    ensure!(error.contains("rafsd-bad has ended in its start"), "{error}");
    ensure!(error.contains(&format!("process {now}, goes on in its place")) && now != before, "{error}");
    fixture.forget_daemon()?;

    // A package brings a bad program in the place of the one that serves.
    let next = ctx.dir.join("rafsd-next");
    fs::copy(&ctx.rafsd, &next)?;
    fixture.must(&["upgrade", "--program", next.to_str().context("UTF-8")?])?;
    let good = fs::metadata(&next)?.ino();
    let runs_good = |pid: u32| fs::metadata(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ino() == good);
    let until = Instant::now() + Duration::from_secs(10);
    while fixture.keepers().len() < 2 || !fixture.keepers().into_iter().all(runs_good) {
        ensure!(Instant::now() < until, "keepers of another program stay:\n{}", fixture.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::rename(&bad, &next)?;
    let error = refusal(&fixture, &next)?;
    let now = fixture.info()?.pid;
    ensure!(error.contains("rafsd-next has ended in its start"), "{error}");
    ensure!(runs_good(now), "another program serves: {error}\n{}", fixture.log());
    drop_caches()?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "by the program before");
    // It finds its way without a name of its own: keepers, and the next one.
    let keepers = fixture.keepers();
    kill(Pid::from_raw(i32::try_from(now)?), Signal::SIGKILL)?;
    let until = Instant::now() + Duration::from_secs(10);
    while !fixture.info().is_ok_and(|info| info.pid != now && runs_good(info.pid)) {
        ensure!(Instant::now() < until, "nobody comes, of keepers {keepers:?}:\n{}", fixture.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    fixture.must(&["upgrade"])?;
    ensure!(!runs_good(fixture.info()?.pid), "it is the program of the command");
    fixture.umount(&mount)?;
    stop(fixture)
}
