//! What holds of FUSE requests over io_uring, and of the wish for it where it is not to be had.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rafsd::net::server::Fault;
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
use crate::host::Need;
use crate::ring::SWITCH;
use crate::support::{listing, tree};
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("requests_come_over_io_uring_and_show_the_tree", Place::Ring, requests_come_over_io_uring),
    case("more_readers_wait_than_there_are_slots", Place::Ring, more_readers_wait_than_there_are_slots),
    case("a_kill_fails_all_readers_and_never_shows_zeros", Place::Ring, a_kill_fails_all_readers),
    case("an_upgrade_under_load_leaves_the_tree_right", Place::Ring, an_upgrade_leaves_the_tree_right),
    case("without_io_uring_requests_come_the_usual_way_and_status_says_why", Place::Fuse, without_io_uring),
];

/// How requests of the only mount come that is served, and why. One that has ended may be told of for a moment.
fn transport(fixture: &Fixture<'_>) -> anyhow::Result<(String, String)> {
    let images = fixture.list()?;
    let served = images.iter().find(|image| !image["transport"].is_null());
    let told = &served.with_context(|| format!("no transport in {images:?}"))?["transport"];
    let text = |value: &Value| value.as_str().map(ToOwned::to_owned).with_context(|| format!("in {told}"));
    Ok((text(&told["used"])?, text(&told["why"])?))
}

fn ensure_over_io_uring(fixture: &Fixture<'_>) -> Outcome {
    let (used, why) = transport(fixture)?;
    ensure!(used == "io-uring", "requests come over {used}: {why}\n{}", fixture.log());
    Ok(())
}

