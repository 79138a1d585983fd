//! The flags of `rafsd build` that say what goes into an image and in what form.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::base::ByteSize;
use crate::build::{
    Batching, BuildSpec, Encryption, IdRange, MAX_HINTS, Owners, Pattern, PrefetchHints, Selection, Whiteouts,
};

/// How the blob is written.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Blob")]
pub(super) struct BlobArgs {
    /// Store small files together in pieces of up to this size, a power of two from 4KiB to the
    /// chunk size; or off
    ///
    /// Files shorter than half of it are compressed with their neighbours, which makes them much
    /// smaller, and they are fetched with them. Without the flag pieces have up to 256KiB. The kernel
    /// and nydusd read such images; `nydus-image unpack` does not, and wants off.
    #[arg(long, value_name = "SIZE|off")]
    batch_size: Option<BatchSize>,

    /// Encrypt the blob with a new key (AES-128-XTS)
    ///
    /// The key lies in the bootstrap, in clear: the blob alone tells nothing, the image everything.
    /// Two builds of one source differ.
    #[arg(long)]
    encrypt: bool,

    /// End the blob with a table of contents, and put the digests of its chunks into it
    #[arg(long)]
    blob_toc: bool,

    /// Put the bootstrap into the blob, and nowhere else
    #[arg(long)]
    blob_inline_meta: bool,

    /// Publish the image without reading it again and checking every chunk
    #[arg(long)]
    no_verify: bool,
}

/// A size, or `off`.
#[derive(Clone, Copy, Debug)]
struct BatchSize(Batching);

impl std::str::FromStr for BatchSize {
    type Err = <ByteSize as std::str::FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" { Ok(Self(Batching::Off)) } else { Ok(Self(Batching::Size(text.parse::<ByteSize>()?.0))) }
    }
}

impl BlobArgs {
    pub(super) fn apply(&self, spec: &mut BuildSpec) {
        spec.batching = self.batch_size.map_or(Batching::Default, |size| size.0);
        spec.encryption = if self.encrypt { Encryption::Random } else { Encryption::None };
        spec.blob_toc = self.blob_toc;
        spec.inline_bootstrap = self.blob_inline_meta;
        spec.verify = !self.no_verify;
    }
}

/// What is fetched first.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Prefetch")]
pub(super) struct PrefetchArgs {
    /// Paths that will be wanted first, one absolute path in the image per line; - for standard input
    ///
    /// A directory means everything in it. Paths that are not there do no harm. The data of a
    /// directory source is put in this order; that of an archive stays as it is.
    #[arg(long, value_name = "FILE")]
    prefetch_files: Option<PathBuf>,

    /// What to do with these paths
    #[arg(long, value_name = "POLICY", value_enum, requires = "prefetch_files")]
    prefetch_policy: Option<PrefetchPolicy>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PrefetchPolicy {
    /// Nothing
    None,
    /// Put their data in front, and list them in the image (the default)
    Fs,
    /// Only put their data in front: the format has no field for how much that is
    Blob,
}

impl PrefetchArgs {
    /// Whether the list comes from standard input.
    pub(super) fn uses_stdin(&self) -> bool {
        self.prefetch_files.as_deref() == Some(Path::new("-"))
    }

    /// Reads the list.
    pub(super) fn hints(&self) -> anyhow::Result<PrefetchHints> {
        let policy = self.prefetch_policy.unwrap_or(PrefetchPolicy::Fs);
        let Some(path) = self.prefetch_files.as_deref().filter(|_| policy != PrefetchPolicy::None) else {
            return Ok(PrefetchHints::default());
        };
        let name = || format!("cannot read the prefetch list {}", path.display());
        let stream: Box<dyn Read> =
            if self.uses_stdin() { Box::new(io::stdin()) } else { Box::new(File::open(path).with_context(name)?) };
        let mut text = Vec::new();
        stream.take(MAX_HINTS + 1).read_to_end(&mut text).with_context(name)?;
        if text.len() as u64 > MAX_HINTS {
            bail!("the prefetch list {} has more than {} bytes", path.display(), MAX_HINTS);
        }
        let mut hints = PrefetchHints::parse(&text);
        hints.table = policy == PrefetchPolicy::Fs;
        Ok(hints)
    }
}

/// What of the source becomes part of the image.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Selection")]
pub(super) struct SelectionArgs {
    /// Leave out what matches, with everything below it; may be given again
    ///
    /// As in a gitignore file: * ? [a-z] match within a name, ** any number of directories; a
    /// pattern with a slash is a path from the root, one without names entries anywhere; a slash at
    /// the end means directories only. There is no taking back with !.
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<Pattern>,

    /// Keep only xattrs whose names start so; may be given again
    #[arg(long, value_name = "PREFIX")]
    xattr_include: Vec<String>,

    /// Drop xattrs whose names start so, whatever is kept; may be given again
    #[arg(long, value_name = "PREFIX")]
    xattr_exclude: Vec<String>,

    /// Leave out whiteouts of a directory source: .wh.* (oci) or character devices 0/0 (overlayfs).
    /// An archive keeps its whiteouts
    #[arg(long, value_name = "KIND", value_enum, default_value_t = WhiteoutKind::None)]
    whiteouts: WhiteoutKind,

    /// Replace users: COUNT ids from FROM on become those from TO on; may be given again
    #[arg(long, value_name = "FROM:TO[:COUNT]", conflicts_with_all = ["owner", "no_owners"])]
    uid_map: Vec<IdRange>,

    /// Replace groups in the same way
    #[arg(long, value_name = "FROM:TO[:COUNT]", conflicts_with_all = ["owner", "no_owners"])]
    gid_map: Vec<IdRange>,

    /// Let everything belong to this user and group
    #[arg(long, value_name = "UID:GID", value_parser = owner, conflicts_with = "no_owners")]
    owner: Option<(u32, u32)>,

    /// Leave owners out: all ids are 0, and the image says that they mean nothing
    #[arg(long)]
    no_owners: bool,

    /// Make times later than this, in seconds since 1970, this one
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", allow_negative_numbers = true)]
    clamp_mtime: Option<i64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WhiteoutKind {
    Oci,
    Overlayfs,
    None,
}

fn owner(text: &str) -> Result<(u32, u32), &'static str> {
    let ids = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    ids.ok_or("write UID:GID, two numbers of 32 bits")
}

impl SelectionArgs {
    pub(super) fn selection(self) -> anyhow::Result<Selection> {
        refuse_overlaps("--uid-map", &self.uid_map)?;
        refuse_overlaps("--gid-map", &self.gid_map)?;
        let owners = match self.owner {
            Some((uid, gid)) => Owners::Fixed { uid, gid },
            None if self.no_owners => Owners::Omitted,
            None => Owners::Mapped { uids: self.uid_map, gids: self.gid_map },
        };
        Ok(Selection {
            exclude: self.exclude,
            xattr_include: self.xattr_include,
            xattr_exclude: self.xattr_exclude,
            drop_whiteouts: match self.whiteouts {
                WhiteoutKind::Oci => Whiteouts::Oci,
                WhiteoutKind::Overlayfs => Whiteouts::Overlayfs,
                WhiteoutKind::None => Whiteouts::None,
            },
            owners,
            latest_mtime: self.clamp_mtime,
        })
    }
}

fn refuse_overlaps(flag: &str, ranges: &[IdRange]) -> anyhow::Result<()> {
    for (at, range) in ranges.iter().enumerate() {
        if let Some(other) = ranges[..at].iter().find(|other| other.overlaps(range)) {
            bail!("{flag} {other} and {range} say two things of one id");
        }
    }
    Ok(())
}
