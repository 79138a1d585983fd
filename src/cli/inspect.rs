use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::opened::RegistryArgs;
use super::print_json;
use crate::image::dump::{Detail, dump};
use crate::tools::inspect::{Subject, inspect};

/// Show an image, or one inode, blob or chunk of it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct InspectArgs {
    /// Bootstrap to look into, a blob that holds its bootstrap, or docker://HOST/REPOSITORY:TAG
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    #[command(flatten)]
    registry: RegistryArgs,

    /// The inode at this path; links are not followed
    #[arg(long, value_name = "PATH", group = "subject")]
    path: Option<PathBuf>,

    /// The inode with this number
    #[arg(long, value_name = "N", group = "subject")]
    nid: Option<u64>,

    /// The blob with this id, or this number from 0
    #[arg(long, value_name = "ID|INDEX", group = "subject")]
    blob: Option<String>,

    /// The chunk with this number in the blob with this number, and the files that use it
    #[arg(long, value_name = "BLOB:INDEX", group = "subject", value_parser = chunk)]
    chunk: Option<(u32, u32)>,

    /// Everything as text that can be compared, one fact on each line
    #[arg(long, group = "subject", conflicts_with = "json")]
    dump: bool,

    /// With --dump: also where everything lies
    #[arg(long, requires = "dump")]
    layout: bool,

    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  rafsd inspect image/bootstrap
  rafsd inspect image/bootstrap --path /etc/passwd --json
  rafsd inspect image/bootstrap --dump > image.txt
  rafsd inspect docker://registry.example/team/app:1.2-nydus --path /etc/passwd

Exit status: 0 if it was shown, 1 if there is no such thing or it is damaged.";

fn chunk(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once(':').and_then(|(blob, chunk)| Some((blob.parse().ok()?, chunk.parse().ok()?)));
    numbers.ok_or_else(|| "two numbers with a colon between them are wanted, such as 0:17".into())
}

/// Exit status: 0 if it was shown.
///
/// # Errors
/// If the image cannot be read, or has no such thing.
pub(super) fn run(args: InspectArgs) -> anyhow::Result<ExitCode> {
    let image = args.registry.image(&args.image)?;
    if args.dump {
        let detail = if args.layout { Detail::Layout } else { Detail::Meaning };
        let mut out = io::BufWriter::new(io::stdout().lock());
        dump(&image, detail, &mut out)?;
        out.flush()?;
        return Ok(ExitCode::SUCCESS);
    }
    let subject = match (args.path, args.nid, args.blob, args.chunk) {
        (Some(path), ..) => Subject::Path(path.as_os_str().as_bytes().to_vec()),
        (_, Some(nid), ..) => Subject::Nid(nid),
        (_, _, Some(blob), _) => Subject::Blob(blob),
        (.., Some((blob, chunk))) => Subject::Chunk(blob, chunk),
        _ => Subject::Image,
    };
    let facts = inspect(&image, &subject).with_context(|| format!("cannot inspect {}", args.image.display()))?;
    if args.json {
        print_json(&facts)?;
    } else {
        let mut out = io::BufWriter::new(io::stdout().lock());
        write_facts(&mut out, 0, &serde_json::to_value(&facts)?)?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The same facts as in JSON, one on each line, with what belongs together indented.
fn write_facts(out: &mut dyn Write, depth: usize, value: &serde_json::Value) -> io::Result<()> {
    use serde_json::Value::{Array, Null, Object, String};
    let Object(fields) = value else { return Ok(()) };
    // Facts first, then what consists of more facts.
    let (rows, facts): (Vec<_>, Vec<_>) = fields.iter().partition(|(_, value)| value.is_array());
    for (name, value) in facts.into_iter().chain(rows) {
        let name = format!("{:1$}{name}", "", depth * 2).replace('_', " ");
        match value {
            Null => {}
            Array(items) if items.iter().all(|item| matches!(item, Object(_))) => {
                for (number, item) in items.iter().enumerate() {
                    say!(out, "{name} {number}")?;
                    write_facts(out, depth + 1, item)?;
                }
            }
            Array(items) => {
                for item in items {
                    say!(out, "{name:<24} {}", item.as_str().map_or_else(|| item.to_string(), str::to_owned))?;
                }
            }
            String(text) => say!(out, "{name:<24} {text}")?,
            other => say!(out, "{name:<24} {other}")?,
        }
    }
    Ok(())
}
