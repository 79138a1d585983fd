//! The harness on itself: each way in which a case can go wrong is named, and nothing stays behind.

use std::process::{Command, Stdio};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, ensure};
use nix::mount::{MsFlags, mount};

use crate::host::Need;
use crate::report::Verdict;
use crate::{Backend, Case, Ctx, Interrupt, Outcome, Place, isolate, mounts};

pub(crate) const CASES: &[Case] = &[Case {
    name: "harness_names_what_went_wrong_and_cleans_up",
    needs: &[Need::Root],
    place: Place::Both,
    run: harness_names_what_went_wrong_and_cleans_up,
}];

/// Cases that fail, for the case above; never run by themselves.
pub(crate) const BAD: &[Case] = &[
    bad("bad_returns_an_error", |_| anyhow::bail!("the reason it gave")),
    bad("bad_panics", |_| panic!("the reason it gave")),
    bad("bad_hangs", |_| {
        loop {
            std::thread::park();
        }
    }),
    bad("bad_aborts", |_| std::process::abort()),
    bad("bad_leaves_a_mount", |ctx| {
        mount(Some("none"), &ctx.dir, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mount")
    }),
    bad("bad_leaves_a_process", |_| {
        // In a session of its own, as a daemon would be.
        let child = Command::new("setsid").args(["sleep", "1000"]).stdin(Stdio::null()).spawn()?;
        let comm = format!("/proc/{}/comm", child.id());
        while std::fs::read_to_string(&comm)? != "sleep\n" {
            std::thread::yield_now();
        }
        Ok(())
    }),
];

const fn bad(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: &[], place: Place::Both, run }
}

fn harness_names_what_went_wrong_and_cleans_up(ctx: &Ctx) -> Outcome {
    let expected = [
        ("returned an error", "the reason it gave"),
        ("panicked", "the reason it gave"),
        ("timed out after 2 s", ""),
        ("killed by signal 6", ""),
        ("left mounts behind: tmpfs on ", ""),
        ("left processes behind: sleep (", ""),
    ];
    for (case, (reason, printed)) in BAD.iter().zip(expected) {
        let limit = Duration::from_secs(if case.name == "bad_hangs" { 2 } else { 60 });
        // Below this case's own directory: what others run or have left at the same time is theirs.
        let verdict =
            isolate::run(case, Backend::Fanotify.into(), ctx.in_guest, &ctx.dir, limit, &Interrupt::default()).0;
        let Verdict::Failed { reason: got, output } = &verdict else { anyhow::bail!("{}: {verdict:?}", case.name) };
        ensure!(got.starts_with(reason) && output.contains(printed), "{}: {verdict:?}", case.name);
    }
    let left = mounts::below(&ctx.dir)?;
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    let left = fs::read_dir(&ctx.dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    ensure!(left.is_empty(), "files are left: {left:?}");
    Ok(())
}
