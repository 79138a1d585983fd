//! The counters in the OpenMetrics text format.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry;

use super::catalogue::{self, Kind, Metric, Unit};
use super::{BOUNDS, Counter, Family, Gauge, Histogram, Label, Telemetry};

/// Content type of [`Telemetry::exposition`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) fn text(telemetry: &Telemetry) -> String {
    let mut registry = registry::Registry::default();
    registry.register_collector(Box::new(telemetry.clone()));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes everything");
    text
}

type Labels = Vec<(&'static str, String)>;

/// What has one number, or one for each value of its labels.
trait Series {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result;
}

impl Series for Counter {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result {
        with_labels(to, labels, |to| to.encode_counter::<NoLabelSet, _, u64>(&self.get(), Option::None))
    }
}

impl Series for Gauge {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result {
        with_labels(to, labels, |to| to.encode_gauge(&self.get()))
    }
}

impl Series for Histogram {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result {
        let shot = self.snapshot();
        let bounds = BOUNDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(shot.counts.iter().copied()).collect();
        let sum = shot.sum.as_secs_f64();
        with_labels(to, labels, |to| to.encode_histogram::<NoLabelSet>(sum, shot.count(), &buckets, Option::None))
    }
}

impl<L: Label, M: Series> Series for Family<L, M> {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result {
        self.iter().try_for_each(|(label, metric)| {
            labels.push((L::NAME, label.text().to_owned()));
            let outcome = metric.write(to, labels);
            labels.pop();
            outcome
        })
    }
}

fn with_labels(
    to: &mut MetricEncoder<'_>,
    labels: &Labels,
    write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    if labels.is_empty() { write(to) } else { write(&mut to.encode_family(labels)?) }
}

/// One member of each value of a family, as a family of its own.
struct Each<'a, L, T, M>(&'a Family<L, T>, fn(&T) -> &M);

impl<L: Label, T, M: Series> Series for Each<'_, L, T, M> {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result {
        self.0.iter().try_for_each(|(label, of)| {
            labels.push((L::NAME, label.text().to_owned()));
            let outcome = (self.1)(of).write(to, labels);
            labels.pop();
            outcome
        })
    }
}

/// The same for sources, whose names are not known beforehand.
struct EachPlace<'a, M>(&'a [(String, std::sync::Arc<super::Place>)], fn(&super::Place) -> &M);

impl<M: Series> Series for EachPlace<'_, M> {
    fn write(&self, to: &mut MetricEncoder<'_>, labels: &mut Labels) -> fmt::Result {
        self.0.iter().try_for_each(|(name, place)| {
            labels.push(("source", name.clone()));
            let outcome = (self.1)(place).write(to, labels);
            labels.pop();
            outcome
        })
    }
}

impl Collector for Telemetry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        each(self, &mut |metric, series| {
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let unit = match metric.unit {
                Unit::None => Option::None,
                Unit::Bytes => Some(registry::Unit::Bytes),
                Unit::Seconds => Some(registry::Unit::Seconds),
            };
            let mut to = encoder.encode_descriptor(metric.stem, metric.meaning, unit.as_ref(), kind)?;
            series.write(&mut to, &mut Labels::new())
        })
    }
}

/// Shows every metric of the catalogue with its numbers.
fn each(of: &Telemetry, show: &mut dyn FnMut(&Metric, &dyn Series) -> fmt::Result) -> fmt::Result {
    let (fills, space, adoption) = (&of.fills, &of.space, &of.adoption);
    let places = of.places();
    show(&catalogue::READS, &Each(&of.reads, |reads| &reads.answered))?;
    show(&catalogue::READS_WAITING, &Each(&of.reads, |reads| &reads.waiting))?;
    show(&catalogue::READ_DURATION, &Each(&of.reads, |reads| &reads.duration))?;
    show(&catalogue::MISSES, &fills.misses)?;
    show(&catalogue::READ_QUEUE, &fills.queue)?;
    show(&catalogue::FETCH_DURATION, &fills.fetch)?;
    show(&catalogue::DECODE_QUEUE, &fills.decode_queue)?;
    show(&catalogue::LAND_DURATION, &fills.land)?;
    show(&catalogue::UNITS_FILLED, &fills.filled)?;
    show(&catalogue::FILLED, &fills.filled_bytes)?;
    show(&catalogue::UNITS_FAILED, &fills.failed)?;
    show(&catalogue::REFETCHED, &fills.refetched)?;
    show(&catalogue::SOURCE_READS, &EachPlace(&places, |place| &place.reads))?;
    show(&catalogue::SOURCE, &EachPlace(&places, |place| &place.bytes))?;
    show(&catalogue::SOURCE_HEDGES, &EachPlace(&places, |place| &place.hedges))?;
    show(&catalogue::SOURCE_RETRIES, &EachPlace(&places, |place| &place.retries))?;
    show(&catalogue::SOURCE_WRONG, &EachPlace(&places, |place| &place.wrong))?;
    show(&catalogue::CACHE, &space.bytes)?;
    show(&catalogue::CACHE_LIMIT, &space.limit)?;
    show(&catalogue::EVICTIONS, &space.evictions)?;
    show(&catalogue::EVICTED, &space.evicted_bytes)?;
    show(&catalogue::SCRUBBED, &space.scrubbed_bytes)?;
    show(&catalogue::SCRUB_BAD_UNITS, &space.scrub_bad_units)?;
    show(&catalogue::DEDUP_UNITS, &space.dedup_units)?;
    show(&catalogue::DEDUP, &space.dedup_bytes)?;
    show(&catalogue::IMAGES, &of.images)?;
    show(&catalogue::UNSERVED, &of.unserved)?;
    show(&catalogue::ADOPTIONS, &adoption.adoptions)?;
    show(&catalogue::ADOPTED_MOUNTS, &adoption.mounts)?;
    show(&catalogue::ADOPTED_READS, &adoption.reads)
}

