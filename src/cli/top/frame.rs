//! What is on the screen: lines of text that fit, made of numbers alone.

use std::cmp::Reverse;

use super::rates::Rates;
use crate::base::{ByteSize, Plain};
use crate::cli::status::{percent, seconds};
use crate::daemon::api::observe::{Activity, ImageState, SourceActivity};

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

impl Size {
    /// The smallest that everything is made for.
    pub(super) const DEFAULT: Self = Self { columns: 80, rows: 24 };
}

/// Rows for sources; images get what is left.
const SOURCES: usize = 5;

/// At most `size.rows` lines of at most `size.columns` characters.
pub(super) fn frame(now: &Activity, rates: &Rates, size: Size) -> Vec<String> {
    let mut lines = summary(now, rates);
    lines.push(String::new());
    lines.push(format!("{:>7} {:>7} {:>10} {:>7} {:>7}  SOURCE", "READ/S", "FAIL/S", "BYTES/S", "FAILED", "RETRIES"));
    lines.extend(sources(now, rates));
    lines.push(String::new());
    lines.push(format!("{:>7} {:>9} {:>7}  {:<8}  {:<12}  IMAGE", "MISS/S", "MISSES", "WAITING", "STATE", "DIGEST"));
    lines.extend(images(now, rates));
    // The last row stays for the key.
    lines.truncate(size.rows.saturating_sub(1));
    lines.push("q quits".to_owned());
    lines.into_iter().map(|line| cut(&line, size.columns)).collect()
}

fn summary(now: &Activity, rates: &Rates) -> Vec<String> {
    let count = |state| now.images.iter().filter(|image| image.state == state).count();
    let [lazy, complete, degraded] = [ImageState::Lazy, ImageState::Complete, ImageState::Degraded].map(count);
    let waiting: u64 = now.reads.iter().map(|reads| reads.waiting).sum();
    let oldest = now.oldest_wait_ms.map(|ms| format!(", the first for {}", seconds(ms))).unwrap_or_default();
    let (misses, bytes) = (rates.misses_per_second, rates.bytes_per_second);
    let latency = |us: Option<u64>| us.map_or("-".to_owned(), micros);
    let causes: Vec<_> = now.failed_units.wanted().map(|(cause, count)| format!("{cause} {count}")).collect();
    let errors = if causes.is_empty() { "none".to_owned() } else { causes.join(", ") };
    vec![
        format!(
            "rafsd {}, up {}; images: {lazy} lazy, {complete} complete, {degraded} degraded",
            now.pid,
            seconds(now.uptime_ms)
        ),
        format!(
            "reads     {:>8.1}/s at once  {:>8.1}/s waited  {:>8.1}/s denied",
            rates.at_once_per_second, rates.waited_per_second, rates.denied_per_second
        ),
        format!("waiting   {waiting} reads{oldest}"),
        format!("latency   p50 {}, p99 {} of reads that waited", latency(rates.p50_us), latency(rates.p99_us)),
        format!("misses    {:>8.1}/s on demand  {:>8.1}/s prefetch", misses.on_demand, misses.prefetch),
        format!("fetched   {:>10}/s on demand  {:>10}/s prefetch", size(bytes.on_demand), size(bytes.prefetch)),
        format!("errors    {errors} (units since the start)"),
        format!("cache     {}", cache(now)),
    ]
}

fn cache(now: &Activity) -> String {
    let cache = now.cache;
    let free = percent(cache.disk_free, cache.disk_bytes);
    match cache.limit {
        Some(limit) => {
            let part = percent(cache.bytes, limit);
            format!("{} of {} ({part}); {free} of the disk free", ByteSize(cache.bytes), ByteSize(limit))
        }
        None => format!("{}, no limit; {free} of the disk free", ByteSize(cache.bytes)),
    }
}

fn sources(now: &Activity, rates: &Rates) -> Vec<String> {
    let mut all: Vec<_> = now.sources.iter().zip(&rates.sources).collect();
    // Those that fail first, then the busy ones.
    all.sort_by(|(a, a_rates), (b, b_rates)| {
        (b.failing, b_rates.bytes_per_second).partial_cmp(&(a.failing, a_rates.bytes_per_second)).expect("no NaN")
    });
    let more = all.len().saturating_sub(SOURCES);
    let line = |(source, rates): &(&SourceActivity, &super::rates::SourceRates)| {
        let trouble = source.last_error.as_ref().filter(|_| source.failing);
        let trouble = trouble.map(|trouble| format!(" ({})", trouble.error)).unwrap_or_default();
        format!(
            "{:>7.1} {:>7.1} {:>10} {:>7} {:>7}  {}{trouble}",
            rates.reads_per_second,
            rates.failed_per_second,
            size(rates.bytes_per_second),
            source.failed,
            source.retries,
            source.source
        )
    };
    let mut lines: Vec<_> = all.iter().take(SOURCES).map(line).collect();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines
}

