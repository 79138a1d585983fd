use std::io::{self, Write};

use rafsd::base::ByteSize;
use serde::Serialize;

use super::corpus::Corpus;
use super::measure::Spread;

/// What a row should be like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The ratio is at least this.
    Ratio(f64),
    /// The ratio is from 1 - this to 1 + this.
    Same(f64),
    /// Our value is at least this.
    AtLeast(f64),
    /// Our value is at most this.
    AtMost(f64),
    /// Shown for comparison.
    None,
}

impl Target {
    fn is_met(self, row: &Row) -> Option<bool> {
        let ratio = row.ratio.map_or(f64::NAN, |ratio| ratio.median);
        match self {
            Self::Ratio(least) => Some(ratio >= least),
            Self::Same(around) => Some((ratio - 1.0).abs() <= around),
            Self::AtLeast(least) => Some(row.ours >= least),
            Self::AtMost(most) => Some(row.ours <= most),
            Self::None => None,
        }
    }

    fn text(self, unit: &str) -> String {
        match self {
            Self::Ratio(least) => format!(">= {least:.2}"),
            Self::Same(around) => format!("1.00 +- {around:.2}"),
            Self::AtLeast(least) => format!(">= {least} {unit}"),
            Self::AtMost(most) => format!("<= {most} {unit}"),
            Self::None => String::new(),
        }
    }
}

/// One comparison.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    ours: f64,
    other: Option<f64>,
    unit: &'static str,
    ratio: Option<Spread>,
    target: String,
    ok: Option<bool>,
}

/// Where and on what everything was measured.
#[derive(Debug, Default, Serialize)]
struct Setting {
    kernel: String,
    cores: usize,
    source: String,
    seed: u64,
    files: usize,
    symlinks: usize,
    bytes: u64,
}

/// Rows in the order they were measured.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    setting: Setting,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn corpus(&mut self, corpus: &Corpus) {
        let system = nix::sys::utsname::uname();
        self.setting = Setting {
            kernel: system.map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            source: corpus.source.display().to_string(),
            seed: corpus.seed,
            files: corpus.files.len(),
            symlinks: corpus.symlinks,
            bytes: corpus.bytes,
        };
    }

    /// Adds a comparison of two values, larger being better.
    pub(crate) fn compare(
        &mut self,
        name: impl Into<String>,
        (ours, other, unit): (f64, f64, &'static str),
        ratio: Spread,
        target: Target,
    ) {
        self.add(name.into(), ours, Some(other), unit, Some(ratio), target);
    }

    /// Adds a value with nothing beside it.
    pub(crate) fn value(&mut self, name: impl Into<String>, ours: f64, unit: &'static str, target: Target) {
        self.add(name.into(), ours, None, unit, None, target);
    }

    fn add(
        &mut self,
        name: String,
        ours: f64,
        other: Option<f64>,
        unit: &'static str,
        ratio: Option<Spread>,
        target: Target,
    ) {
        let mut row = Row { name, ours, other, unit, ratio, target: target.text(unit), ok: None };
        row.ok = target.is_met(&row);
        // A run takes a while; whoever waits sees how far it is.
        eprintln!("{}: {:.1} {unit}", row.name, row.ours);
        self.rows.push(row);
    }

    pub(crate) fn print(&self, json: bool) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        if json {
            serde_json::to_writer_pretty(&mut out, self)?;
            return Ok(writeln!(out)?);
        }
        let Setting { kernel, cores, source, seed, files, symlinks, bytes } = &self.setting;
        let size = ByteSize(*bytes);
        writeln!(out, "{files} files, {symlinks} symlinks, {size} of {source} (seed {seed}); {cores} cores, {kernel}")?;
        if self.rows.iter().any(|row| row.name.contains("cold")) {
            writeln!(out, "metadata of ours stays in memory when caches are dropped: the daemon has it mapped")?;
        }
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        writeln!(
            out,
            "{:<width$}  {:>10}  {:>10}  {:<9} {:>6}  {:<13}  {:<12}",
            "", "ours", "other", "", "ratio", "(low..high)", "target"
        )?;
        for Row { name, ours, other, unit, ratio, target, ok } in &self.rows {
            let other = other.map(|other| format!("{other:.1}")).unwrap_or_default();
            let (median, around) = ratio.map_or_else(Default::default, |ratio| {
                (format!("{:.2}", ratio.median), format!("({:.2}..{:.2})", ratio.low, ratio.high))
            });
            let verdict = ok.map_or("", |ok| if ok { "ok" } else { "MISS" });
            writeln!(
                out,
                "{name:<width$}  {ours:>10.1}  {other:>10}  {unit:<9} {median:>6}  {around:<13}  {target:<12}  {verdict}"
            )?;
        }
        Ok(())
    }
}
