use std::io::{self, IsTerminal, Read, Write};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::Subcommand;

use super::connect::{Place, block_on};
use super::print_json;
use crate::base::Secret;
use crate::daemon::api::{CredentialsReport, CredentialsRequest, CredentialsTarget, Hidden, LoginRequest};

/// Give the running daemon credentials for registries
///
/// They hold from the next request on, for images that are mounted too, and go before those of files and programs.
/// They are kept in the daemon's memory and written nowhere: the next daemon does not have them.
/// docs/CREDENTIALS.md tells where credentials come from besides.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CredentialsArgs {
    #[command(subcommand)]
    what: What,
}

const EXAMPLES: &str = "\
Examples:
  rafsd credentials set registry.example --user me --password-stdin < password
  rafsd credentials list
  rafsd credentials remove registry.example";

#[derive(Debug, Subcommand)]
enum What {
    Set(SetArgs),
    #[command(visible_alias = "ls")]
    List(ListArgs),
    #[command(visible_alias = "rm")]
    Remove(RemoveArgs),
}

/// Give credentials, in place of those for the same repositories
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd credentials set registry.example/team --user me --password-stdin < password")]
#[command(group = clap::ArgGroup::new("secret").required(true))]
struct SetArgs {
    #[command(flatten)]
    target: Target,

    /// Whose password it is
    #[arg(short, long, value_name = "NAME", requires = "password_stdin")]
    user: Option<String>,

    /// Read the password from standard input; one line break at its end is not part of it
    #[arg(long, group = "secret", requires = "user")]
    password_stdin: bool,

    /// Read a refresh token (docker's identitytoken) from standard input
    #[arg(long, group = "secret")]
    identity_token_stdin: bool,

    /// Read a bearer token that is sent as it is (docker's registrytoken) from standard input
    #[arg(long, group = "secret")]
    registry_token_stdin: bool,

    /// Print what was set as JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    place: Place,
}

/// List what was given, without secrets
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd credentials list")]
struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    place: Place,
}

/// Take credentials away
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd credentials remove registry.example/team")]
struct RemoveArgs {
    #[command(flatten)]
    target: Target,

    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Target {
    /// The registry, with the beginning of the names of its repositories if not all are meant
    #[arg(value_name = "HOST[:PORT][/PREFIX]")]
    registry: String,
}

impl Target {
    fn api(&self) -> CredentialsTarget {
        let (registry, repository) = match self.registry.split_once('/') {
            Some((registry, repository)) => (registry, Some(repository.to_owned())),
            None => (self.registry.as_str(), None),
        };
        CredentialsTarget { registry: registry.to_owned(), repository }
    }
}

/// Exit status: 0 when the daemon has done it.
pub(super) fn run(args: CredentialsArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Set(args) => set(args),
        What::List(args) => list(&args),
        What::Remove(args) => remove(&args),
    }
}

fn set(args: SetArgs) -> anyhow::Result<ExitCode> {
    let stdin = io::stdin();
    ensure!(
        !stdin.is_terminal(),
        "the secret is read from standard input, which is a terminal; put it there with < or |"
    );
    let secret = Hidden(secret(stdin.lock())?);
    let login = match args.user {
        Some(user) => LoginRequest::Password { user, password: secret },
        None if args.identity_token_stdin => LoginRequest::IdentityToken(secret),
        None => LoginRequest::RegistryToken(secret),
    };
    let CredentialsTarget { registry, repository } = args.target.api();
    let request = CredentialsRequest { registry, repository, login };
    let report = block_on(async {
        args.place.client()?.set_credentials(&request).await.map_err(|error| args.place.explain(error))
    })?;
    if args.json {
        print_json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads a secret without the line break at its end.
fn secret(input: impl Read) -> anyhow::Result<Secret> {
    /// More than any token.
    const MOST: u64 = 64 << 10;
    let mut text = String::new();
    input.take(MOST + 1).read_to_string(&mut text).context("cannot read the secret from standard input")?;
    ensure!(text.len() as u64 <= MOST, "the secret on standard input has more than 64 KiB");
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        bail!("there is no secret on standard input");
    }
    Ok(Secret::new(text))
}

fn list(args: &ListArgs) -> anyhow::Result<ExitCode> {
    let all =
        block_on(async { args.place.client()?.list_credentials().await.map_err(|error| args.place.explain(error)) })?;
    if args.json {
        print_json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = io::stdout().lock();
    for line in table(&all) {
        say!(out, "{line}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One line for each, below a head; nothing at all for none.
fn table(all: &[CredentialsReport]) -> Vec<String> {
    let name = |it: &CredentialsReport| match &it.repository {
        Some(repository) => format!("{}/{repository}", it.registry),
        None => it.registry.clone(),
    };
    let width = all.iter().map(|it| name(it).len()).max().unwrap_or(0).max("REGISTRY".len());
    let line = |it: &CredentialsReport| {
        let user = it.user.as_deref().unwrap_or("-");
        format!("{:<width$}  {:<14}  {user}", name(it), it.kind.to_string())
    };
    let head = (!all.is_empty()).then(|| format!("{:<width$}  {:<14}  USER", "REGISTRY", "KIND"));
    head.into_iter().chain(all.iter().map(line)).collect()
}

fn remove(args: &RemoveArgs) -> anyhow::Result<ExitCode> {
    let target = args.target.api();
    block_on(async {
        args.place.client()?.remove_credentials(&target).await.map_err(|error| args.place.explain(error))
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::CredentialKind;

    #[test]
    fn a_secret_is_what_stands_before_the_last_line_break() {
        let read = |text: &str| secret(text.as_bytes()).map(|secret| secret.expose().to_owned());
        for (text, expected) in [("p\n", "p"), ("p\r\n", "p"), ("p", "p"), (" p \n\n", " p \n")] {
            assert_eq!(read(text).unwrap(), expected, "{text:?}");
        }
        assert!(read("\n").is_err() && read("").is_err());
        let long = read(&"x".repeat(70_000)).unwrap_err().to_string();
        assert_eq!(long, "the secret on standard input has more than 64 KiB");
    }

    #[test]
    fn a_list_shows_names_and_kinds() {
        let report = |registry: &str, repository: Option<&str>, user: Option<&str>, kind| CredentialsReport {
            registry: registry.to_owned(),
            repository: repository.map(ToOwned::to_owned),
            user: user.map(ToOwned::to_owned),
            kind,
        };
        let all = [
            report("r.example", Some("team"), Some("me"), CredentialKind::Password),
            report("s.example", None, None, CredentialKind::IdentityToken),
        ];
        assert_eq!(
            table(&all),
            [
                "REGISTRY        KIND            USER",
                "r.example/team  password        me",
                "s.example       identity token  -",
            ]
        );
        assert_eq!(table(&[]), Vec::<String>::new());
    }
}