fn images(now: &Activity, rates: &Rates) -> Vec<String> {
    let mut all: Vec<_> = now.images.iter().zip(&rates.images).collect();
    all.sort_by(|(a, a_rates), (b, b_rates)| {
        let key = |rates: &super::rates::ImageRates| rates.misses_per_second;
        key(b_rates).partial_cmp(&key(a_rates)).expect("no NaN").then(Reverse(a.misses).cmp(&Reverse(b.misses)))
    });
    let state = |state| match state {
        ImageState::Lazy => "lazy",
        ImageState::Complete => "complete",
        ImageState::Degraded => "degraded",
    };
    let line = |(image, rates): &(&crate::daemon::api::observe::ImageActivity, &super::rates::ImageRates)| {
        let place = image.dir.as_deref().map_or_else(|| "registered".to_owned(), |dir| dir.display().to_string());
        let digest = image.image.get(..12).unwrap_or(&image.image);
        format!(
            "{:>7.1} {:>9} {:>7}  {:<8}  {digest:<12}  {place}",
            rates.misses_per_second,
            image.misses,
            image.waiting,
            state(image.state)
        )
    };
    all.iter().map(line).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are not negative, and saturate")]
fn size(bytes: f64) -> String {
    ByteSize(bytes as u64).to_string()
}

fn micros(us: u64) -> String {
    if us < 1000 { format!("{us} µs") } else { seconds(us / 1000) }
}

/// The line, cut to `columns` characters, without anything that a terminal would obey: paths and
/// messages of servers may hold any character.
fn cut(line: &str, columns: usize) -> String {
    let shown: String = Plain(line).to_string().chars().take(columns + 1).collect();
    if shown.chars().count() <= columns {
        return shown;
    }
    shown.chars().take(columns.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::samples;

    fn shown(now: &Activity, size: Size) -> Vec<String> {
        frame(now, &Rates::between(&samples::activity(), now), size)
    }

    fn later() -> Activity {
        let mut later = samples::activity();
        later.uptime_ms += 1000;
        later.reads[0].filled += 6;
        later.misses.on_demand += 6;
        later.fetched_bytes.prefetch += 4 << 20;
        later.sources[0].reads += 2;
        later.sources[0].bytes.prefetch += 4 << 20;
        later.images[0].misses += 6;
        later.read_durations.counts[9] += 6;
        later
    }

    #[test]
    fn a_frame_says_what_happened() {
        assert_eq!(
            shown(&later(), Size::DEFAULT).join("\n"),
            "\
rafsd 4711, up 2 h 5 min; images: 1 lazy, 0 complete, 0 degraded
reads          0.0/s at once       6.0/s waited       0.0/s denied
waiting   2 reads, the first for 1.5 s
latency   p50 7 ms, p99 9 ms of reads that waited
misses         6.0/s on demand       0.0/s prefetch
fetched          0 B/s on demand     4.0 MiB/s prefetch
errors    source 3, corrupt 1 (units since the start)
cache     3.0 MiB of 1.0 GiB (0%); 50% of the disk free

 READ/S  FAIL/S    BYTES/S  FAILED RETRIES  SOURCE
    2.0     0.0    4.0 MiB       4       6  https://blobs.example/image (no ans…

 MISS/S    MISSES WAITING  STATE     DIGEST        IMAGE
    6.0        10       2  lazy      4708d6385377  /mnt
q quits"
        );
    }

    #[test]
    fn a_frame_fits_whatever_is_in_it() {
        let mut many = later();
        let (source, image) = (many.sources[0].clone(), many.images[0].clone());
        for number in 0..100 {
            let mut source = source.clone();
            source.source = format!("https://{}/{number}", "long.".repeat(40));
            many.sources.push(source);
            let mut image = image.clone();
            image.dir = Some(format!("/mnt/{number}/\u{1b}[2J{}", "ü".repeat(200)).into());
            image.misses = u64::MAX / 200;
            many.images.push(image);
        }
        for size in [
            Size::DEFAULT,
            Size { columns: 20, rows: 5 },
            Size { columns: 300, rows: 100 },
            Size { columns: 0, rows: 0 },
        ] {
            let lines = shown(&many, size);
            assert!(lines.len() <= size.rows.max(1), "{} lines in {size:?}", lines.len());
            for line in lines {
                assert!(line.chars().count() <= size.columns.max(1), "{line:?} in {size:?}");
                assert!(!line.contains(char::is_control), "{line:?}");
            }
        }
        let lines = shown(&many, Size { columns: 300, rows: 100 });
        assert!(lines.contains(&"and 96 more".to_owned()));
    }

    #[test]
    fn images_that_miss_most_and_sources_that_fail_come_first() {
        let mut now = later();
        let (mut quiet, mut fine) = (now.images[0].clone(), now.sources[0].clone());
        quiet.dir = Some("/quiet".into());
        fine.source = "/fine".into();
        fine.failing = false;
        now.images.insert(0, quiet);
        now.sources.insert(0, fine);

        let lines = shown(&now, Size::DEFAULT);
        let at = |word: &str| lines.iter().position(|line| line.contains(word)).unwrap();
        assert!(at("/mnt") < at("/quiet"));
        assert!(at("blobs.example") < at("/fine"));
    }
}
