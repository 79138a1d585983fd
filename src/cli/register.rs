use std::io::{self, Write};
use std::process::ExitCode;

use super::connect::{DaemonArgs, Place, block_on};
use super::mount::{ImageArgs, warn_unconfirmed};
use super::print_json;
use crate::daemon::api::{RegisterRequest, UnregisterRequest};

/// Make an image mountable by anyone with mount -t erofs -o fsid=ID (cachefiles backend)
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct RegisterArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// fsid of the mount
    #[arg(long)]
    id: String,

    /// domain_id of the mount: images of one domain share the cache of their blobs
    #[arg(long)]
    domain: Option<String>,

    #[command(flatten)]
    daemon: DaemonArgs,

    /// Print what was registered as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
Example:
  rafsd register image/bootstrap --blobs https://blobs.example/image --id app --domain team
  mount -t erofs -o fsid=app,domain_id=team none /mnt";

/// Exit status: 0 when the image can be mounted.
pub(super) fn register(args: RegisterArgs) -> anyhow::Result<ExitCode> {
    let request = RegisterRequest { image: args.image.spec()?, id: args.id, domain: args.domain };
    let report = block_on(async {
        let client = args.daemon.connect().await?;
        Ok(client.register(&request).await?)
    })?;
    warn_unconfirmed(&report)?;
    if args.json {
        print_json(&report)?;
    } else {
        let options = report.mount_options.as_deref().unwrap_or_default();
        say!(io::stdout(), "mount -t erofs -o {options} none DIR")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Forget a registered image; what is mounted from it stays served
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd unregister --id app --domain team")]
pub(super) struct UnregisterArgs {
    /// fsid it was registered under
    #[arg(long)]
    id: String,

    /// domain_id it was registered under
    #[arg(long)]
    domain: Option<String>,

    #[command(flatten)]
    place: Place,
}

/// Exit status: 0 when the image is forgotten.
pub(super) fn unregister(args: UnregisterArgs) -> anyhow::Result<ExitCode> {
    let request = UnregisterRequest { id: args.id, domain: args.domain };
    block_on(async { args.place.client()?.unregister(&request).await.map_err(|e| args.place.explain(e)) })?;
    Ok(ExitCode::SUCCESS)
}
