//! The format's reference daemon, whose program is given by its path, serving the same image over FUSE.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rafsd::sys::mount::unmount;

/// How long it may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running nydusd with a cache of its own. Dropping it unmounts the image and ends the daemon.
#[derive(Debug)]
pub(crate) struct Nydusd {
    child: Child,
    mnt: PathBuf,
}

impl Nydusd {
    /// Mounts `image` below `dir`, which is made; its blobs come from the disk.
    pub(crate) fn mount(program: &Path, dir: &Path, image: &Path) -> anyhow::Result<Self> {
        let mnt = dir.join("mnt");
        for made in [&mnt, &dir.join("cache")] {
            fs::create_dir_all(made)?;
        }
        let config = serde_json::json!({
            "device": {
                "backend": { "type": "localfs", "config": { "dir": image.join("blobs") } },
                "cache": { "type": "blobcache", "config": { "work_dir": dir.join("cache") } },
            },
            "mode": "direct",
            "digest_validate": false,
            "enable_xattr": true,
        });
        let config_path = dir.join("config.json");
        fs::write(&config_path, serde_json::to_vec(&config)?)?;
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new(program);
        command.arg("fuse").arg("--mountpoint").arg(&mnt).arg("--bootstrap").arg(image.join("bootstrap"));
        command.arg("--config").arg(&config_path).args(["--rlimit-nofile", "0", "--log-level", "warn"]);
        // A group of its own: what interrupts us at the terminal must not end it under our reads.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let mut this = Self { child, mnt };
        this.await_start(dir)?;
        Ok(this)
    }

    fn await_start(&mut self, dir: &Path) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while fs::read_dir(&self.mnt)?.next().is_none() {
            if let Some(status) = self.child.try_wait()? {
                let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
                bail!("nydusd did not start ({status}): {}", log.trim());
            }
            if Instant::now() > until {
                bail!("nydusd does not mount anything");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where the image is mounted.
    pub(crate) fn mnt(&self) -> &Path {
        &self.mnt
    }

    /// Process ids, of which there is one.
    pub(crate) fn processes(&self) -> Vec<u32> {
        vec![self.child.id()]
    }
}

impl Drop for Nydusd {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.mnt) {
            eprintln!("side_by_side: cannot unmount {}: {error}", self.mnt.display());
        }
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            eprintln!("side_by_side: cannot end nydusd: {error}");
        }
    }
}
