use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::connect::block_on;
use crate::net::server::{BlobServer, ServerOptions};

/// Serve a directory of blobs over HTTP with ranges, until interrupted
///
/// For trying things out: no TLS, no access control. Any static server that answers ranged
/// requests does as well.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd serve-blobs image/blobs --listen 127.0.0.1:8080")]
pub(super) struct ServeBlobsArgs {
    /// Directory with one file per blob
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Address and port; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// Exit status: 0 when interrupted.
pub(super) fn run(args: ServeBlobsArgs) -> anyhow::Result<ExitCode> {
    let dir = args.dir.canonicalize().with_context(|| format!("cannot use {}", args.dir.display()))?;
    let options = ServerOptions { listen: args.listen, ..ServerOptions::default() };
    let server = BlobServer::start(dir, options).with_context(|| format!("cannot listen at {}", args.listen))?;
    say!(io::stdout(), "{}", server.url())?;
    block_on(async {
        let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}