#[cfg(test)]
mod tests {
    use super::super::{Answer, Backend, CATALOGUE, Outcome, markdown};
    use super::*;
    use crate::base::Class;

    fn sample() -> Telemetry {
        let telemetry = Telemetry::default();
        telemetry.reads.at(Backend::Fanotify).answered.at(Answer::Filled).add(3);
        let place = telemetry.place("https://h/\"x\"");
        place.reads.at(Class::OnDemand).at(Outcome::Late).inc();
        place.bytes.at(Class::Prefetch).add(17);
        telemetry.fills.queue.observe(Duration::from_millis(2));
        telemetry
    }

    #[test]
    fn the_exposition_has_exactly_the_metrics_of_the_catalogue() {
        let text = sample().exposition();

        let types: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let expected: Vec<_> =
            CATALOGUE.iter().map(|m| format!("{}{} {}", m.stem, m.unit.suffix(), m.kind.text())).collect();
        assert_eq!(types, expected);
        for metric in CATALOGUE {
            let suffix = if metric.kind == Kind::Histogram { "_count" } else { "" };
            let name = format!("{}{suffix}", metric.name());
            let line =
                text.lines().find(|line| line.strip_prefix(&name).is_some_and(|rest| rest.starts_with([' ', '{'])));
            let line = line.unwrap_or_else(|| panic!("{name} has no line in\n{text}"));
            let labels: Vec<_> = line.split_once('{').map_or(vec![], |(_, rest)| {
                rest.split("\",").filter_map(|label| label.split_once("=\"")).map(|(name, _)| name).collect()
            });
            assert_eq!(labels, metric.labels, "{line}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn numbers_stand_where_they_were_counted() {
        let text = sample().exposition();
        for line in [
            r#"rafsd_reads_total{backend="fanotify",answer="filled"} 3"#,
            r#"rafsd_source_reads_total{source="https://h/\"x\"",class="on_demand",outcome="late"} 1"#,
            r#"rafsd_source_bytes_total{source="https://h/\"x\"",class="prefetch"} 17"#,
            r#"rafsd_read_queue_seconds_bucket{le="0.001"} 0"#,
            r#"rafsd_read_queue_seconds_bucket{le="0.0025"} 1"#,
            r#"rafsd_read_queue_seconds_bucket{le="+Inf"} 1"#,
            "rafsd_read_queue_seconds_sum 0.002",
            "rafsd_cache_bytes 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    /// Whoever renames a metric breaks somebody's dashboard: this list is to be changed on purpose.
    #[test]
    fn names_are_pinned() {
        let names: Vec<_> = CATALOGUE
            .iter()
            .map(|metric| format!("{} {}", metric.name(), metric.labels.join(",")).trim_end().to_owned())
            .collect();
        assert_eq!(names.join("\n"), include_str!("names.txt").trim_end());
    }

    #[test]
    fn the_documentation_has_the_catalogue() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md");
        let docs = std::fs::read_to_string(path).expect("docs/METRICS.md");
        let (begin, end) = ("<!-- catalogue: begin -->\n", "<!-- catalogue: end -->");
        let (before, rest) = docs.split_once(begin).expect("where the catalogue begins");
        let (table, after) = rest.split_once(end).expect("where the catalogue ends");
        if std::env::var_os("RAFSD_WRITE_GOLDEN").is_some() {
            std::fs::write(path, [before, begin, &markdown(), end, after].concat()).expect("docs/METRICS.md");
            return;
        }
        assert_eq!(table, markdown(), "RAFSD_WRITE_GOLDEN=1 writes the table anew");
    }
}
