//! The daemon under systemd itself, with the units as they are shipped.
//!
//! systemd runs as the first process of namespaces of its own. There it finds no unit but these, a `/dev` of its own with what
//! rafsd needs, and no file system that it can write to but the directory of the case: the units of a distribution would tidy
//! up this host, and systemd itself makes names in `/dev`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::net::server::Fault;

use super::fixture::{FILE, Fixture, content};
use crate::host::{Need, process_groups};
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Erofs,
    Need::DiskStore,
    Need::Backend,
    Need::Systemd,
    Need::Program("unshare"),
    Need::Program("nsenter"),
    Need::ProcessGroups,
];

pub(crate) const CASES: &[Case] = &[Case {
    name: "under_systemd_no_reader_notices_what_happens_to_the_daemon",
    needs: NEEDS,
    place: Place::Host,
    run: under_systemd_no_reader_notices,
}];

/// Makes the world of systemd, in new namespaces, and becomes it. `$1` is the directory of the case, `$2` the program, `$3`
/// the units.
const WORLD: &str = r#"
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mkdir "$1/dev"
mount -t tmpfs -o mode=755 none "$1/dev"
for node in null zero full random urandom fuse loop-control; do
    [ ! -e /dev/$node ] || { touch "$1/dev/$node"; mount --bind /dev/$node "$1/dev/$node"; }
done
mount --move "$1/dev" /dev
mount -o remount,bind,ro /
mount -o remount,bind,ro /sys
for dir in /tmp /var/tmp /home /root; do
    ! mountpoint -q $dir || mount -o remount,bind,ro $dir
done
for dir in /run /var/lib /usr/local/sbin /lib/systemd/system-generators /etc/systemd; do
    [ ! -d $dir ] || mount -t tmpfs none $dir
done
mkdir /var/lib/rafsd /run/units /run/units/rafsd.service.d
mount --bind "$1/state" /var/lib/rafsd
touch /usr/local/sbin/rafsd
mount --bind "$2" /usr/local/sbin/rafsd
cp "$3/rafsd.service" "$3/rafsd.socket" /run/units/
printf '[Service]\nStandardOutput=append:%s/unit.log\nStandardError=inherit\n' "$1" > /run/units/rafsd.service.d/log.conf
for target in sysinit basic shutdown sockets; do
    printf '[Unit]\nDescription=nothing else\nDefaultDependencies=no\n' > /run/units/$target.target
done
read pid rest < /proc/self/stat
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t proc none /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
echo $pid > "$1/first"
exec /lib/systemd/systemd --system --unit=basic.target --log-target=null
"#;

/// A systemd. Dropping it kills everything in it.
struct Manager<'a> {
    ctx: &'a Ctx,
    child: Child,
    /// Its first process, by the number that it has here.
    first: u32,
    /// The control group in which all of it is.
    group: PathBuf,
}

impl<'a> Manager<'a> {
    fn start(ctx: &'a Ctx) -> anyhow::Result<Self> {
        fs::create_dir(ctx.dir.join("state"))?;
        let group = process_groups().context("a need of this case")?.join(format!("rafsd-case-{}", std::process::id()));
        fs::create_dir(&group)?;
        let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
        let namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc"];
        let enter = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;
        let mut command = Command::new("sh");
        command.args(["-c", enter]).arg(&group).arg("unshare").args(namespaces).args(["sh", "-c", WORLD, "world"]);
        command.arg(&ctx.dir).arg(&ctx.rafsd).arg(units).stdin(Stdio::null());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("container", "rafsd-test");
        command.env("SYSTEMD_UNIT_PATH", "/run/units");
        let child = command.spawn().inspect_err(|_| drop(remove_groups(&group)))?;
        let mut this = Self { ctx, child, first: 0, group };
        let until = Instant::now() + Duration::from_secs(20);
        while this.first == 0 || !this.within("/run/systemd/private").exists() {
            ensure!(this.child.try_wait()?.is_none(), "systemd did not start");
            ensure!(Instant::now() < until, "systemd does not answer");
            std::thread::sleep(Duration::from_millis(20));
            let first = fs::read_to_string(ctx.dir.join("first")).unwrap_or_default();
            this.first = first.trim().parse().unwrap_or(0);
        }
        Ok(this)
    }

    /// A path of the world of systemd, as it is reached from here.
    fn within(&self, path: impl AsRef<Path>) -> PathBuf {
        let inside = path.as_ref().strip_prefix("/").expect("an absolute path").to_owned();
        Path::new("/proc").join(self.first.to_string()).join("root").join(inside)
    }

