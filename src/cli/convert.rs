use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use crate::base::{ByteSize, Plain};
use crate::build::{self, ConvertReport, ConvertSpec};
use crate::reader::bootstrap;

/// Make a RAFS v6 image of one of RAFS v5, without touching its blobs
///
/// Writes OUT/bootstrap, and into OUT/blobs a small file for each blob, with the table of chunks that
/// v6 wants and a v5 blob does not have. Serve both: the blobs where they are, and these files in the
/// same place. Chunks stay where they are stored, whether they are packed or aligned. No blob is read, so
/// none has to be there. The same image gives the same bytes.
///
/// rafsd mounts RAFS v5 images as they are; this is for keeping v6 images only, and for readers of v6.
/// Images of legacy stargz layers, whose chunks are gzip members, are refused.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ConvertArgs {
    /// Bootstrap of the image, or a blob that holds it
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// Directory for the new bootstrap and blobs/ID of new tables; made if it is not there
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
An image of RAFS v6 whose blobs have tables is written as it is.

Exit status:
  0  the image is complete and on disk
  1  something failed; nothing was made
  2  wrong command line

Examples:
  rafsd convert old/bootstrap -o new/
  cp new/blobs/* old/blobs/ && rafsd mount new/bootstrap /mnt --blobs old/blobs";

/// Exit status: 0 when the image is complete and on disk.
///
/// # Errors
/// Whatever stopped it; nothing was made then.
pub(super) fn run(args: &ConvertArgs) -> anyhow::Result<ExitCode> {
    let image = bootstrap::open(&args.image).context("cannot open the image")?;
    let spec = ConvertSpec { name: &args.image, image: &image, out_dir: &args.out };
    let report = build::convert(&spec).context("no image was made")?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The report for a person.
fn summary(report: &ConvertReport) -> String {
    let mut out = format!("bootstrap  {} ({})\n", Plain(&report.bootstrap), ByteSize(report.bootstrap_bytes));
    for table in &report.tables {
        let chunks = if table.chunks == table.chunks_of_blob {
            format!("{} chunks", table.chunks)
        } else {
            format!("{} of its {} chunks, those that the image leads to", table.chunks, table.chunks_of_blob)
        };
        out += &format!("table      {} ({})\n", Plain(&table.path), ByteSize(table.bytes));
        out += &format!("           of blob {}, {chunks}\n", table.blob);
    }
    for id in &report.kept_blobs {
        out += &format!("blob       {id} has a table of its own\n");
    }
    if report.tables.is_empty() && !report.kept_blobs.is_empty() {
        out += "nothing to convert: every blob has a table of its own\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::NewTable;

    #[test]
    fn people_learn_that_a_table_is_not_of_all_chunks() {
        let table = NewTable {
            blob: "b".into(),
            id: "t".into(),
            path: "out/blobs/t".into(),
            bytes: 4112,
            chunks: 1,
            chunks_of_blob: 3,
        };
        let mut report = ConvertReport {
            bootstrap: "out/bootstrap".into(),
            bootstrap_bytes: 8192,
            tables: vec![table],
            kept_blobs: Vec::new(),
            prefetched_paths: 0,
        };
        assert!(summary(&report).contains("1 of its 3 chunks"), "{}", summary(&report));
        (report.tables[0].chunks_of_blob, report.kept_blobs) = (1, vec!["k".into()]);
        assert!(summary(&report).contains("of blob b, 1 chunks\n"));
        report.tables.clear();
        assert!(summary(&report).contains("nothing to convert"));
    }
}
