use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;

use super::connect::{Place, block_on};
use super::mount::mount_point;
use super::print_json;
use crate::base::{ByteSize, Plain};
use crate::daemon::api::observe::{Activity, FailedUnits, ImageState, Trouble};
use crate::daemon::api::{DeviceReport, ImageReport, Info, UnservedReport};
use crate::export::BackendKind;

/// Show how a mounted image, or the daemon, is doing
///
/// For an image: whether it is lazy, which way into the kernel it takes and why not another, how much
/// of it is here, who waits, and what went wrong. Without an image: the daemon and all images in short.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct StatusArgs {
    /// Mount point, or the first digits (four or more) of an image's digest
    #[arg(value_name = "IMAGE")]
    image: Option<String>,

    /// Print everything that is known as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    place: Place,
}

const EXAMPLE: &str = "\
Example:
  rafsd status /mnt
  rafsd status --json

Exit status: 0 if everything is fine, 1 if not, or if it could not be found out.";

/// What is told about one image.
#[derive(Debug, Serialize)]
struct Status<'a> {
    #[serde(flatten)]
    image: &'a ImageReport,
    /// The backends that it is not served by, and why.
    others: Vec<Other>,
    keeper_alive: bool,
}

#[derive(Debug, Serialize)]
struct Other {
    backend: BackendKind,
    why_not: String,
}

/// What is told about the daemon.
#[derive(Debug, Serialize)]
struct Overview<'a> {
    info: &'a Info,
    activity: &'a Activity,
}

/// Exit status: 0 if nothing is wrong with what was asked for, 1 if something is.
pub(super) fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let (info, activity, images) = block_on(async {
        let client = args.place.client()?;
        let info = client.info().await.map_err(|e| args.place.explain(e))?;
        anyhow::Ok((info, client.activity().await?, client.list().await?))
    })?;
    let Some(name) = &args.image else {
        let fine = info.keeper_alive
            && info.unserved.is_empty()
            && images.iter().all(|image| image.state != ImageState::Degraded);
        if args.json {
            print_json(&Overview { info: &info, activity: &activity })?;
        } else {
            io::stdout().write_all(overview(&info, &activity).as_bytes())?;
        }
        return Ok(exit(fine));
    };
    let found = match (find(&images, name), unserved(&info, name)) {
        (Err(_), Some(mount)) if args.json => {
            print_json(mount)?;
            return Ok(ExitCode::FAILURE);
        }
        (Err(_), Some(mount)) => bail!(
            "what is mounted at {name} is not served, and cold reads of it fail: {}; unmount it and mount it again",
            mount.why
        ),
        (found, _) => found?,
    };
    let status: Vec<_> = found.into_iter().map(|image| status(image, &info)).collect();
    if args.json {
        status.iter().try_for_each(print_json)?;
    } else {
        let text: Vec<_> = status.iter().map(text).collect();
        io::stdout().write_all(text.join("\n").as_bytes())?;
    }
    let fine = status.iter().all(|status| status.image.state != ImageState::Degraded && status.keeper_alive);
    Ok(exit(fine))
}

fn exit(fine: bool) -> ExitCode {
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The mount at `name`, if nobody serves it.
fn unserved<'a>(info: &'a Info, name: &str) -> Option<&'a UnservedReport> {
    let dir = mount_point(Path::new(name)).ok()?;
    info.unserved.iter().find(|mount| mount.dir.as_ref() == Some(&dir))
}

/// The image mounted at `name`, or all mounts of the image whose digest begins with it.
fn find<'a>(images: &'a [ImageReport], name: &str) -> anyhow::Result<Vec<&'a ImageReport>> {
    let dir = Path::new(name).canonicalize().ok();
    let there: Vec<_> = images.iter().filter(|image| image.dir.is_some() && image.dir == dir).collect();
    if !there.is_empty() {
        return Ok(there);
    }
    let is_digest = name.len() >= 4 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
    let digest = name.to_ascii_lowercase();
    let found: Vec<_> = images.iter().filter(|image| is_digest && image.image.starts_with(&digest)).collect();
    let Some(first) = found.first() else {
        bail!("no image of this daemon is mounted at {name} or has a digest that begins so; `rafsd list` shows all");
    };
    if found.iter().any(|image| image.image != first.image) {
        bail!("{name} is the beginning of several images' digests; give more digits or the mount point");
    }
    Ok(found)
}

