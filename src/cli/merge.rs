use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;

use super::base::WhiteoutArg;
use super::list;
use super::progress::Bar;
use crate::base::{BlobId, ByteSize, Digest, Plain};
use crate::build::{self, BlobFacts, Layer, MAX_HINTS, MergeReport, MergeSpec, MergeVersion, Packed};
use crate::image::Image;
use crate::reader::bootstrap;

/// Merge the bootstraps of layers into one image
///
/// Writes one bootstrap and moves no data: the blobs of the layers serve the image as they are.
/// Blobs that no file needs any more are not named in it. Whiteouts act as in overlayfs and
/// vanish, those of the lowest layer too. The same layers give the same bytes.
///
/// The image is of RAFS v6 whatever its layers are, unless --fs-version 5 is given. Blobs of RAFS v5 layers
/// have no tables, which rafsd needs none of; for other readers of RAFS v6 give the result to rafsd
/// convert. RAFS v5 has one compression and one digest for all blobs, and neither batches nor encryption:
/// layers that are otherwise are refused.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct MergeArgs {
    /// Bootstraps, or blobs that hold theirs, the lowest layer first. ID=PATH gives the layer's own
    /// blob another id; write ./PATH for a path that has a '=' in it
    #[arg(value_name = "[ID=]BOOTSTRAP", required = true)]
    layers: Vec<LayerArg>,

    /// Bootstrap to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,

    /// Bootstrap of an image below all layers
    #[arg(long, value_name = "BOOTSTRAP")]
    parent: Option<PathBuf>,

    /// Bootstrap of the dictionary that the layers were built with: ID= is not about its blobs
    #[arg(long, value_name = "BOOTSTRAP")]
    chunk_dict: Option<PathBuf>,

    /// Version of the format to write, 5 or 6; layers may be of either
    #[arg(long, value_name = "5|6", default_value_t = 6, value_parser = clap::value_parser!(u8).range(5..=6))]
    fs_version: u8,

    /// How layers remove what is below them
    #[arg(long, value_enum, value_name = "HOW", default_value_t = WhiteoutArg::Oci)]
    whiteouts: WhiteoutArg,

    /// Paths to prefetch, one per line, from a file or - for standard input; else the lists of the
    /// layers are kept as far as their paths are
    #[arg(long, value_name = "FILE")]
    prefetch_files: Option<PathBuf>,

    /// Facts about a blob that its layer does not know:
    /// ID[,size=N][,toc-size=N][,toc-digest=HEX][,meta-size=N][,meta-digest=HEX]
    #[arg(long = "blob", value_name = "FACTS")]
    blobs: Vec<FactsArg>,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status: 0 when the bootstrap is complete and on disk, 1 when it was not made, 2 for a wrong
command line.

Examples:
  rafsd merge layers/base layers/app -o image/bootstrap
  rafsd merge \"$BASE_ID=base.boot\" \"$APP_ID=app.boot\" -o image/bootstrap --json
  rafsd merge old/base.boot old/app.boot -o image/bootstrap --fs-version 5";

/// A layer on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LayerArg {
    id: Option<BlobId>,
    path: PathBuf,
}

impl From<std::ffi::OsString> for LayerArg {
    fn from(text: std::ffi::OsString) -> Self {
        let bytes = text.as_bytes();
        let pair = bytes.iter().position(|byte| *byte == b'=').and_then(|at| {
            // An id has no slash in it, so neither has a path that is mistaken for one.
            let id = str::from_utf8(&bytes[..at]).ok()?.parse().ok()?;
            Some(Self { id: Some(id), path: std::ffi::OsStr::from_bytes(&bytes[at + 1..]).into() })
        });
        pair.unwrap_or_else(|| Self { id: None, path: text.into() })
    }
}

/// Opens layers, and keeps of those of RAFS v5 what is needed to write that version again.
struct Opening {
    version: MergeVersion,
}

impl Opening {
    fn new(fs_version: u8) -> Self {
        Self { version: if fs_version == 5 { MergeVersion::V5(Packed::default()) } else { MergeVersion::V6 } }
    }

    fn layer(&mut self, LayerArg { id, path }: LayerArg) -> anyhow::Result<Layer> {
        let found = bootstrap::find(&path, id.as_ref())?;
        if let MergeVersion::V5(packed) = &mut self.version
            && found.is_v5()
        {
            let cannot = || format!("cannot use {}", path.display());
            packed.add(&found.v5().with_context(cannot)?).with_context(cannot)?;
        }
        let loaded = found.load()?;
        // The blob that a bootstrap was taken out of has its name already; others may be named in it.
        let id = id.filter(|_| loaded.container.is_none());
        let image = Image::parse(loaded.bytes).with_context(|| format!("cannot use {}", path.display()))?;
        Ok(Layer { name: path, image, id })
    }

    fn image(&mut self, path: PathBuf) -> anyhow::Result<Layer> {
        self.layer(LayerArg { id: None, path })
    }
}

