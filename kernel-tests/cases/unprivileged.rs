//! A user who is not root mounts an image: by the program that may, or in a user namespace of his own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use serde_json::Value;

use super::fixture::{FILE, content, wait_for_exit};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_user_who_is_not_root_mounts_and_is_served",
        needs: &[Need::Root, Need::DiskStore, Need::Backend, Need::Program("fusermount3"), Need::Program("setpriv")],
        place: Place::Only(Backend::FuseTree),
        run: a_user_who_is_not_root_mounts_and_is_served,
    },
    Case {
        name: "root_of_a_user_namespace_mounts_and_is_served",
        needs: &[Need::Root, Need::DiskStore, Need::Backend, Need::Program("unshare"), Need::Program("setpriv")],
        place: Place::Only(Backend::FuseTree),
        run: root_of_a_user_namespace_mounts_and_is_served,
    },
];

/// The user `nobody` on all usual systems.
const NOBODY: u32 = 65534;

/// `/dev/fuse` as most hosts have it: anybody may open it. Dropping this restores what it was.
struct OpenDevice(u32);

impl OpenDevice {
    const PATH: &'static str = "/dev/fuse";

    fn new() -> anyhow::Result<Self> {
        let before = fs::metadata(Self::PATH)?.permissions().mode();
        fs::set_permissions(Self::PATH, fs::Permissions::from_mode(0o666))?;
        Ok(Self(before))
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        if let Err(error) = fs::set_permissions(Self::PATH, fs::Permissions::from_mode(self.0)) {
            eprintln!("cannot restore the mode of {}: {error}", Self::PATH);
        }
    }
}

/// A user with a home, and a copy of the program there that he may run.
struct User {
    home: PathBuf,
}

impl User {
    fn new(ctx: &Ctx) -> anyhow::Result<Self> {
        // The harness made it for root alone.
        for dir in [ctx.dir.parent().context("a parent")?, &ctx.dir] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        }
        let home = ctx.dir.join("home");
        fs::create_dir(&home)?;
        fs::copy(&ctx.rafsd, ctx.dir.join("rafsd"))?;
        for name in ["source", "mnt", "runtime"] {
            fs::create_dir(home.join(name))?;
            chown(&home.join(name), Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY)))?;
        }
        chown(&home, Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY)))?;
        Ok(Self { home })
    }

    /// Runs a command line as the user, in his home.
    fn run(&self, words: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new("setpriv");
        let id = NOBODY.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]).args(words).current_dir(&self.home);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", &self.home);
        command.env("XDG_RUNTIME_DIR", self.home.join("runtime")).env("XDG_CACHE_HOME", self.home.join("cache"));
        Ok(command.output()?)
    }

    fn must(&self, words: &[&str]) -> anyhow::Result<Vec<u8>> {
        let output = self.run(words)?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(output.stdout)
    }

    fn rafsd(&self, words: &[&str]) -> anyhow::Result<Vec<u8>> {
        self.must(&[&["../rafsd"], words].concat())
    }

    fn sockets(&self) -> PathBuf {
        self.home.join("runtime/rafsd")
    }

    fn info(&self) -> anyhow::Result<rafsd::daemon::api::Info> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(rafsd::daemon::client::Client::new(&self.sockets())?.info())?)
    }
}