fn status<'a>(image: &'a ImageReport, info: &Info) -> Status<'a> {
    let other = |backend| Other { backend, why_not: why_not(backend, info) };
    // What is shown for others to mount cannot be shown in another way, nor an image in that one.
    let is_other = |backend: &BackendKind| {
        ![image.backend, BackendKind::Blobfs].contains(backend) && image.backend != BackendKind::Blobfs
    };
    let others = BackendKind::ALL.into_iter().filter(is_other).map(other).collect();
    Status { image, others, keeper_alive: info.keeper_alive }
}

fn why_not(backend: BackendKind, info: &Info) -> String {
    if !info.host.can(backend) {
        return info.host.obstacles(backend);
    }
    match info.host.choice {
        Some(choice) if choice == backend => "it works here; another one was asked for".to_owned(),
        _ => "it works here; another one comes first, ask for this one with --backend".to_owned(),
    }
}

fn text(status: &Status<'_>) -> String {
    let image = status.image;
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = say!(out, "  {name:<14} {value}");
    };
    let (needed, present) = totals(image);
    if let Some(reference) = &image.reference {
        line("called", reference);
    }
    if let Some(manifest) = &image.manifest {
        line("manifest", &format!("sha256:{manifest}"));
    }
    if let Some(why) = &image.unconfirmed {
        line("unconfirmed", &format!("the tag may lead elsewhere by now: {why}"));
    }
    line("state", &state(image));
    line("kernel path", &format!("{}: {}", image.backend, image.why));
    if let Some(shown) = &image.shows {
        line("shows", &shown.display().to_string());
    }
    if let Some(transport) = &image.transport {
        line("FUSE requests", &format!("{}: {}", transport.used, transport.why));
    }
    for other in &status.others {
        line(&format!("not {}", other.backend), &other.why_not);
    }
    match needed {
        0 => line("here", "unknown until it is read"),
        _ => line("here", &format!("{} ({})", of(present, needed), percent(present, needed))),
    }
    line("waiting", &waiting(image));
    line("errors", &errors(image));
    for source in &image.sources {
        let failure = source.last_error.as_ref();
        let how = match (source.failing, failure) {
            (true, Some(trouble)) => format!("failing, {}", told(trouble)),
            (false, Some(trouble)) => format!("works again; failed {}", told(trouble)),
            (_, None) => "no error".to_owned(),
        };
        line("source", &format!("{} ({how})", source.source));
    }
    let keeper = if status.keeper_alive { "alive" } else { "dead: readers see zeros if the daemon dies too" };
    line("keeper", keeper);
    for device in &image.devices {
        line("blob", &blob(device));
    }
    let place = image.dir.as_deref().map_or_else(|| "registered".to_owned(), |dir| dir.display().to_string());
    format!("{}: image {}\n{out}", Plain(place), &image.image[..16.min(image.image.len())])
}

fn state(image: &ImageReport) -> String {
    let how = match (image.state, image.backend) {
        (ImageState::Lazy, _) => "lazy: what is missing is fetched when it is read",
        (ImageState::Complete, BackendKind::Fanotify) => "complete: the kernel reads all of it alone",
        (ImageState::Complete, BackendKind::Cachefiles) => "complete: all of it is in the kernel's cache",
        (ImageState::Complete, BackendKind::FuseDevice) => {
            "complete: all of it is in the cache; what was missing at the mount is read through the daemon"
        }
        (ImageState::Complete, BackendKind::FuseTree | BackendKind::Blobfs) => {
            "complete: all of it is in the cache, and the daemon reads it"
        }
        (ImageState::Degraded, _) => "degraded: data is missing, and the last attempt to get some failed",
    };
    how.to_owned()
}

/// Decoded bytes that the image names, and those that are here, over the blobs that are open.
fn totals(image: &ImageReport) -> (u64, u64) {
    let health = image.devices.iter().filter_map(|device| device.health.as_ref());
    health.fold((0, 0), |(needed, present), of| (needed + of.needed_bytes, present + of.present_bytes))
}

fn waiting(image: &ImageReport) -> String {
    let health = || image.devices.iter().filter_map(|device| device.health.as_ref());
    let oldest = health().filter_map(|health| health.oldest_wait_ms).max();
    match (health().map(|health| health.waiting).sum(), oldest) {
        (0, _) | (_, None) => "no read".to_owned(),
        (1, Some(ms)) => format!("1 read, for {}", seconds(ms)),
        (many, Some(ms)) => format!("{many} reads, the first for {}", seconds(ms)),
    }
}

