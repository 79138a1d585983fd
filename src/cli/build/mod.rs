mod options;

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ValueEnum;

use self::options::{BlobArgs, PrefetchArgs, SelectionArgs};
use super::base::BaseArgs;
use super::progress::Bar;
use crate::base::{ByteSize, Plain};
use crate::build::{self, BuildError, BuildReport, BuildSpec, Compression, LayerReport, Source, Whiteouts};
use crate::format::rafs::DigestAlgorithm;

/// Build an image from directories or tar archives
///
/// Writes OUT/bootstrap and, if any file has content, OUT/blobs/ID, named by its SHA-256. The same
/// source gives the same bytes, whatever the number of threads. Before the files get their names,
/// everything is read again and compared with the source.
///
/// Several sources are layers of one image. Each gets a blob with what those below it do not have,
/// or all get one. Whiteouts remove what is below their layer, and vanish. Blobs that only hold
/// what is hidden are not kept.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct BuildArgs {
    /// A directory, a tar or tar.gz archive, or - for an archive on standard input; of several,
    /// the lowest layer first
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<PathBuf>,

    /// Directory for the image; made if it is not there
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,

    /// zstd, zstd:LEVEL with 1 to 22, lz4 or none
    #[arg(long, value_name = "HOW", default_value = "zstd")]
    compress: Compression,

    /// Digest that chunks are checked by when they are read
    #[arg(long, value_enum, default_value_t = Digest::Blake3)]
    digest: Digest,

    /// Largest piece that is fetched at once: a power of two from 4KiB to 16MiB
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    chunk_size: ByteSize,

    /// Threads that compress; all cores if not given
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    blob: BlobArgs,

    #[command(flatten)]
    prefetch: PrefetchArgs,

    #[command(flatten)]
    selection: SelectionArgs,

    #[command(flatten)]
    base: BaseArgs,
}

const EXAMPLES: &str = "\
Examples:
  rafsd build rootfs/ -o image/
  zcat layer.tar.gz | rafsd build - -o image/ --compress zstd:19
  rafsd build rootfs/ -o image/ --exclude '*.pyc' --exclude /var/cache --prefetch-files hot.txt
  rafsd build rootfs/ -o image/ --fs-version 5
  rafsd build base.tar.gz runtime.tar.gz app.tar.gz -o image/";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Digest {
    Blake3,
    Sha256,
}

impl From<Digest> for DigestAlgorithm {
    fn from(digest: Digest) -> Self {
        match digest {
            Digest::Blake3 => Self::Blake3,
            Digest::Sha256 => Self::Sha256,
        }
    }
}

