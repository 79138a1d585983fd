//! The daemon is killed while the kernel asks it for the sake of its own mounting: nothing waits for it for ever.
//!
//! A question of FUSE that was taken is waited for whatever signal comes. So the thread that mounts is a thread that nobody
//! can end, and all that it holds is held until the question is answered.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_daemon_that_is_killed_while_it_mounts_is_gone", Place::Here, killed_while_it_mounts),
    case("one_that_mounts_over_loop_devices_too", Place::Only(Backend::FuseDevice), killed_over_loop_devices),
];

/// What a daemon may just have been asked when it is killed.
const MOMENTS: &[&str] = &[
    "asked-for-name",
    "asked-for-attributes",
    "asked-to-open",
    "asked-to-open-directory",
    "asked-to-read",
    "asked-otherwise",
    "taken",
];

fn killed_while_it_mounts(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 4)?;
    // Whatever the backend, a daemon that starts tries out all of them.
    let in_trial = ["asked-for-name", "asked-for-attributes", "asked-to-read"];
    let in_mount: &[&str] = match ctx.backend {
        Backend::FuseDevice => &["asked-for-name", "asked-to-read"],
        Backend::FuseTree => &["asked-for-name", "asked-for-attributes", "asked-to-open"],
        Backend::Fanotify | Backend::Cachefiles => &[],
    };
    kill_at_each_moment(fixture, &in_trial, in_mount)
}

fn killed_over_loop_devices(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 4)?;
    fixture.set_environment("RAFSD_PRETEND", "no-file-backed".to_owned());
    kill_at_each_moment(fixture, &["asked-to-read"], &["asked-for-name", "asked-to-read"])
}

/// Has daemons killed when they start and when they mount. At these moments at least it must have come to that.
fn kill_at_each_moment(mut fixture: Fixture<'_>, in_trial: &[&str], in_mount: &[&str]) -> Outcome {
    let token = fixture.run().join("token");
    let (mut died_in_trial, mut died_in_mount) = (BTreeSet::new(), BTreeSet::new());
    for &moment in MOMENTS {
        fixture.kill()?;
        fixture.set_environment("RAFSD_FAULT_POINT", format!("{moment}:{}", token.display()));
        fs::write(&token, b"")?;
        let started = fixture.start(&[]);
        if token.exists() {
            started?;
        } else {
            fixture.ensure_gone(Duration::from_secs(10)).with_context(|| format!("in its trial, {moment}"))?;
            died_in_trial.insert(moment);
            fixture.start(&[]).with_context(|| format!("after a kill in the trial, {moment}"))?;
        }
        fs::write(&token, b"")?;
        match fixture.mount("mnt") {
            Ok(dir) => {
                // It is killed by somebody's question later, or not at all.
                fs::remove_file(&token)?;
                fixture.umount(&dir)?;
            }
            Err(error) => {
                ensure!(!token.exists(), "{error:#}");
                fixture.ensure_gone(Duration::from_secs(10)).with_context(|| format!("in a mount, {moment}"))?;
                died_in_mount.insert(moment);
                fixture.start(&[]).with_context(|| format!("after a kill in a mount, {moment}"))?;
                ensure!(fixture.list()?.is_empty(), "{moment}: {:?}", fixture.list()?);
            }
        }
        let left = crate::mounts::below(&fixture.ctx.dir)?;
        ensure!(left.is_empty(), "{moment}: still mounted: {left:?}");
        let until = Instant::now() + Duration::from_secs(5);
        while fs::read_dir(fixture.run().join("served"))?.next().is_some() {
            ensure!(Instant::now() < until, "{moment}: a record is left");
            std::thread::sleep(Duration::from_millis(5));
        }
        let dir = fixture.mount("mnt").with_context(|| format!("after {moment}"))?;
        drop_caches()?;
        // One byte: of what is complete nobody is asked.
        ensure!(read_byte(&dir.join("0"), 0) == Ok(content(0, FILE)[0]), "{moment}");
        fixture.umount(&dir)?;
    }
    println!("killed in the trial at {died_in_trial:?}, in a mount at {died_in_mount:?}");
    for (wanted, died) in [(in_trial, &died_in_trial), (in_mount, &died_in_mount)] {
        ensure!(wanted.iter().all(|moment| died.contains(moment)), "wanted {wanted:?}, died at {died:?}");
    }
    fixture.finish()
}
