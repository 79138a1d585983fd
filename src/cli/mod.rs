//! Commands: parse, call the library, print.
//!
//! Human output goes to stdout, line by line through `say!`, `--json` prints the same facts for scripts, logs and
//! progress go to stderr. Exit status is 0 for success, 1 for failure, 2 for a wrong command line; what a
//! command adds to that is in its help.

/// Writes one line for people to `$out`. A name or a message in it neither makes another line of it nor drives a
/// terminal.
macro_rules! say {
    ($out:expr, $($line:tt)+) => {
        writeln!($out, "{}", $crate::base::Plain(format_args!($($line)+)))
    };
}

mod base;
mod blobfs;
pub mod build;
mod cache;
mod check;
mod chunkdict;
mod compact;
mod config;
mod connect;
mod convert;
mod credentials;
mod demo;
mod doctor;
pub mod export;
mod import_nydusd;
mod inspect;
mod keeper;
mod list;
mod log;
mod manual;
mod merge;
mod mount;
mod opened;
mod optimize;
mod prefetch;
pub mod progress;
mod pull;
mod register;
mod reload;
mod resolve;
mod serve;
mod serve_blobs;
mod settings;
mod stat;
mod status;
mod top;
mod trace;
pub mod unpack;
mod upgrade;
mod userdirs;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::telemetry::logging::{self, Format, LogControl};

use crate::daemon::settings::LogFormat;

/// Start containers before their images have arrived
///
/// rafsd mounts RAFS images through the kernel's own EROFS driver and fetches file data only when
/// something reads it.
#[derive(Debug, Parser)]
#[command(name = "rafsd", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// What to log to stderr: error, warn, info, debug, trace, or rules like info,rafsd::cache=debug
    #[arg(long, global = true, value_name = "LEVEL", env = "RAFSD_LOG", value_parser = logging::parse, help_heading = "Logging")]
    log: Option<Targets>,

    /// How to log
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "FORMAT",
        env = "RAFSD_LOG_FORMAT",
        default_value_t = LogFormat::Text,
        help_heading = "Logging"
    )]
    log_format: LogFormat,

    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  rafsd build rootfs/ -o image/
  rafsd mount image/bootstrap /mnt --blobs image/blobs
  rafsd mount docker://registry.example/team/app:1.2-nydus /mnt";

#[derive(Debug, Subcommand)]
enum Command {
    Build(build::BuildArgs),
    Merge(merge::MergeArgs),
    Unpack(unpack::UnpackArgs),
    Export(export::ExportArgs),
    Optimize(optimize::OptimizeArgs),
    Compact(compact::CompactArgs),
    Convert(convert::ConvertArgs),
    Chunkdict(chunkdict::ChunkdictArgs),
    Check(check::CheckArgs),
    Inspect(inspect::InspectArgs),
    Stat(stat::StatArgs),
    Mount(mount::MountArgs),
    Blobfs(blobfs::BlobfsArgs),
    #[command(visible_alias = "unmount")]
    Umount(mount::UmountArgs),
    #[command(visible_alias = "ls")]
    List(mount::ListArgs),
    Pull(pull::PullArgs),
    Resolve(resolve::ResolveArgs),
    Prefetch(prefetch::PrefetchArgs),
    Trace(trace::TraceArgs),
    Cache(cache::CacheArgs),
    Credentials(credentials::CredentialsArgs),
    Serve(serve::ServeArgs),
    Stop(serve::StopArgs),
    Upgrade(upgrade::UpgradeArgs),
    ServeBlobs(serve_blobs::ServeBlobsArgs),
    Register(register::RegisterArgs),
    Unregister(register::UnregisterArgs),
    Doctor(doctor::DoctorArgs),
    Config(config::ConfigArgs),
    Demo(demo::DemoArgs),
    Status(status::StatusArgs),
    Top(top::TopArgs),
    Log(log::LogArgs),
    Recover(keeper::RecoverArgs),
    #[command(hide = true)]
    Keeper(keeper::KeeperArgs),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

/// Runs the program: the whole of `main` but the process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    // A daemon's config file has a say in its log.
    if !matches!(cli.command, Command::Serve(_)) {
        start_log(cli.log.clone().unwrap_or_else(|| quiet(&cli.command)), cli.log_format);
    }
    let outcome = match cli.command {
        Command::Build(args) => build::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Unpack(args) => unpack::run(args),
        Command::Export(args) => export::run(args),
        Command::Optimize(args) => optimize::run(args),
        Command::Compact(args) => compact::run(args),
        Command::Convert(args) => convert::run(&args),
        Command::Chunkdict(args) => chunkdict::run(args),
        Command::Check(args) => Ok(check::run(&args)),
        Command::Inspect(args) => inspect::run(args),
        Command::Stat(args) => stat::run(&args),
        Command::Mount(args) => mount::mount(args),
        Command::Blobfs(args) => blobfs::run(args),
        Command::Umount(args) => mount::umount(args),
        Command::List(args) => mount::list(args),
        Command::Pull(args) => pull::run(args),
        Command::Resolve(args) => resolve::run(args),
        Command::Prefetch(args) => prefetch::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Cache(args) => cache::run(args),
        Command::Credentials(args) => credentials::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Stop(args) => serve::stop(args),
        Command::Upgrade(args) => upgrade::run(args),
        Command::ServeBlobs(args) => serve_blobs::run(args),
        Command::Register(args) => register::register(args),
        Command::Unregister(args) => register::unregister(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Config(args) => config::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Status(args) => status::run(args),
        Command::Top(args) => top::run(args),
        Command::Log(args) => log::run(args),
        Command::Recover(args) => keeper::recover(args),
        Command::Keeper(args) => keeper::keep(args, cli.log_format.into()),
        Command::Completions(args) => manual::completions(args),
        Command::Man(args) => manual::man(args),
    };
    outcome.unwrap_or_else(|error| {
        // Only printing fails with a bare I/O error; every other one says what it was doing.
        let bare = error.chain().next().and_then(|outermost| outermost.downcast_ref::<io::Error>());
        if bare.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe) {
            // Whoever read our output has seen enough.
            return ExitCode::SUCCESS;
        }
        // A closed stderr leaves nobody to tell.
        let _ = say!(io::stderr(), "rafsd: {error:#}");
        ExitCode::FAILURE
    })
}

/// What is logged where nobody says what.
fn quiet(command: &Command) -> Targets {
    let default = if matches!(command, Command::Keeper(_)) { LevelFilter::INFO } else { LevelFilter::WARN };
    Targets::new().with_default(LevelFilter::WARN).with_target("rafsd", default)
}

/// Begins to log. Once per process.
fn start_log(targets: Targets, format: LogFormat) -> LogControl {
    LogControl::start(targets, format.into())
}

impl From<LogFormat> for Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// Prints `value` as JSON, one line.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value).map_err(io::Error::from)?;
    Ok(writeln!(out)?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_help_of_every_command_has_an_example() {
        let program = Cli::command();
        program.clone().debug_assert();
        let shown = program.get_subcommands().filter(|command| !command.is_hide_set());
        for command in shown.chain([&program]) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let name = command.get_name();
            assert!(help.contains("Example") && help.contains("  rafsd "), "{name}: {help:?}");
        }
    }
}
