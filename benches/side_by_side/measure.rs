use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::unistd::{SysconfVar, sysconf};

/// Seconds that two things took, done in turns.
#[derive(Debug, Default)]
pub(crate) struct Turned {
    ours: Vec<f64>,
    other: Vec<f64>,
}

/// A median with what lies around it.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Turned {
    /// Does both `turns` times, each of them first every other time.
    pub(crate) fn take(
        turns: usize,
        mut ours: impl FnMut() -> anyhow::Result<f64>,
        mut other: impl FnMut() -> anyhow::Result<f64>,
    ) -> anyhow::Result<Self> {
        let mut turned = Self::default();
        for turn in 0..turns {
            if turn % 2 == 0 {
                turned.ours.push(ours()?);
                turned.other.push(other()?);
            } else {
                turned.other.push(other()?);
                turned.ours.push(ours()?);
            }
        }
        Ok(turned)
    }

    /// Seconds that were measured in turns elsewhere, as many of either.
    pub(crate) fn of(ours: Vec<f64>, other: Vec<f64>) -> Self {
        Self { ours, other }
    }

    /// How many times as fast ours was.
    pub(crate) fn ratio(&self) -> Spread {
        spread(self.ours.iter().zip(&self.other).map(|(ours, other)| other / ours).collect())
    }

    pub(crate) fn ours(&self) -> f64 {
        spread(self.ours.clone()).median
    }

    pub(crate) fn other(&self) -> f64 {
        spread(self.other.clone()).median
    }

    /// Seconds that ours took altogether.
    pub(crate) fn ours_total(&self) -> f64 {
        self.ours.iter().sum()
    }
}

/// # Panics
/// If there is no value.
fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
    Spread { median, low: values[0], high: values[values.len() - 1] }
}

/// Seconds that `work` takes.
pub(crate) fn seconds(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let clock = Instant::now();
    work()?;
    Ok(clock.elapsed().as_secs_f64())
}

/// Seconds that `work` takes each time, done again and again for as long as `least`.
pub(crate) fn seconds_each(least: Duration, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let (clock, mut passes) = (Instant::now(), 0);
    while clock.elapsed() < least {
        work()?;
        passes += 1;
    }
    Ok(clock.elapsed().as_secs_f64() / f64::from(passes))
}

/// Processor seconds used so far by all threads of a process, in the kernel's ticks of usually 10 ms.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, which may hold anything; proc_pid_stat(5).
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = |field: usize| fields.split_whitespace().nth(field - 3).and_then(|text| text.parse::<f64>().ok());
    let (user, system) = ticks(14).zip(ticks(15)).context("cannot understand /proc/PID/stat")?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the system does not tell its ticks")?;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    Ok((user + system) / per_second as f64)
}

/// MiB of the memory of a process that `field` of its status tells, as `VmHWM`; `Pss` is what it has in memory now, a page
/// that several processes share by halves, thirds and so on.
pub(crate) fn memory(pid: u32, field: &str) -> anyhow::Result<f64> {
    let file = format!("/proc/{pid}/{}", if field == "Pss" { "smaps_rollup" } else { "status" });
    let status = fs::read_to_string(&file)?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    Ok(kib.with_context(|| format!("{file} does not tell {field}"))? / 1024.0)
}

/// Makes the kernel forget all clean pages, names and inodes, after making them clean.
pub(crate) fn drop_caches() -> anyhow::Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")
}

/// Numbers that look random and are the same in every run with the same seed.
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `end`, which is not 0. SplitMix64; the bias of the remainder is far below
    /// what matters here.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}