fn errors(image: &ImageReport) -> String {
    let health: Vec<_> = image.devices.iter().filter_map(|device| device.health.as_ref()).collect();
    let sum = health.iter().fold(FailedUnits::default(), |sum, health| add(sum, health.failed_units));
    let causes: Vec<_> = sum.wanted().map(|(cause, count)| format!("{cause} {count}")).collect();
    if causes.is_empty() {
        return "none".to_owned();
    }
    let last = health.iter().filter_map(|health| health.last_error.as_ref()).min_by_key(|trouble| trouble.ago_ms);
    format!("units by cause: {}; last {}", causes.join(", "), last.map(told).unwrap_or_default())
}

fn add(a: FailedUnits, b: FailedUnits) -> FailedUnits {
    FailedUnits {
        source: a.source + b.source,
        corrupt: a.corrupt + b.corrupt,
        no_space: a.no_space + b.no_space,
        io: a.io + b.io,
        limit: a.limit + b.limit,
        unmapped: a.unmapped + b.unmapped,
        cancelled: a.cancelled + b.cancelled,
    }
}

fn blob(device: &DeviceReport) -> String {
    let name = &device.blob[..16.min(device.blob.len())];
    match (&device.health, device.stats) {
        (Some(health), Some(stats)) => {
            let here = of(health.present_bytes, health.needed_bytes);
            let fetched = ByteSize(stats.stored_bytes_fetched);
            format!("{name}  {here}, {fetched} fetched, {} misses", stats.misses)
        }
        _ => format!("{name}  {} not opened yet", ByteSize(device.decoded_bytes)),
    }
}

fn of(part: u64, all: u64) -> String {
    format!("{} of {}", ByteSize(part), ByteSize(all))
}

/// Rounded down: 100 % is said of what is all there.
pub(super) fn percent(part: u64, all: u64) -> String {
    (part * 100).checked_div(all).map_or_else(|| "-".to_owned(), |percent| format!("{percent}%"))
}

fn told(trouble: &Trouble) -> String {
    format!("{} ago: {}", seconds(trouble.ago_ms), trouble.error)
}

