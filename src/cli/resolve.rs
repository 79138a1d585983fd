use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use super::connect::{DaemonArgs, block_on};
use super::mount::{absolute, named};
use super::print_json;
use crate::base::ByteSize;
use crate::daemon::api::{BackendChoice, ImageSpec, ResolveReport, ResolveRequest};
use crate::oci::{Platform, Reference};

/// Explain what a reference to an image in a registry is, and how it would be mounted here
///
/// Asks the registry for its documents and fetches no data.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ResolveArgs {
    /// An image in a registry, as docker://HOST/REPOSITORY:TAG
    #[arg(value_name = "REFERENCE")]
    reference: PathBuf,

    /// For which machine, where the image comes for several [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,

    /// Tell where it led the last time, without asking the registry
    #[arg(long)]
    offline: bool,

    /// Where the blobs are, as for `rafsd mount`
    #[arg(long, value_name = "DIR|URL")]
    blobs: Vec<String>,

    /// PEM file with a certificate authority to trust besides the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    /// By which backend it would be mounted
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    backend: BackendChoice,

    #[command(flatten)]
    daemon: DaemonArgs,

    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status:
  0  it can be mounted here, as far as its manifest and this host tell
  1  it cannot, and why is said; or the registry does not tell
  2  wrong command line

Examples:
  rafsd resolve docker://registry.example/team/app:1.2-nydus
  rafsd resolve docker://registry.example/team/app:1.2-nydus --platform linux/arm64 --json";

/// Exit status: 1 if it cannot be mounted.
pub(super) fn run(args: ResolveArgs) -> anyhow::Result<ExitCode> {
    if !args.reference.to_str().is_some_and(Reference::is_meant) {
        bail!("{} is no reference; write docker://HOST/REPOSITORY:TAG", args.reference.display());
    }
    let spec = ImageSpec {
        platform: args.platform.as_ref().map(ToString::to_string),
        offline: args.offline,
        blobs: super::mount::places(args.blobs)?,
        ca: args.ca.as_deref().map(absolute).transpose()?,
        ..ImageSpec::default()
    };
    let request = ResolveRequest { image: named(&args.reference, spec)?, backend: args.backend };
    let report = block_on(async { Ok(args.daemon.connect().await?.resolve(&request).await?) })?;
    if args.json {
        print_json(&report)?;
    } else {
        io::stdout().write_all(text(&report).as_bytes())?;
    }
    Ok(if report.problem.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The same for people.
fn text(report: &ResolveReport) -> String {
    let mut out = format!("{}\n", report.reference);
    for (depth, document) in report.documents.iter().enumerate() {
        let how = match document.how.as_str() {
            "marked" => ", marked there as a Nydus image",
            "refers" => ", which refers to the one above",
            _ => "",
        };
        let platform = document.platform.as_ref().map(|it| format!(" for {it}")).unwrap_or_default();
        let (kind, digest) = (&document.kind, &document.digest);
        let _ = say!(out, "{:indent$}{kind} sha256:{digest}{platform}{how}", "", indent = 2 * depth + 2);
    }
    for layer in &report.layers {
        let about = layer.about.as_ref().map(|it| format!(" of {it}")).unwrap_or_default();
        let indent = 2 * report.documents.len() + 2;
        let size = ByteSize(layer.bytes).to_string();
        let _ = say!(out, "{:indent$}{:<9} {size:>9}  {}{about}", "", layer.role, layer.digest);
    }
    let version = report.rafs_version.as_ref().map(|it| format!(", RAFS v{it}")).unwrap_or_default();
    let layout = match report.layout.as_deref() {
        Some("native") => ", data in layers of its own",
        Some("external") => ", data elsewhere: --blobs must say where",
        Some("zran") => ", data in the layers of the ordinary image",
        _ => "",
    };
    let _ = say!(out, "what     {}{version}{layout}", report.kind);
    for source in &report.sources {
        let _ = say!(out, "blobs    {source}");
    }
    let _ = say!(out, "login    {}", report.login);
    if let (Some(backend), Some(why)) = (&report.backend, &report.why) {
        let _ = say!(out, "backend  {backend} ({why})");
    }
    let _ = match &report.problem {
        Some(problem) => say!(out, "cannot be mounted: {problem}"),
        None => say!(out, "can be mounted: rafsd mount docker://{} DIR", report.reference),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::{DocumentReport, LayerReport};
    use crate::export::BackendKind;

    #[test]
    fn the_whole_way_is_told() {
        let document = |how: &str, kind: &str, digit: &str, platform: Option<&str>| DocumentReport {
            how: how.to_owned(),
            kind: kind.to_owned(),
            digest: digit.repeat(64),
            bytes: 500,
            platform: platform.map(ToOwned::to_owned),
        };
        let layer = |role: &str, digit: &str, bytes| LayerReport {
            role: role.to_owned(),
            digest: format!("sha256:{}", digit.repeat(64)),
            media_type: "m".to_owned(),
            bytes,
            about: None,
        };
        let report = ResolveReport {
            reference: "r.example/app:1".to_owned(),
            documents: vec![
                document("named", "index", "1", None),
                document("marked", "manifest", "2", Some("linux/amd64")),
            ],
            manifest: "2".repeat(64),
            layers: vec![layer("blob", "3", 5 << 20), layer("bootstrap", "4", 4096)],
            kind: "a RAFS image".to_owned(),
            layout: Some("native".to_owned()),
            rafs_version: Some("6".to_owned()),
            problem: None,
            sources: vec!["https://mirror.example/v2/app".to_owned(), "https://r.example/v2/app".to_owned()],
            login: "alice, from /home/alice/.docker/config.json".to_owned(),
            backend: Some(BackendKind::Fanotify),
            why: Some("asked for".to_owned()),
        };
        let expected = format!(
            "\
r.example/app:1
  index sha256:{}
    manifest sha256:{} for linux/amd64, marked there as a Nydus image
      blob        5.0 MiB  sha256:{}
      bootstrap   4.0 KiB  sha256:{}
what     a RAFS image, RAFS v6, data in layers of its own
blobs    https://mirror.example/v2/app
blobs    https://r.example/v2/app
login    alice, from /home/alice/.docker/config.json
backend  fanotify (asked for)
can be mounted: rafsd mount docker://r.example/app:1 DIR
",
            "1".repeat(64),
            "2".repeat(64),
            "3".repeat(64),
            "4".repeat(64)
        );
        assert_eq!(text(&report), expected);
        let broken = ResolveReport { problem: Some("because".to_owned()), ..report };
        assert!(text(&broken).ends_with("cannot be mounted: because\n"));
    }
}
