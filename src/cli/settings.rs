//! The settings of the daemon as flags, and where its config file is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::OsStringValueParser;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

use super::userdirs::user_dirs;
use crate::base::nearest;
use crate::daemon::settings::{
    self, ConfigText, DEFAULT_FILE, Field, Given, Origin, Resolved, Setting, Settings, TABLE,
};

/// The variable that names the config file.
const CONFIG_ENV: &str = "RAFSD_CONFIG";

/// What the command line and the environment say about the settings.
#[derive(Debug)]
pub(super) struct SettingsArgs {
    config: Option<PathBuf>,
    given: Vec<Given>,
}

/// Flags that every command has.
const GLOBAL: [&str; 2] = ["log", "log_format"];

/// `--config`, for everybody who looks for the daemon's settings.
pub(super) fn config_arg() -> Arg {
    Arg::new("config")
        .long("config")
        .value_name("FILE")
        .env(CONFIG_ENV)
        .value_parser(OsStringValueParser::new())
        .help(format!("Config file of the daemon [default: {DEFAULT_FILE}, if it is there]"))
}

/// The file that `--config` or its variable names.
pub(super) fn config_of(matches: &ArgMatches) -> Option<PathBuf> {
    matches.get_one::<std::ffi::OsString>("config").map(PathBuf::from)
}

