//! The flags of `rafsd build` that say what goes into an image and in what form.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::ValueEnum;

use crate::base::ByteSize;
use crate::build::{
    Batching, BuildSpec, Encryption, IdRange, MAX_HINTS, Owners, Pattern, PrefetchHints, Selection, Version, Whiteouts,
};
use crate::cli::list;

/// How the blob is written.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Blob")]
pub(super) struct BlobArgs {
    /// Version of the format: 6, which the kernel reads, or 5, for readers in user space that know
    /// no other
    ///
    /// RAFS v5 has no batches, no encryption and no table of contents, and is not built over a parent
    /// or with a dictionary. rafsd reads both; rafsd convert makes v6 of v5.
    #[arg(long, value_name = "5|6", default_value = "6", value_parser = clap::value_parser!(u8).range(5..=6))]
    fs_version: u8,

    /// Let chunks of RAFS v5 start on 4 KiB in the decoded space, as those of v6 always do
    #[arg(long)]
    aligned_chunk: bool,

    /// Store small files together in pieces of up to this size, a power of two from 4KiB to the
    /// chunk size; or off
    ///
    /// Files shorter than half of it are compressed with their neighbours, which makes them much
    /// smaller, and they are fetched with them. Without the flag pieces have up to 512KiB. The kernel
    /// and nydusd read such images; `nydus-image unpack` does not, and wants off.
    #[arg(long, value_name = "SIZE|off")]
    batch_size: Option<BatchSize>,

    /// Put what several sources hold into one blob, hidden or not, instead of one for each
    #[arg(long)]
    one_blob: bool,

    /// Encrypt each blob with a new key (AES-128-XTS)
    ///
    /// The key lies in the bootstrap, in clear: the blob alone tells nothing, the image everything.
    /// Two builds of one source differ.
    #[arg(long)]
    encrypt: bool,

    /// End the blob with a table of contents, and put the digests of its chunks into it
    #[arg(long)]
    blob_toc: bool,

    /// Put the bootstrap into the blob, and nowhere else; with several sources also --one-blob
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
        spec.version = match self.fs_version {
            5 => Version::V5 { aligned: self.aligned_chunk },
            _ => Version::V6,
        };
        spec.batching = self.batch_size.map_or(Batching::Default, |size| size.0);
        spec.encryption = if self.encrypt { Encryption::Random } else { Encryption::None };
        spec.one_blob = self.one_blob;
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
    /// Only put their data in front. RAFS v5 says how much that is; v6 has no field for it
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
        let text = list::read("prefetch list", path, MAX_HINTS)?;
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
            drop_whiteouts: Whiteouts::None,
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Flags {
        #[command(flatten)]
        blob: BlobArgs,
        #[command(flatten)]
        prefetch: PrefetchArgs,
        #[command(flatten)]
        selection: SelectionArgs,
    }

    fn flags(text: &str) -> Result<Flags, clap::Error> {
        Flags::try_parse_from(std::iter::once("rafsd").chain(text.split_whitespace()))
    }

    fn spec(text: &str) -> BuildSpec {
        let source = crate::build::Source::Directory("/".into());
        let mut spec = BuildSpec::new(source, "/out");
        flags(text).unwrap().blob.apply(&mut spec);
        spec
    }

    #[test]
    fn batch_sizes_are_sizes_or_off() {
        let batching = ["", "--batch-size off", "--batch-size 64KiB"].map(|text| spec(text).batching);
        assert_eq!(batching, [Batching::Default, Batching::Off, Batching::Size(65536)]);
        assert!(flags("--batch-size small").is_err());
        assert!(spec("").verify && !spec("--no-verify").verify);
    }

    #[test]
    fn version_is_5_or_6_and_v6_is_aligned_anyway() {
        let versions = ["", "--fs-version 6 --aligned-chunk", "--fs-version 5", "--fs-version 5 --aligned-chunk"];
        let want = [Version::V6, Version::V6, Version::V5 { aligned: false }, Version::V5 { aligned: true }];
        assert_eq!(versions.map(|text| spec(text).version), want);
        assert!(flags("--fs-version 4").is_err());
    }

    #[test]
    fn owners_are_mapped_or_given_or_left_out_but_not_two_of_these() {
        let selection = |text: &str| flags(text).unwrap().selection.selection();
        let owners = selection("--uid-map 5:6 --uid-map 7:9:2 --gid-map 1:2").unwrap().owners;
        let Owners::Mapped { uids, gids } = owners else { panic!("not mapped") };
        assert_eq!((uids.len(), gids.len()), (2, 1));
        assert_eq!(selection("--owner 1:2").unwrap().owners, Owners::Fixed { uid: 1, gid: 2 });
        assert_eq!(selection("--no-owners").unwrap().owners, Owners::Omitted);
        assert!(flags("--owner 1:2 --no-owners").is_err() && flags("--uid-map 1:2 --owner 1:2").is_err());
        assert!(flags("--owner 1").is_err() && flags("--exclude !x").is_err());
        let error = selection("--gid-map 1:5:10 --gid-map 10:0").unwrap_err().to_string();
        assert_eq!(error, "--gid-map 1:5:10 and 10:0:1 say two things of one id");
    }

    #[test]
    fn policy_without_a_list_is_refused_and_decides_what_is_read() {
        assert!(flags("--prefetch-policy fs").is_err());
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("list");
        std::fs::write(&list, "/a\n/a\n").unwrap();
        let hints = |policy: &str| {
            flags(&format!("--prefetch-files {} {policy}", list.display())).unwrap().prefetch.hints().unwrap()
        };
        assert!(hints("").table && hints("").ignored() == 1);
        assert!(!hints("--prefetch-policy blob").table);
        assert_eq!(hints("--prefetch-policy none").ignored(), 0, "the list is not even read");
    }
}