fn a_user_who_is_not_root_mounts_and_is_served(ctx: &Ctx) -> Outcome {
    let _device = OpenDevice::new()?;
    let user = User::new(ctx)?;
    let (source, mount) = (user.home.join("source"), user.home.join("mnt"));
    (0..3).try_for_each(|number| fs::write(source.join(number.to_string()), content(number, FILE)))?;
    fs::hard_link(source.join("0"), source.join("again"))?;
    user.rafsd(&["build", "source", "-o", "image"])?;

    // No daemon runs and nothing is said of where its things are.
    user.rafsd(&["mount", "image/bootstrap", "mnt", "--blobs", "image/blobs"])?;

    let images: Value = serde_json::from_slice(&user.rafsd(&["list", "--json"])?)?;
    ensure!(images[0]["backend"] == "fuse-tree", "{images}");
    ensure!(user.sockets().join("rafsd.sock").exists(), "the socket is in the user's directory");
    ensure!(user.home.join("cache/rafsd/v1").is_dir(), "the cache is in the user's directory");
    for name in ["0", "1", "again"] {
        let want = content(usize::from(name == "1"), FILE);
        ensure!(user.must(&["cat", &format!("mnt/{name}")])? == want, "file {name}");
    }
    ensure!(fs::read_dir(&mount).is_err(), "others may not look in, not even root");
    let pid = info_pid(&user)?;
    let keepers: Vec<_> = rafsd::daemon::keeper::statuses(&user.sockets()).iter().map(|it| it.pid).collect();
    ensure!(keepers.len() == 2, "keepers: {keepers:?}");

    // They work for this user too.
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    ensure!(user.must(&["cat", "mnt/2"])? == content(2, FILE), "served by the next daemon");
    let successor = info_pid(&user)?;
    ensure!(successor != pid, "the same daemon");

    user.rafsd(&["umount", "mnt"])?;
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "still mounted");
    kill(Pid::from_raw(i32::try_from(successor)?), Signal::SIGTERM)?;
    for process in keepers.into_iter().chain([successor]) {
        wait_for_exit(process)?;
    }
    ensure_gone(&user.sockets().join("rafsd.sock"))
}

/// What root of the namespace does, all of it inside: nobody outside sees the mount or may ask the daemon.
const INSIDE: &str = r#"set -eu
pid() {
    for _ in $(seq 200); do
        if found=$(../rafsd status --json 2>/dev/null | grep -o '"pid": *[0-9]*' | head -n 1 | grep -o '[0-9]*') &&
            [ "$found" != "${1-}" ]; then echo "$found"; return; fi
        sleep 0.1
    done
    echo "no daemon answers" >&2
    return 1
}
# The program is a copy that nobody else runs; what has ended has none.
rafsd=$(readlink -f ../rafsd)
runs() {
    for process in /proc/[0-9]*; do
        if [ "$(readlink "$process/exe" 2>/dev/null)" = "$rafsd" ]; then return 0; fi
    done
    return 1
}
[ "$(id -u)" = 0 ]
../rafsd mount image/bootstrap mnt --blobs image/blobs
[ -S runtime/rafsd/rafsd.sock ] && [ -d cache/rafsd/v1 ]
grep -q "$PWD/mnt .* - fuse.rafsd " /proc/self/mountinfo
for name in 0 1 again; do cmp "source/$name" "mnt/$name"; done
if touch mnt/new 2>/dev/null; then echo "written to" >&2; exit 1; fi
first=$(pid)
kill -9 "$first"
cmp source/2 mnt/2
second=$(pid "$first")
runs || { echo "the daemon is not seen to run" >&2; exit 1; }
../rafsd umount mnt
if grep -q "$PWD/mnt " /proc/self/mountinfo; then echo "still mounted" >&2; exit 1; fi
kill -TERM "$second"
for _ in $(seq 200); do [ -e runtime/rafsd/rafsd.sock ] || runs || exit 0; sleep 0.1; done
echo "the daemon does not end" >&2
exit 1
"#;

fn root_of_a_user_namespace_mounts_and_is_served(ctx: &Ctx) -> Outcome {
    let _device = OpenDevice::new()?;
    let user = User::new(ctx)?;
    let source = user.home.join("source");
    (0..3).try_for_each(|number| fs::write(source.join(number.to_string()), content(number, FILE)))?;
    fs::hard_link(source.join("0"), source.join("again"))?;
    user.rafsd(&["build", "source", "-o", "image"])?;

    user.must(&["unshare", "-Urm", "--", "sh", "-c", INSIDE])?;

    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "seen outside of the namespace");
    Ok(())
}

/// The daemon's number, once it answers.
fn info_pid(user: &User) -> anyhow::Result<u32> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match user.info() {
            Ok(info) => return Ok(info.pid),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn ensure_gone(path: &Path) -> Outcome {
    ensure!(!path.exists(), "{} is left", path.display());
    Ok(())
}
