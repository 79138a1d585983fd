//! nydusd in FUSE mode on the same registry. It has no validation of RAFS v6, so it checks nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::image::{Piece, REPOSITORY};

/// How long it may take to mount.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running nydusd with a fresh cache and the image mounted. Dropping it unmounts, ends it and removes the cache.
pub(crate) struct Nydusd {
    child: Child,
    dir: PathBuf,
}

impl Nydusd {
    /// Mounts `bootstrap`, whose blobs are in the registry at `host`, with the files of `pieces` as its prefetch list.
    pub(crate) fn mount(
        program: &Path,
        dir: &Path,
        host: SocketAddr,
        bootstrap: &Path,
        pieces: &[Piece],
    ) -> anyhow::Result<Self> {
        for name in ["cache", "mnt"] {
            fs::create_dir_all(dir.join(name))?;
        }
        let config = format!(
            "version = 2\n[backend]\ntype = \"registry\"\n[backend.registry]\nscheme = \"http\"\nhost = \"{host}\"\n\
             repo = \"{REPOSITORY}\"\n[cache]\ntype = \"filecache\"\n[cache.filecache]\n\
             work_dir = \"{cache}\"\n[cache.prefetch]\nenable = true\n[rafs]\nmode = \"direct\"\n\
             [rafs.prefetch]\nenable = true\n",
            cache = dir.join("cache").display()
        );
        fs::write(dir.join("config.toml"), config)?;
        let mut seen = BTreeSet::new();
        let firsts = pieces.iter().filter(|piece| seen.insert(&piece.path));
        let list: String = firsts.map(|piece| format!("/{}\n", piece.path.display())).collect();
        fs::write(dir.join("list"), list)?;
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new(program);
        command.args(["fuse", "--rlimit-nofile", "0", "--log-level", "warn"]);
        command.arg("-C").arg(dir.join("config.toml")).arg("-B").arg(bootstrap).arg("-M").arg(dir.join("mnt"));
        command.arg("-A").arg(dir.join("api.sock")).arg("--prefetch-files").arg(dir.join("list"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let mut nydusd = Self { child, dir: dir.to_owned() };
        nydusd.await_mount()?;
        Ok(nydusd)
    }

    pub(crate) fn mnt(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    fn await_mount(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        let mnt = self.mnt();
        // Before, the directory is empty.
        while fs::read_dir(&mnt)?.next().is_none() {
            let gone = self.child.try_wait()?;
            if gone.is_some() || Instant::now() > until {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                bail!("nydusd does not mount: {}", log.trim());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Nydusd {
    fn drop(&mut self) {
        let _ = rafsd::sys::mount::unmount(&self.mnt());
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("sources: {}: {error}", self.dir.display());
        }
    }
}
