//! The kernels that guests are booted with, and what is run there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Backend, Case};

/// A kernel for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    /// The long-term kernel with cachefiles in on-demand mode, built by `build-kernel`.
    OnDemand,
    /// The kernel of Debian 12, as its package has it: Linux 6.1, without pre-content events, on-demand cachefiles,
    /// EROFS over files, and requests of FUSE that are sent again.
    Stock,
}

/// What is booted.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// To be loaded first, in this order.
    pub(crate) modules: Vec<PathBuf>,
}

/// The cases that run over FUSE on the stock kernel too: what depends on the kernel most. All of them would take
/// an hour on an emulated processor.
const OVER_FUSE: &[&str] = &[
    "whole_tree_equals_its_source",
    "every_way_to_read_shows_the_bytes",
    "a_program_runs_from_the_mount",
    "a_flipped_bit_is_eio_and_the_log_names_it",
    "a_waiting_reader_can_be_killed",
    "readers_survive_random_kills",
    "readers_survive_a_kill_at_each_step_there",
    "the_whole_tree_is_right_after_a_takeover",
    "what_is_complete_at_the_mount_needs_nobody",
];

/// Through loop devices the end of this case waits for the deadline: see "Over FUSE" in `docs/SEMANTICS.md`.
const WAITS: &str = "a_waiting_reader_can_be_killed";

/// Those of them for the other kernel, which is between the stock one and that of most hosts.
const OVER_FUSE_THERE: &[&str] =
    &["whole_tree_equals_its_source", "a_waiting_reader_can_be_killed", "readers_survive_a_kill_at_each_step"];

impl Machine {
    pub(crate) const ALL: [Self; 2] = [Self::OnDemand, Self::Stock];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::OnDemand => "on-demand",
            Self::Stock => "stock",
        }
    }

    /// Whether a case that is run for `backend` somewhere is run for it in this machine.
    pub(crate) fn runs(self, case: &Case, backend: Backend) -> bool {
        match backend {
            Backend::Fanotify => false,
            Backend::Cachefiles => self == Self::OnDemand,
            Backend::FuseDevice | Backend::FuseTree => {
                let names = if self == Self::Stock { OVER_FUSE } else { OVER_FUSE_THERE };
                let is_known_to_wait = self == Self::Stock && backend == Backend::FuseDevice && case.name == WAITS;
                names.contains(&case.name) && !is_known_to_wait
            }
        }
    }

    /// Whether every case that is to run over FUSE in guests is one of these.
    pub(crate) fn ensure_known(tables: &[&[Case]]) -> anyhow::Result<()> {
        let is_case = |name: &&&str| tables.iter().copied().flatten().any(|case| case.name == **name);
        let unknown = OVER_FUSE.iter().chain(OVER_FUSE_THERE).find(|name| !is_case(name));
        unknown.map_or(Ok(()), |name| anyhow::bail!("there is no case {name}"))
    }

    /// What to boot, or why there is nothing.
    pub(crate) fn kernel(self) -> Result<Kernel, String> {
        match self {
            Self::OnDemand => Ok(Kernel { image: said_by("build-kernel")?.trim().into(), modules: Vec::new() }),
            Self::Stock => {
                let dir = PathBuf::from(said_by("stock-kernel")?.trim());
                Ok(Kernel { image: dir.join("vmlinuz"), modules: modules(&dir.join("modules"))? })
            }
        }
    }
}

/// The modules in a directory, in the order of their names.
fn modules(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut modules: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    modules.sort();
    Ok(modules)
}

/// What a script of this directory prints of what it has made before.
fn said_by(script: &str) -> Result<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel-tests").join(script);
    let output = Command::new(&script).arg("--cached").stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{}: {error}", script.display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let none = || format!("none is there yet; run {}", script.display());
    Err(said.lines().last().map_or_else(none, str::to_owned))
}