    /// Runs a command there, and gives what it says.
    fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.first.to_string(), "--mount", "--pid", "--cgroup", "--uts", "--ipc"]);
        let output = command.args(["timeout", "60"]).args(args).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}\n{}", args.join(" "), self.log());
        Ok(String::from_utf8(output.stdout)?)
    }

    fn rafsd(&self, args: &[&str]) -> anyhow::Result<String> {
        self.run(&[&["/usr/local/sbin/rafsd"], args].concat())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.ctx.dir.join("unit.log")).unwrap_or_default()
    }

    /// What systemd knows of the service.
    fn property(&self, name: &str) -> anyhow::Result<String> {
        Ok(self.run(&["systemctl", "show", "rafsd.service", "--value", "--property", name])?.trim().to_owned())
    }

    fn wait_until(&self, name: &str, wanted: impl Fn(&str) -> bool) -> Outcome {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let value = self.property(name)?;
            if wanted(&value) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{name} stays {value:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Daemon and keepers, by the numbers that they have here.
    fn processes(&self) -> anyhow::Result<Vec<Pid>> {
        let procs = fs::read_to_string(self.group.join("system.slice/rafsd.service/cgroup.procs"))?;
        Ok(procs.lines().map(|pid| pid.parse().map(Pid::from_raw)).collect::<Result<_, _>>()?)
    }

    /// Kills daemon and keepers, none of whom can do anything in between.
    fn kill_all(&self) -> Outcome {
        let processes = self.processes()?;
        ensure!(processes.len() == 3, "a daemon and two keepers: {processes:?}");
        processes.iter().try_for_each(|pid| kill(*pid, Signal::SIGSTOP))?;
        Ok(processes.iter().try_for_each(|pid| kill(*pid, Signal::SIGKILL))?)
    }
}

impl Drop for Manager<'_> {
    fn drop(&mut self) {
        // Its namespace of processes goes with the first of them. By 0 or -1 others would be meant.
        if self.first > 1 {
            let _ = kill(Pid::from_raw(self.first.cast_signed()), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let until = Instant::now() + Duration::from_secs(10);
        while remove_groups(&self.group).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Removes a control group with those in it.
fn remove_groups(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_groups(&path)?;
        }
    }
    fs::remove_dir(group)
}

/// A reader of file `number`, that was seen to wait.
fn waiting_reader(mount: &Path, number: usize) -> anyhow::Result<JoinHandle<io::Result<Vec<u8>>>> {
    let file = mount.join(number.to_string());
    let reader = std::thread::spawn(move || fs::read(file));
    std::thread::sleep(Duration::from_millis(400));
    ensure!(!reader.is_finished(), "file {number} was not waited for");
    Ok(reader)
}

fn ensure_read(reader: JoinHandle<io::Result<Vec<u8>>>, number: usize) -> Outcome {
    let got = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
    ensure!(got == content(number, FILE), "the reader of file {number} got something else");
    Ok(())
}

fn under_systemd_no_reader_notices(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 5)?;
    fixture.stop()?;
    let manager = Manager::start(ctx)?;
    manager.run(&["systemctl", "start", "rafsd.service"])?;
    ensure!(manager.property("StatusText")?.contains("serving"), "{}", manager.property("StatusText")?);
    let (bootstrap, dir, url) = (fixture.bootstrap(), ctx.dir.join("mnt"), fixture.server.url());
    fs::create_dir(&dir)?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("UTF-8");
    let (bootstrap, at) = (text(&bootstrap)?, text(&dir)?);
    let mount = ["mount", &bootstrap, &at, "--blobs", &url, "--backend", ctx.backend.name()];
    manager.rafsd(&mount)?;
    let shown = manager.within(&dir);
    ensure!(fs::read(shown.join("0"))? == content(0, FILE), "the bytes of the image");
    manager.wait_until("NFileDescriptorStore", |held| held.parse().is_ok_and(|held: u32| held >= 5))?;
    let main = || anyhow::Ok(manager.property("MainPID")?);

    // Another program, or the same once more.
    fixture.server.set_fault(Fault::StallHead);
    let reader = waiting_reader(&shown, 1)?;
    let before = main()?;
    manager.run(&["systemctl", "restart", "rafsd.service"])?;
    ensure!(main()? != before, "it was not started again");
    fixture.server.set_fault(Fault::None);
    ensure_read(reader, 1)?;

    // A crash.
    manager.run(&["kill", "-KILL", &main()?])?;
    ensure!(fs::read(shown.join("2"))? == content(2, FILE), "a reader that came meanwhile");
    manager.wait_until("NRestarts", |count| count == "1")?;
    manager.wait_until("ActiveState", |state| state == "active")?;

    // The death of all three, with only systemd left to hold the descriptors.
    fixture.server.set_fault(Fault::StallHead);
    let reader = waiting_reader(&shown, 3)?;
    manager.kill_all()?;
    let late = waiting_reader(&shown, 4)?;
    manager.wait_until("NRestarts", |count| count == "2")?;
    fixture.server.set_fault(Fault::None);
    ensure_read(reader, 3)?;
    ensure_read(late, 4)?;

    manager.run(&["systemctl", "reload", "rafsd.service"])?;
    manager.run(&["systemctl", "stop", "rafsd.service"])?;
    ensure!(fs::read(shown.join("4"))? == content(4, FILE), "what is present needs nobody");
    manager.run(&["systemctl", "start", "rafsd.service"])?;
    ensure!(manager.rafsd(&["list"])?.contains(&at), "the mount is served again");
    manager.rafsd(&["umount", &at])?;
    manager.rafsd(&["stop"])?;
    manager.wait_until("ActiveState", |state| state == "inactive")?;
    ensure!(manager.property("Result")? == "success" && manager.property("NFileDescriptorStore")? == "0");

    // Started by the first who asks.
    manager.run(&["systemctl", "start", "rafsd.socket"])?;
    manager.rafsd(&["list"])?;
    ensure!(manager.property("ActiveState")? == "active", "nobody was started");
    manager.rafsd(&["stop"])?;
    let refused = manager.log().lines().find(|line| line.contains("Operation not permitted")).map(str::to_owned);
    ensure!(refused.is_none(), "the unit refuses what is needed: {refused:?}");
    drop(manager);
    fixture.start(&[])?;
    fixture.finish()
}
