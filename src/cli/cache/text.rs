//! What `rafsd cache` prints for people.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::base::ByteSize;
use crate::cache::{LotKind, VerifyReport};
use crate::daemon::api::{BlobReport, CacheReport, GcReport, ImageUsage};

/// As much of a name as tells it from others, and fits.
fn short(name: &str) -> &str {
    name.get(..16).unwrap_or(name)
}

/// How long ago that was.
fn ago(seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    let units = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let age = now.saturating_sub(seconds);
    let unit = units.iter().find(|(length, _)| age >= *length);
    unit.map_or_else(|| "now".to_owned(), |(length, name)| format!("{} {name} ago", age / length))
}

pub(super) fn list(out: &mut dyn Write, report: &CacheReport) -> io::Result<()> {
    if !report.blobs.is_empty() {
        say!(out, "{:<16}  {:>10}  {:>8}  {:<12}  USE", "BLOB", "SIZE", "PRESENT", "LAST USED")?;
    }
    for blob in &report.blobs {
        let BlobReport { stock, .. } = blob;
        let present = match (stock.complete, stock.units) {
            (true, _) => "complete".to_owned(),
            (false, 0) => "-".to_owned(),
            (false, units) => format!("{}%", u64::from(stock.units_present) * 100 / u64::from(units)),
        };
        let (name, size) = (short(&stock.name), ByteSize(stock.bytes).to_string());
        say!(out, "{name:<16}  {size:>10}  {present:>8}  {:<12}  {}", ago(stock.last_used), uses(blob))?;
    }
    let kept: u64 = report.bootstraps.iter().map(|bootstrap| bootstrap.bytes).sum();
    say!(
        out,
        "{} blobs, {} bootstraps ({}): {} on disk at {}",
        report.blobs.len(),
        report.bootstraps.len(),
        ByteSize(kept),
        ByteSize(report.bytes),
        report.dir.display()
    )?;
    if report.kernel_cache_bytes > 0 {
        say!(out, "of it {} in the kernel's own cache", ByteSize(report.kernel_cache_bytes))?;
    }
    match report.stats.as_ref().and_then(|stats| stats.limit_bytes) {
        Some(limit) => say!(out, "limit {}", ByteSize(limit)),
        None => Ok(()),
    }
}

fn uses(blob: &BlobReport) -> String {
    let mut uses = blob.used_by.clone();
    if uses.is_empty() && blob.stock.in_use {
        uses.push("in use".to_owned());
    }
    if blob.stock.pinned {
        uses.push("pinned".to_owned());
    }
    uses.join(", ")
}

pub(super) fn usage(out: &mut dyn Write, images: &[ImageUsage]) -> io::Result<()> {
    if !images.is_empty() {
        say!(out, "{:<16}  {:>10}  {:>10}  {:>6}  MOUNTED AT", "IMAGE", "SIZE", "SHARED", "INODES")?;
    }
    for image in images {
        let (size, shared) = (ByteSize(image.bytes).to_string(), ByteSize(image.shared_bytes).to_string());
        let dirs: Vec<_> = image.mounted.iter().map(|dir| dir.display().to_string()).collect();
        let name = short(&image.image);
        say!(out, "{name:<16}  {size:>10}  {shared:>10}  {:>6}  {}", image.inodes, dirs.join(", "))?;
    }
    Ok(())
}

pub(super) fn verified(out: &mut dyn Write, reports: &[VerifyReport]) -> io::Result<()> {
    for report in reports {
        for spoilt in &report.spoilt {
            let done = if report.mended { "it will be brought again" } else { "in use, so it was left as it is" };
            say!(out, "{}: unit {} at {}: {}; {done}", report.name, spoilt.unit, spoilt.start, spoilt.what)?;
        }
    }
    let units: u64 = reports.iter().map(|report| u64::from(report.units)).sum();
    let bytes: u64 = reports.iter().map(|report| report.bytes).sum();
    let spoilt: usize = reports.iter().map(|report| report.spoilt.len()).sum();
    say!(out, "{} verified, {units} units, {}: {spoilt} spoilt", reports.len(), ByteSize(bytes))
}

pub(super) fn collected(out: &mut dyn Write, report: &GcReport) -> io::Result<()> {
    for removed in &report.removed {
        let kind = match removed.kind {
            LotKind::Blob => "blob",
            LotKind::Bootstrap => "bootstrap",
            LotKind::Kernel => "kernel",
        };
        say!(out, "{kind:<9}  {:<16}  {:>10}", short(&removed.name), ByteSize(removed.bytes).to_string())?;
    }
    let verb = if report.dry_run { "would be freed" } else { "freed" };
    say!(out, "{} {verb}, {} left", ByteSize(report.freed_bytes), ByteSize(report.left_bytes))
}