/// A duration of milliseconds for people.
pub(super) fn seconds(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{:.1} s", Duration::from_millis(ms).as_secs_f64()),
        60_000..3_600_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

fn overview(info: &Info, activity: &Activity) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = say!(out, "  {name:<14} {value}");
    };
    let choice = info.host.choice.map_or("no image can be mounted here; `rafsd doctor` tells why".to_owned(), |kind| {
        format!("new images go by {kind}")
    });
    line("kernel path", &choice);
    let count = |state| activity.images.iter().filter(|image| image.state == state).count();
    let [lazy, complete, degraded] = [ImageState::Lazy, ImageState::Complete, ImageState::Degraded].map(count);
    line("images", &format!("{lazy} lazy, {complete} complete, {degraded} degraded"));
    for reads in activity.reads.iter().filter(|reads| reads.at_once + reads.filled + reads.denied + reads.waiting > 0) {
        let counts = format!("{} at once, {} after a wait, {} denied", reads.at_once, reads.filled, reads.denied);
        line("reads", &format!("{}: {counts}, {} waiting", reads.backend, reads.waiting));
    }
    if let Some(ms) = activity.oldest_wait_ms {
        line("oldest wait", &seconds(ms));
    }
    let causes: Vec<_> = activity.failed_units.wanted().map(|(cause, count)| format!("{cause} {count}")).collect();
    line(
        "errors",
        &if causes.is_empty() { "none".to_owned() } else { format!("units by cause: {}", causes.join(", ")) },
    );
    for source in activity.sources.iter().filter(|source| source.failing) {
        line("failing", &format!("{} {}", source.source, source.last_error.as_ref().map(told).unwrap_or_default()));
    }
    for mount in &info.unserved {
        let place = mount.dir.as_deref().map_or_else(|| "-".into(), Path::to_string_lossy);
        line("not served", &format!("{place}: {}", mount.why));
    }
    let cache = &activity.cache;
    let limit = cache.limit.map(|limit| format!(" of at most {}", ByteSize(limit))).unwrap_or_default();
    let free = of(cache.disk_free, cache.disk_bytes);
    line("cache", &format!("{}: {}{limit}; disk: {free} free", info.cache.display(), ByteSize(cache.bytes)));
    line("keeper", if info.keeper_alive { "alive" } else { "dead; restart the daemon" });
    format!("rafsd {}, process {}, up {}\n{out}", info.version, info.pid, seconds(activity.uptime_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::samples;

    fn shown(change: impl FnOnce(&mut ImageReport, &mut Info)) -> String {
        let (mut image, mut info) = (samples::image(), samples::info());
        change(&mut image, &mut info);
        text(&status(&image, &info))
    }

    #[test]
    fn an_image_is_shown_with_everything_one_asks_for() {
        let text = shown(|_, _| {});
        assert_eq!(
            text,
            "\
/mnt: image 4708d63853773c9d
  called         registry.example/team/app:1
  manifest       sha256:b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c
  unconfirmed    the tag may lead elsewhere by now: https://registry.example does not answer: connection refused
  state          lazy: what is missing is fetched when it is read
  kernel path    fanotify: pre-content events passed their self test, and there is no cachefiles
  not cachefiles /dev/cachefiles cannot be opened (No such file or directory): load the cachefiles module
  not fuse-device it works here; another one comes first, ask for this one with --backend
  not fuse-tree  it works here; another one comes first, ask for this one with --backend
  here           3.0 MiB of 12.0 MiB (25%)
  waiting        2 reads, the first for 1.5 s
  errors         units by cause: source 3, corrupt 1; last 12.0 s ago: unit 3 is corrupt
  source         https://blobs.example/image (works again; failed 12.0 s ago: no answer in time)
  keeper         alive
  blob           9dc702c353581414  3.0 MiB of 12.0 MiB, 2.0 MiB fetched, 4 misses
"
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        let text = shown(|image, info| {
            image.state = ImageState::Degraded;
            image.sources[0].failing = true;
            info.keeper_alive = false;
        });
        for words in ["degraded: data is missing", "(failing, 12.0 s ago: no answer in time)", "keeper         dead"] {
            assert!(text.contains(words), "{words} is not in\n{text}");
        }
    }

    #[test]
    fn no_name_makes_another_line_or_drives_a_terminal() {
        let hostile = "/mnt\n  state          complete\u{1b}[2J";
        let text = shown(|image, _| {
            image.dir = Some(hostile.into());
            image.sources[0].source = hostile.to_owned();
        });
        let (mut info, activity) = (samples::info(), samples::activity());
        info.unserved[0].dir = Some(hostile.into());
        let overview = overview(&info, &activity);
        for text in [text, overview] {
            assert!(text.contains("/mnt\\n  state          complete\\u{1b}[2J"), "{text}");
            assert!(!text.contains('\u{1b}') && !text.contains("\n  state          complete"), "{text}");
        }
    }

    #[test]
    fn a_path_that_works_and_was_not_taken_is_explained() {
        let text = shown(|_, info| info.host.findings.iter_mut().for_each(|finding| finding.works = true));
        assert!(text.contains("not cachefiles it works here; another one comes first"), "{text}");
    }

    #[test]
    fn images_are_found_by_mount_point_or_digest() {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b, mut twin) = (samples::image(), samples::image(), samples::image());
        a.dir = Some(dir.path().canonicalize().unwrap());
        b.image = "4708ffff".repeat(8);
        twin.dir = Some("/elsewhere".into());
        let images = [a, b, twin];
        let count = |name: &str| find(&images, name).map(|found| found.len());

        assert_eq!(count(dir.path().to_str().unwrap()).unwrap(), 1);
        assert_eq!(count("4708D6").unwrap(), 2, "two mounts of one image");
        assert_eq!(count("4708f").unwrap(), 1);
        for (name, words) in
            [("4708", "several images"), ("470", "no image"), ("/nowhere", "no image"), ("", "no image")]
        {
            assert!(count(name).unwrap_err().to_string().contains(words), "{name}");
        }
    }

    #[test]
    fn the_daemon_is_shown_in_short() {
        let text = overview(&samples::info(), &samples::activity());
        for words in [
            "rafsd 0.1.0, process 4711, up 2 h 5 min\n",
            "images         1 lazy, 0 complete, 0 degraded\n",
            "reads          fanotify: 31 at once, 4 after a wait, 1 denied, 2 waiting\n",
            "oldest wait    1.5 s\n",
            "errors         units by cause: source 3, corrupt 1\n",
            "not served     /old: no connection\n",
            "failing        https://blobs.example/image 12.0 s ago: no answer in time\n",
            "cache          /var/lib/rafsd: 3.0 MiB of at most 1.0 GiB; disk: 5.0 GiB of 10.0 GiB free\n",
        ] {
            assert!(text.contains(words), "{words} is not in\n{text}");
        }
        assert!(!text.contains("cachefiles:"), "{text}");
    }
}