fn requests_come_over_io_uring(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    let mount = fixture.mount("mnt")?;
    ensure_over_io_uring(&fixture)?;
    for pass in ["cold", "again"] {
        let (want, got) = (listing::of(&fixture.source())?, listing::of(&mount)?);
        let differences = listing::diff(&want, &got);
        ensure!(differences.is_empty(), "{pass}: - source, + mount:\n{differences}");
        drop_caches()?;
    }
    let said = fixture.must(&["status", mount.to_str().context("UTF-8")?])?;
    ensure!(said.contains("FUSE requests  io-uring: the settings choose it"), "{said}");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// Readers on one processor, so that all ask in one queue.
fn more_readers_wait_than_there_are_slots(ctx: &Ctx) -> Outcome {
    const READERS: usize = 80;
    let fixture = Fixture::with(ctx, &["--chunk-size", "4096"], Default::default(), &[], |dir| {
        (0..READERS).try_for_each(|file| fs::write(dir.join(file.to_string()), content(file, 4096)))
    })?;
    let mount = fixture.mount("mnt")?;
    ensure_over_io_uring(&fixture)?;
    let files = (0..READERS).map(|file| File::open(mount.join(file.to_string()))).collect::<Result<Vec<_>, _>>()?;
    fixture.server.set_fault(Fault::StallHead);
    std::thread::scope(|scope| {
        let readers: Vec<_> = files
            .iter()
            .map(|file| {
                scope.spawn(move || {
                    let mut set = nix::sched::CpuSet::new();
                    set.set(0)?;
                    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
                    let mut bytes = vec![0; 4096];
                    file.read_exact_at(&mut bytes, 0)?;
                    anyhow::Ok(bytes)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        fixture.server.set_fault(Fault::None);
        for (file, reader) in readers.into_iter().enumerate() {
            let bytes = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
            ensure!(bytes.with_context(|| format!("file {file}"))? == content(file, 4096), "file {file}");
        }
        anyhow::Ok(())
    })?;
    drop(files);
    fixture.umount(&mount)?;
    fixture.finish()
}

/// What a reader may be told of a connection that has ended. `ECANCELED` is what the kernel says of a request that it
/// was about to give to a process that died (seen on 6.18).
fn is_end(errno: Option<i32>) -> bool {
    let ends = [nix::libc::EIO, nix::libc::ENOTCONN, nix::libc::ECONNABORTED, nix::libc::ECANCELED];
    errno.is_some_and(|errno| ends.contains(&errno))
}

/// Ends loops of readers, however the case ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn a_kill_fails_all_readers(ctx: &Ctx) -> Outcome {
    let mut refused = 0;
    for round in 0..8 {
        refused += usize::from(kill_once(ctx, round).with_context(|| format!("round {round}"))?);
        for name in ["source", "image", "cache", "run", "mnt", "again"] {
            let dir = ctx.dir.join(name);
            if dir.exists() {
                fs::remove_dir_all(dir)?;
            }
        }
    }
    ensure!(refused > 0, "what somebody waited for had been fetched ahead each time");
    Ok(())
}

/// Whether somebody waited for data when the daemon was killed, and was refused.
fn kill_once(ctx: &Ctx, round: u64) -> anyhow::Result<bool> {
    const FILES: usize = 4;
    let mut fixture = Fixture::files(ctx, FILES)?;
    let mount = fixture.mount("mnt")?;
    ensure_over_io_uring(&fixture)?;
    let stop = AtomicBool::new(false);
    let stalled = File::open(mount.join("3"))?;
    let is_refused = std::thread::scope(|scope| {
        let ends = Stop(&stop);
        let reader = |file: usize| {
            let (path, want, stop) = (mount.join(file.to_string()), content(file, FILE), &stop);
            move || {
                let mut errors = BTreeSet::new();
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    let got = File::open(&path).and_then(|file| {
                        let mut bytes = vec![0; 4096];
                        file.read_exact_at(&mut bytes, at as u64).map(|()| bytes)
                    });
                    match got {
                        Ok(bytes) => ensure!(bytes == want[at..at + 4096], "a wrong byte, at {at}"),
                        Err(error) => drop(errors.insert(error.raw_os_error())),
                    }
                    at = (at + 12_288) % (FILE - 4096) / 4096 * 4096;
                }
                anyhow::Ok(errors)
            }
        };
        let readers: Vec<_> = (0..3).map(|file| scope.spawn(reader(file))).collect();
        std::thread::sleep(Duration::from_millis(40));
        fixture.server.set_fault(Fault::StallHead);
        let waits = scope.spawn(|| {
            let mut bytes = vec![0; 4096];
            stalled.read_exact_at(&mut bytes, 2 << 20).map(|()| bytes)
        });
        std::thread::sleep(Duration::from_millis(30 + round * 7));
        let clock = Instant::now();
        fixture.kill()?;

        let told = waits.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;

        // Nobody started another daemon, and nobody has to.
        ensure!(clock.elapsed() < Duration::from_secs(5), "it was told after {:?}", clock.elapsed());
        // It may have been fetched ahead.
        let want = &content(3, FILE)[2 << 20..][..4096];
        let is_refused = match &told {
            Ok(bytes) => {
                ensure!(bytes == want, "who waited read a wrong byte");
                false
            }
            Err(error) => {
                ensure!(is_end(error.raw_os_error()), "who waited was told {error}");
                true
            }
        };
        std::thread::sleep(Duration::from_millis(100));
        drop(ends);
        for reader in readers {
            let errors = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
            ensure!(errors.iter().all(|errno| is_end(*errno)), "readers were told {errors:?}");
        }
        anyhow::Ok(is_refused)
    })?;
    drop(stalled);
    ensure!(read_byte(&mount.join("3"), 1 << 20).is_err_and(is_end), "what is missing fails");
    fixture.server.set_fault(Fault::None);
    fixture.start(&[])?;
    ensure!(read_byte(&mount.join("3"), 1 << 20).is_err_and(is_end), "also when another daemon has come");
    ensure!(fixture.log().contains("unmount it and mount it again"), "{}", fixture.log());
    nix::mount::umount(&mount)?;
    let again = fixture.mount("again")?;
    // What is complete by now needs no connection over files.
    if fixture.list()?[0]["state"] != "complete" {
        ensure_over_io_uring(&fixture)?;
    }
    for file in 0..FILES {
        ensure!(fs::read(again.join(file.to_string()))? == content(file, FILE), "file {file}, mounted again");
    }
    fixture.umount(&again)?;
    fixture.finish()?;
    Ok(is_refused)
}

fn an_upgrade_leaves_the_tree_right(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    fixture.restart(&["--keep-mounts"])?;
    let mount = fixture.mount("mnt")?;
    let want = listing::of(&fixture.source())?;
    for round in 0..3 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let ends = Stop(&stop);
            let walks = || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = drop_caches();
                    let differences = listing::diff(&want, &listing::of(&mount)?);
                    ensure!(differences.is_empty(), "- source, + mount:\n{differences}");
                }
                anyhow::Ok(())
            };
            let walkers: Vec<_> = (0..3).map(|_| scope.spawn(walks)).collect();
            for _ in 0..2 {
                std::thread::sleep(Duration::from_millis(300));
                fixture.restart(&["--keep-mounts"])?;
                ensure_over_io_uring(&fixture)?;
            }
            drop(ends);
            for walker in walkers {
                walker.join().map_err(|_| anyhow::anyhow!("a walker panicked"))??;
            }
            anyhow::Ok(())
        })
        .with_context(|| format!("round {round}\n{}", fixture.log()))?;
    }
    fixture.umount(&mount)?;
    fixture.finish()
}

fn without_io_uring(ctx: &Ctx) -> Outcome {
    let switch = || fs::read_to_string(SWITCH).map(|text| text.trim().to_owned()).unwrap_or_else(|_| "N".to_owned());
    let mut fixture = Fixture::files(ctx, 1)?;
    ensure!(transport(&fixture).is_err(), "nothing is mounted");
    let by_default = fixture.mount("mnt")?;
    ensure!(transport(&fixture)?.0 == "dev", "by default: {:?}", transport(&fixture)?);
    fixture.umount(&by_default)?;
    fixture.restart(&["--fuse-transport", "io-uring"])?;
    ensure!(fixture.log().contains("if this daemon is killed"), "nobody is warned: {}", fixture.log());
    let before = switch();
    let mount = fixture.mount("mnt")?;
    let told = transport(&fixture)?;
    // Others on this host may turn it.
    if (before.as_str(), switch().as_str()) == ("N", "N") {
        ensure!(told.0 == "dev" && told.1.contains("does not offer"), "{told:?}");
        let said = Command::new(&ctx.rafsd).args(["doctor", "--json", "--cache"]).arg(fixture.cache()).output()?;
        let said: Value = serde_json::from_slice(&said.stdout)?;
        let finding = said["findings"].as_array().into_iter().flatten().find(|it| it["name"] == "fuse-io-uring");
        let finding = finding.with_context(|| format!("no line on it: {said}"))?;
        ensure!(finding["works"] == false && finding["remedy"].is_string(), "{finding}");
    }
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "either way");
    fixture.umount(&mount)?;
    fixture.finish()
}