impl clap::Args for SettingsArgs {
    fn augment_args(command: Command) -> Command {
        let local = TABLE.iter().filter(|setting| !GLOBAL.contains(&setting.key));
        command.arg(config_arg()).args(local.map(arg))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn arg(setting: &Setting) -> Arg {
    let default = if setting.default.is_empty() { "none" } else { setting.default };
    let arg = Arg::new(setting.key)
        .long(setting.flag())
        .value_name(setting.field.value_name())
        .env(setting.env())
        .hide_env_values(true)
        // Read where the file is read, by the same code.
        .value_parser(OsStringValueParser::new())
        .action(ArgAction::Set)
        .help(format!("{} [default: {default}]", setting.help));
    match setting.field {
        // `--keep-mounts` says enough.
        Field::Switch(_) => arg.num_args(0..=1).default_missing_value("on"),
        _ => arg,
    }
}

impl FromArgMatches for SettingsArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for setting in TABLE {
            let Some((text, origin)) = text_of(matches, setting.key) else { continue };
            let mut scratch = Settings::default();
            if let Err(error) = setting.field.set(&mut scratch, &settings::Raw::Text(text.clone())) {
                let name = if origin == Origin::Flag { format!("--{}", setting.flag()) } else { setting.env() };
                return Err(clap::Error::raw(ErrorKind::ValueValidation, format!("{name}: {error}")));
            }
            given.push(Given { key: setting.key, text, origin });
        }
        Ok(Self { config: config_of(matches), given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What a flag or its variable says, unless neither is given.
fn text_of(matches: &ArgMatches, key: &str) -> Option<(String, Origin)> {
    let origin = match matches.value_source(key)? {
        ValueSource::CommandLine => Origin::Flag,
        ValueSource::EnvVariable => Origin::Environment,
        _ => return None,
    };
    let raw = matches.get_raw(key)?.next_back()?;
    Some((raw.to_string_lossy().into_owned(), origin))
}

impl SettingsArgs {
    /// All settings with their origins, and the file that was read. Places that
    /// are read later are absolute.
    ///
    /// # Errors
    /// The file cannot be read, or something is wrong in it: all of it is told.
    pub(super) fn resolve(&self) -> anyhow::Result<(Resolved, Option<PathBuf>)> {
        let file = config_text(self.config.as_deref())?;
        let resolved = usable(file.as_ref(), &self.given)?;
        Ok((resolved, file.map(|(path, _)| path)))
    }
}

/// The settings as a daemon would use them. Places that are read later are absolute.
fn usable(file: Option<&(PathBuf, String)>, given: &[Given]) -> anyhow::Result<Resolved> {
    let mut resolved = settings::resolve(file.map(|(path, text)| file_text(path, text)), given);
    resolved.fit_user(user_dirs());
    if !resolved.mistakes.is_empty() {
        let told: Vec<_> = resolved.mistakes.iter().map(ToString::to_string).collect();
        let from = file.map_or_else(|| "the settings".to_owned(), |(path, _)| path.display().to_string());
        bail!("cannot use {from}: {}", told.join("; "));
    }
    let settings = &mut resolved.settings;
    let files =
        [&mut settings.docker_config, &mut settings.credential_providers, &mut settings.credential_provider_bin_dir];
    let paths = files.into_iter().flatten();
    let paths = paths.chain([&mut settings.hosts_dir]);
    for path in paths.chain(&mut settings.registry_secrets).chain(&mut settings.sandbox_read) {
        *path = std::path::absolute(&*path).context("cannot tell the working directory")?;
    }
    Ok(resolved)
}

/// The config file and its text; `None` if none is named and there is none at the usual place.
pub(super) fn config_text(named: Option<&Path>) -> anyhow::Result<Option<(PathBuf, String)>> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match settings::read_file(path) {
        Ok(text) => Ok(Some((fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()), text))),
        Err(e) if named.is_none() && e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// A config file and its text.
pub(super) fn file_text<'a>(path: &'a Path, text: &'a str) -> ConfigText<'a> {
    ConfigText { text, dir: path.parent().unwrap_or(Path::new("/")) }
}

/// The settings as the file has them, for whoever only looks for the daemon: what is wrong in the
/// file is for the daemon to tell.
pub(super) fn settings_for_clients(named: Option<&Path>) -> anyhow::Result<Settings> {
    let file = match config_text(named) {
        // Not everybody may read it.
        Err(_) if named.is_none() => None,
        other => other?,
    };
    let mut resolved = settings::resolve(file.as_ref().map(|(path, text)| file_text(path, text)), &[]);
    resolved.fit_user(user_dirs());
    Ok(resolved.settings)
}

/// What this environment says about settings.
fn in_environment() -> impl Iterator<Item = (&'static Setting, String)> {
    let said =
        |setting: &'static Setting| Some((setting, std::env::var_os(setting.env())?.to_string_lossy().into_owned()));
    TABLE.iter().filter_map(said)
}

/// What this environment says that no setting takes.
pub(super) fn wrong_values() -> Vec<String> {
    let wrong = |(setting, text): (&'static Setting, String)| {
        let error = setting.field.set(&mut Settings::default(), &settings::Raw::Text(text)).err()?;
        Some(format!("{}: {error}", setting.env()))
    };
    in_environment().filter_map(wrong).collect()
}

/// The variables of this environment that are none of ours, and look as if they were meant to be.
pub(super) fn stray_variables() -> Vec<String> {
    let known: Vec<&str> = TABLE.iter().map(|setting| setting.key).chain(["config"]).collect();
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let told = names.filter_map(|name| {
        let key = name.strip_prefix("RAFSD_")?;
        let is_known = known.iter().any(|known| known.to_ascii_uppercase() == key);
        // A slip of a few letters: of another program's variables nothing is said.
        let is_slip = |meant: &&str| !is_known && meant.len().abs_diff(key.len()) <= 2;
        let meant = nearest(key, known.iter().copied()).filter(is_slip)?;
        Some(format!("{name} is no variable of rafsd; did you mean RAFSD_{}?", meant.to_ascii_uppercase()))
    });
    told.collect()
}

/// The settings of a daemon that would be started with this file and this environment, for tools that do what it does.
///
/// # Errors
/// The file cannot be read, or something is wrong in the settings: all of it is told.
pub(super) fn settings_for_tools(named: Option<&Path>) -> anyhow::Result<Settings> {
    let set =
        |(setting, text): (&'static Setting, String)| Given { key: setting.key, text, origin: Origin::Environment };
    // What it says of proxies and trust must not be passed over, because its reader is somebody else.
    let file = config_text(named).context("the settings of this host count here too; --config names others")?;
    let given: Vec<_> = in_environment().map(set).collect();
    Ok(usable(file.as_ref(), &given)?.settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Args;

    fn parse(args: &[&str]) -> Result<SettingsArgs, clap::Error> {
        let command = SettingsArgs::augment_args(Command::new("serve"))
            .arg(Arg::new("log").long("log"))
            .arg(Arg::new("log_format").long("log-format"));
        SettingsArgs::from_arg_matches(&command.try_get_matches_from([&["serve"], args].concat())?)
    }

    #[test]
    fn every_setting_is_a_flag_and_a_variable_by_one_rule() {
        let command = SettingsArgs::augment_args(Command::new("serve"));
        for setting in TABLE.iter().filter(|setting| !GLOBAL.contains(&setting.key)) {
            let arg = command.get_arguments().find(|arg| arg.get_id() == setting.key).expect(setting.key);
            assert_eq!(arg.get_long(), Some(setting.key.replace('_', "-").as_str()));
            let env = format!("RAFSD_{}", setting.key.to_uppercase());
            assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(env.as_str()));
        }
        let args = ["--log", "debug", "--log-format", "json"];
        let given = parse(&args).unwrap().given;
        assert_eq!(given.iter().map(|given| given.key).collect::<Vec<_>>(), GLOBAL);
    }

    #[test]
    fn a_bare_switch_is_on() {
        let given = |args: &[&str]| parse(args).unwrap().given.pop().unwrap().text;
        assert_eq!(given(&["--keep-mounts"]), "on");
        assert_eq!(given(&["--sandbox", "off"]), "off");
        assert_eq!(given(&["--sandbox=off"]), "off");
    }

    #[test]
    fn a_wrong_flag_is_named() {
        let error = parse(&["--deadline", "soon"]).unwrap_err();
        assert_eq!(error.to_string(), "error: --deadline: \"soon\" is not a length of time such as 30s");
        assert!(parse(&["--deadlin", "5s"]).is_err());
    }

    #[test]
    fn mistakes_in_the_file_are_told_with_its_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "deadlin = 1\nfetches = 0\n").unwrap();
        let error = parse(&["--config", file.path().to_str().unwrap()]).unwrap().resolve().unwrap_err();
        let path = fs::canonicalize(file.path()).unwrap();
        assert_eq!(
            error.to_string(),
            format!(
                "cannot use {}: line 1: unknown key \"deadlin\"; did you mean \"deadline\"?; \
                 line 2: fetches: 0 is out of range; it must be from 1 to 1024",
                path.display()
            )
        );
    }
}
