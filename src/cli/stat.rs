use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::opened::RegistryArgs;
use super::print_json;
use crate::base::ByteSize;
use crate::tools::stat::{self, ImageStat, Report};

/// Count what is in images, and what several of them share
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct StatArgs {
    /// Bootstraps to look into, blobs that hold theirs, or docker://HOST/REPOSITORY:TAG
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,

    #[command(flatten)]
    registry: RegistryArgs,

    /// Print the numbers as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  rafsd stat image/bootstrap
  rafsd stat base/bootstrap app/bootstrap --json
  rafsd stat docker://registry.example/team/app:1.1-nydus docker://registry.example/team/app:1.2-nydus

Exit status: 0 if everything was counted, 1 if an image cannot be read or is damaged.";

/// Exit status: 0 if everything was counted.
///
/// # Errors
/// If an image cannot be read or is damaged.
pub(super) fn run(args: &StatArgs) -> anyhow::Result<ExitCode> {
    let open = |path: &PathBuf| Ok((path.display().to_string(), args.registry.image(path)?));
    let images = args.images.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
    let report = stat::stat(&images).context("an image is damaged; `rafsd check` tells more")?;
    if args.json {
        print_json(&report)?;
    } else {
        describe(&mut io::stdout().lock(), &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    let size = |bytes| ByteSize(bytes).to_string();
    for image in &report.images {
        describe_image(out, image)?;
    }
    for pair in &report.pairs {
        let [first, second] = &pair.images;
        let (blobs, chunks, bytes) = (pair.blobs.len(), pair.chunks, size(pair.chunk_bytes));
        say!(out, "{first} and {second} share {blobs} blobs, {chunks} chunks ({bytes})")?;
    }
    if let Some(total) = &report.total {
        say!(
            out,
            "together   {} blobs, {} of them shared; {} chunks ({}), {} of them shared ({})",
            total.blobs,
            total.shared_blobs,
            total.chunks,
            size(total.chunk_bytes),
            total.shared_chunks,
            size(total.shared_chunk_bytes)
        )?;
    }
    Ok(())
}

fn describe_image(out: &mut dyn Write, image: &ImageStat) -> io::Result<()> {
    let size = |bytes| ByteSize(bytes).to_string();
    say!(out, "{} ({})", image.name, image.format)?;
    let kinds: Vec<_> = image.inodes.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    say!(out, "  inodes     {}; {} paths", kinds.join(", "), image.paths)?;
    say!(
        out,
        "  metadata   {}, of it {} directories, {} links, {} xattrs, {} chunk table",
        size(image.bootstrap_bytes),
        size(image.directory_bytes),
        size(image.symlink_bytes),
        size(image.xattr_bytes),
        size(image.chunk_table_bytes)
    )?;
    say!(
        out,
        "  files      {} in {} pieces, {} in holes; {} different chunks ({}), {:.2} : 1",
        size(image.file_bytes),
        image.chunk_uses,
        size(image.hole_bytes),
        image.chunks,
        size(image.chunk_bytes),
        image.dedup_ratio
    )?;
    for blob in &image.blobs {
        say!(
            out,
            "  blob       {}: {} stored, {} decoded, {:.2} : 1; {} of {} chunks used",
            blob.id,
            size(blob.stored_bytes),
            size(blob.decoded_bytes),
            blob.compression_ratio,
            blob.used_chunks,
            blob.chunks
        )?;
    }
    for (limit, count) in &image.chunk_sizes {
        say!(out, "  chunks     up to {:>10}: {count}", size(*limit))?;
    }
    Ok(())
}
