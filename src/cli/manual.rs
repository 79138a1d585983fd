use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;

use super::Cli;

/// Print shell completions
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd completions bash > /etc/bash_completion.d/rafsd")]
pub(super) struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

/// Exit status: 0.
pub(super) fn completions(args: CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "rafsd", &mut script);
    io::Write::write_all(&mut io::stdout(), &script)?;
    Ok(ExitCode::SUCCESS)
}

/// Write the manual pages, one per command
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd man /usr/local/share/man/man8")]
pub(super) struct ManArgs {
    /// Directory for the pages; made if it is not there
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Exit status: 0 when all pages are written.
pub(super) fn man(args: ManArgs) -> anyhow::Result<ExitCode> {
    let in_dir = || format!("cannot write to {}", args.dir.display());
    fs::create_dir_all(&args.dir).with_context(in_dir)?;
    let mut program = Cli::command();
    program.build();
    let commands = program.get_subcommands().filter(|command| !command.is_hide_set());
    let pages = commands.map(|command| (format!("rafsd-{}", command.get_name()), command.clone()));
    for (name, command) in pages.chain([("rafsd".to_owned(), program.clone())]) {
        let page = clap_mangen::Man::new(command.name(name.clone())).section("8");
        let mut bytes = Vec::new();
        page.render(&mut bytes)?;
        fs::write(args.dir.join(format!("{name}.8")), bytes).with_context(in_dir)?;
    }
    Ok(ExitCode::SUCCESS)
}