/// Facts about a blob on the command line.
#[derive(Clone, Debug)]
struct FactsArg(BlobFacts);

impl FromStr for FactsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let id = parts.next().unwrap_or_default();
        let mut facts = BlobFacts::about(id.parse().map_err(|e: crate::base::InvalidBlobId| e.to_string())?);
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("{key} {value:?} is not a number of bytes"));
            let digest =
                || Digest::from_hex(value).ok_or_else(|| format!("{key} {value:?} is not 64 hexadecimal digits"));
            match key {
                "size" => facts.size = Some(number()?),
                "toc-size" => {
                    let size = u32::try_from(number()?).map_err(|_| format!("{key} {value} is above {}", u32::MAX))?;
                    facts.toc_size = Some(size);
                }
                "toc-digest" => facts.toc_digest = Some(digest()?),
                "meta-size" => facts.meta_size = Some(number()?),
                "meta-digest" => facts.meta_digest = Some(digest()?),
                _ => return Err(format!("{key:?} is none of size, toc-size, toc-digest, meta-size, meta-digest")),
            }
        }
        Ok(Self(facts))
    }
}

/// Exit status: 0 when the bootstrap is complete and on disk.
///
/// # Errors
/// Whatever stopped the merge; no bootstrap was made then.
pub(super) fn run(args: MergeArgs) -> anyhow::Result<ExitCode> {
    let mut opening = Opening::new(args.fs_version);
    let spec = MergeSpec {
        layers: args.layers.into_iter().map(|layer| opening.layer(layer)).collect::<anyhow::Result<_>>()?,
        parent: args.parent.map(|path| opening.image(path)).transpose()?,
        dictionary: args.chunk_dict.map(|path| opening.image(path)).transpose()?,
        version: opening.version,
        whiteouts: args.whiteouts.into(),
        prefetch: args.prefetch_files.as_deref().map(prefetch_list).transpose()?,
        facts: args.blobs.into_iter().map(|FactsArg(facts)| facts).collect(),
        out: args.out,
    };
    let bar = Bar::on_terminal("merging");
    let report = build::merge(spec, &bar).context("no image was made")?;
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The absolute paths in a list; other lines are ignored, as are blanks around them.
fn prefetch_list(file: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let list = list::read("prefetch list", file, MAX_HINTS)?;
    let lines = list.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    Ok(lines.filter(|line| line.starts_with(b"/")).map(<[u8]>::to_vec).collect())
}

/// The report for a person.
fn summary(report: &MergeReport) -> String {
    let mut out = format!("bootstrap  {} ({})\n", Plain(&report.bootstrap), ByteSize(report.bootstrap_bytes));
    for id in &report.blobs {
        out += &format!("blob       {id}\n");
    }
    for id in &report.dropped_blobs {
        out += &format!("not used   {id}\n");
    }
    out += &format!(
        "contents   {} files, {} directories, {} symlinks, {} special files, {} hard links\n",
        report.files, report.directories, report.symlinks, report.specials, report.hard_links
    );
    out + &format!("data       {}, {} paths to prefetch\n", ByteSize(report.file_bytes), report.prefetched_paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_paths_or_pairs() {
        for (text, id, path) in [
            ("layers/a", None, "layers/a"),
            ("abc=layers/a", Some("abc"), "layers/a"),
            ("abc=x=y", Some("abc"), "x=y"),
            ("./abc=x", None, "./abc=x"),
            ("dir/abc=x", None, "dir/abc=x"),
            ("=x", None, "=x"),
        ] {
            let want = LayerArg { id: id.map(|id| id.parse().unwrap()), path: path.into() };
            assert_eq!(LayerArg::from(std::ffi::OsString::from(text)), want);
        }
    }

    #[test]
    fn a_list_is_taken_whole_or_not_at_all() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b" /a \n\nb\n/c").unwrap();
        assert_eq!(prefetch_list(file.path()).unwrap(), [b"/a", b"/c"]);
        file.as_file().set_len(MAX_HINTS + 1).unwrap();
        let error = prefetch_list(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("has more than 67108864 bytes"), "{error}");
    }

    #[test]
    fn facts_are_read_as_documented() {
        let hex = "ab".repeat(32);
        let FactsArg(facts) = format!("id,size=7,toc-size=8,toc-digest={hex}").parse().unwrap();
        assert_eq!((facts.blob.as_str(), facts.size, facts.toc_size, facts.meta_size), ("id", Some(7), Some(8), None));
        assert_eq!(facts.toc_digest, Some(Digest([0xab; 32])));
        for bad in
            ["", "a/b", "id,size", "id,size=x", "id,size=-1", "id,toc-size=4294967296", "id,toc-digest=ab", "id,x=1"]
        {
            assert!(bad.parse::<FactsArg>().is_err(), "{bad}");
        }
    }
}