/// Exit status: 0 when the image is complete and on disk.
///
/// # Errors
/// Whatever stopped the build; no image was made then.
pub fn run(args: BuildArgs) -> anyhow::Result<ExitCode> {
    match args.sources.iter().filter(|path| is_stdin(path)).count() {
        0 => {}
        1 if !args.prefetch.uses_stdin() => {}
        1 => bail!("both the archive and --prefetch-files are to come from standard input; name one of them"),
        n => bail!("{n} archives are to come from standard input; name all but one of them"),
    }
    let mut sources = args.sources.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let is_stack = sources.len() > 1;
    let mut spec = BuildSpec::new(sources.remove(0), args.out);
    spec.sources.append(&mut sources);
    spec.compression = args.compress;
    spec.digest = args.digest.into();
    spec.chunk_size = args.chunk_size.0;
    spec.threads = args.threads.unwrap_or(spec.threads);
    spec.prefetch = args.prefetch.hints()?;
    spec.selection = args.selection.selection()?;
    spec.selection.drop_whiteouts = if is_stack { Whiteouts::None } else { args.base.dropped_whiteouts() };
    spec.base = args.base.open()?;
    args.blob.apply(&mut spec);
    let bar = Bar::on_terminal("building");
    let report = build::build(spec, &bar).context("no image was made")?;
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

fn open(path: &Path) -> Result<Source, BuildError> {
    if is_stdin(path) {
        return Ok(Source::Archive { name: "standard input".into(), stream: Box::new(io::stdin()) });
    }
    Source::open(path)
}

/// The report for a person.
fn summary(report: &BuildReport) -> String {
    let size = |bytes| ByteSize(bytes).to_string();
    let place = if report.bootstrap_in_blob { "in " } else { "" };
    let mut out = format!("bootstrap  {place}{} ({})\n", Plain(&report.bootstrap), size(report.bootstrap_bytes));
    for blob in &report.blobs {
        let batches = if blob.batches > 0 { format!(", {} batches", blob.batches) } else { String::new() };
        out += &format!(
            "blob       {} ({}, {} chunks{batches})\n",
            Plain(&blob.path),
            size(blob.stored_bytes),
            blob.chunks
        );
    }
    for id in &report.base_blobs {
        out += &format!("needs      blob {id} of the parent or the dictionary\n");
    }
    out += &against_gzip(report);
    if report.encrypted {
        out += "encrypted  with keys that lie in the bootstrap, in clear\n";
    }
    out += &format!(
        "contents   {} files, {} directories, {} symlinks, {} special files, {} hard links\n",
        report.files, report.directories, report.symlinks, report.specials, report.hard_links
    );
    let read = format!("data       {}", size(report.source_bytes));
    out += &format!(
        "{read}, {} of it stored already, {} in holes\n",
        size(report.deduplicated_bytes),
        size(report.hole_bytes)
    );
    if report.prefetch_entries > 0 {
        out += &format!("prefetch   {} paths listed\n", report.prefetch_entries);
    }
    if report.skipped_xattrs > 0 {
        out += &format!("left out   {} xattrs that the format has no place for\n", report.skipped_xattrs);
    }
    if !report.verified {
        out += "unchecked  nothing was read again\n";
    }
    out
}

/// How the blobs compare with the gzip archives they came from, if they did: each for itself if
/// there are several.
fn against_gzip(report: &BuildReport) -> String {
    let is_shared = |layer: &LayerReport| {
        layer.blob.is_some() && report.layers.iter().filter(|other| other.blob == layer.blob).count() > 1
    };
    if report.layers.len() < 2 || report.layers.iter().any(is_shared) {
        let stored = report.blobs.iter().map(|blob| blob.stored_bytes).sum();
        return report.gzip_bytes.map_or_else(String::new, |gzip| {
            growth(stored, gzip, if report.layers.len() > 1 { "archives" } else { "archive" })
        });
    }
    let mut out = String::new();
    for layer in &report.layers {
        let blob = report.blobs.iter().find(|blob| layer.blob.as_ref() == Some(&blob.id));
        let stored = blob.map_or(0, |blob| blob.stored_bytes);
        out += &layer
            .gzip_bytes
            .map_or_else(String::new, |gzip| growth(stored, gzip, &format!("archive {}", layer.source)));
    }
    out
}

fn growth(stored: u64, gzip: u64, what: &str) -> String {
    let size = |bytes| ByteSize(bytes).to_string();
    if stored > gzip {
        format!("grown      by {} over the {} of the gzip {what}\n", size(stored - gzip), size(gzip))
    } else {
        format!("saved      {} of the {} of the gzip {what}\n", size(gzip - stored), size(gzip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: BuildArgs,
    }

    #[test]
    fn standard_input_is_one_thing_only() {
        let text = ["rafsd", "-", "-o", "/nonexistent", "--prefetch-files", "-"];
        let error = run(<Command as clap::Parser>::parse_from(text).args).unwrap_err().to_string();
        assert!(error.contains("--prefetch-files") && error.contains("standard input"), "{error}");
    }

    #[test]
    fn standard_input_is_one_archive_only() {
        let text = ["rafsd", "-", "layer.tar", "-", "-o", "/nonexistent"];
        let error = run(<Command as clap::Parser>::parse_from(text).args).unwrap_err().to_string();
        assert!(error.contains("2 archives are to come from standard input"), "{error}");
    }

    #[test]
    fn each_layer_with_a_blob_of_its_own_is_compared_with_its_own_archive() {
        let layer = |source: &str, blob: Option<&str>, gzip_bytes| LayerReport {
            source: source.into(),
            blob: blob.map(Into::into),
            gzip_bytes,
        };
        let blob = |id: &str, mebibytes: u64| build::BlobReport {
            id: id.into(),
            path: id.into(),
            stored_bytes: mebibytes << 20,
            decoded_bytes: 0,
            chunks: 1,
            batches: 0,
        };
        let layers = ["a", "b", "c", "d"].map(|name| layer(name, Some(name), Some(2 << 20)));
        let mut report = BuildReport {
            layers: layers.into(),
            blobs: vec![blob("a", 3), blob("c", 1), blob("d", 1)],
            gzip_bytes: None,
            ..BuildReport::default()
        };
        (report.layers[1].blob, report.layers[3].gzip_bytes) = (None, None);
        let want = "grown      by 1.0 MiB over the 2.0 MiB of the gzip archive a\n\
            saved      2.0 MiB of the 2.0 MiB of the gzip archive b\n\
            saved      1.0 MiB of the 2.0 MiB of the gzip archive c\n";
        assert_eq!(against_gzip(&report), want);

        report.layers.iter_mut().for_each(|layer| layer.blob = Some("a".into()));
        (report.blobs, report.gzip_bytes) = (vec![blob("a", 3)], Some(8 << 20));
        assert_eq!(against_gzip(&report), "saved      5.0 MiB of the 8.0 MiB of the gzip archives\n");
    }

    #[test]
    fn people_learn_how_the_blob_compares_with_its_source_and_where_the_key_is() {
        let blob = build::BlobReport {
            id: String::new(),
            path: "blobs/x".into(),
            stored_bytes: 3 << 20,
            decoded_bytes: 0,
            chunks: 1,
            batches: 0,
        };
        let mut report = BuildReport { blobs: vec![blob], gzip_bytes: Some(2 << 20), ..BuildReport::default() };
        assert!(summary(&report).contains("grown      by 1.0 MiB over the 2.0 MiB"), "{}", summary(&report));
        (report.gzip_bytes, report.encrypted) = (Some(4 << 20), true);
        assert!(summary(&report).contains("saved      1.0 MiB of the 4.0 MiB"));
        assert!(summary(&report).contains("in the bootstrap, in clear"));
    }
}
