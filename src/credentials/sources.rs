//! All places of credentials of one daemon, put together.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Chain, Place, Trouble};
use super::environment::Environment;
use super::files::{AuthFile, SecretFiles};
use super::given::Given;
use super::helper::Helpers;
use super::plugin::{Plugins, PluginsError};
use super::programs::Programs;
use crate::net::Clock;

/// What the settings and the environment say.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// A `config.json` or `auth.json`, or a directory with the former; `None` for the usual places.
    pub docker_config: Option<PathBuf>,
    /// The kubelet's config file of credential providers.
    pub providers: Option<PathBuf>,
    /// The directory of their programs.
    pub provider_dir: Option<PathBuf>,
    /// Files and directories of Kubernetes' secrets.
    pub secrets: Vec<PathBuf>,
}

/// Why the places cannot be put together.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourcesError {
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    #[error(transparent)]
    Environment(#[from] Trouble),
    #[error("credential_providers is of no use without credential_provider_bin_dir")]
    NoProviderDir,
}

/// The credentials of one daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Credentials {
    given: Arc<Given>,
    chain: Arc<Chain>,
}

impl Credentials {
    /// Puts all places together in their order: what was given at run time, secrets, credential providers,
    /// files of docker and its like, the environment. `variable` reads the environment.
    ///
    /// # Errors
    /// Plugins or a variable make no sense. Files are read later, and may come later.
    pub fn open(
        sources: &Sources,
        variable: &dyn Fn(&str) -> Option<OsString>,
        programs: &Arc<dyn Programs>,
        clock: Clock,
    ) -> Result<Self, SourcesError> {
        let given = Arc::new(Given::default());
        let mut places: Vec<Arc<dyn Place>> = vec![given.clone()];
        if !sources.secrets.is_empty() {
            places.push(Arc::new(SecretFiles::new(sources.secrets.clone())));
        }
        match (&sources.providers, &sources.provider_dir) {
            (Some(config), Some(dir)) => places.push(Arc::new(Plugins::open(config, dir, programs)?)),
            (Some(_), None) => return Err(SourcesError::NoProviderDir),
            (None, _) => {}
        }
        let path = variable("PATH").unwrap_or_default();
        let helpers = Arc::new(Helpers::new(programs.clone(), std::env::split_paths(&path).collect()));
        let file = |path: &PathBuf| Arc::new(AuthFile::new(path, helpers.clone())) as Arc<dyn Place>;
        places.extend(sources.files(variable).iter().map(file));
        if let Some(environment) = Environment::read(|name| variable(name)?.into_string().ok())? {
            places.push(Arc::new(environment));
        }
        Ok(Self { chain: Arc::new(Chain::new(places, Some(given.clone()), clock)), given })
    }

    /// Those given at run time and no others.
    pub fn only_given(clock: Clock) -> Self {
        let given = Arc::new(Given::default());
        let chain = Arc::new(Chain::new(vec![given.clone()], Some(given.clone()), clock));
        Self { given, chain }
    }

    /// What was given at run time.
    pub fn given(&self) -> &Given {
        &self.given
    }

    /// All of them, for the network layer.
    pub fn keychain(&self) -> Arc<Chain> {
        self.chain.clone()
    }
}

impl Sources {
    /// Files of docker and its like, in the order in which they are asked.
    fn files(&self, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
        if let Some(path) = &self.docker_config {
            return vec![path.clone()];
        }
        let dir = |name: &str| variable(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
        let home = |below: &str| Some(dir("HOME")?.join(below));
        let docker = dir("DOCKER_CONFIG").or_else(|| home(".docker")).map(|dir| dir.join("config.json"));
        let containers = |dir: PathBuf| dir.join("containers/auth.json");
        let running = dir("XDG_RUNTIME_DIR").map(containers);
        let lasting = dir("XDG_CONFIG_HOME").or_else(|| home(".config")).map(containers);
        [docker, running, lasting].into_iter().flatten().collect()
    }

    /// Directories that a confined process must be able to read. Whole directories, because files are
    /// replaced by others of the same name.
    pub fn readable(&self, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
        let place =
            |path: &Path| if path.is_dir() { path.to_owned() } else { path.parent().unwrap_or(path).to_owned() };
        let files = self.files(variable);
        let named = self.secrets.iter().chain(&self.providers).chain(&files).map(|path| place(path));
        named.chain(self.provider_dir.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::programs::Runner;
    use super::*;
    use crate::net::auth::{Keychain, Login};
    use crate::sys::sandbox::Sandbox;

    fn open(sources: &Sources, variables: &[(&str, &str)]) -> Result<Credentials, SourcesError> {
        let programs: Arc<dyn Programs> = Arc::new(Runner::new(Sandbox::off()));
        let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, text)| text.into());
        Credentials::open(sources, &variable, &programs, Clock::default())
    }

    async fn user(credentials: &Credentials, registry: &str) -> (Option<String>, Option<String>) {
        let chain = credentials.keychain();
        let login = chain.login(registry, "a").await.unwrap();
        let user = login.map(|login| match login {
            Login::Basic { user, .. } => user,
            other => panic!("{other:?}"),
        });
        (user, chain.origin(registry, "a"))
    }

    fn entry(user: &str) -> String {
        format!(r#"{{"auths": {{"r.example": {{"username": "{user}", "password": "p"}}}}}}"#)
    }

    fn write(path: PathBuf, text: &str) -> PathBuf {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[tokio::test]
    async fn places_are_asked_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        let variables = [("HOME", home), ("XDG_RUNTIME_DIR", home), ("RAFSD_REGISTRY_AUTH", "ZW52OnA=")];
        let secret = dir.path().join("secret/.dockerconfigjson");
        let sources = Sources { secrets: vec![dir.path().join("secret")], ..Sources::default() };
        let credentials = open(&sources, &variables).unwrap();
        let expect = async |name: &str, origin: &str| {
            let (user, from) = user(&credentials, "r.example").await;
            assert_eq!(user.as_deref(), Some(name));
            assert!(from.as_ref().is_some_and(|from| from.ends_with(origin)), "{name}: {from:?}");
        };

        expect("env", "the variable RAFSD_REGISTRY_AUTH").await;
        write(dir.path().join(".config/containers/auth.json"), &entry("lasting"));
        expect("lasting", "/.config/containers/auth.json").await;
        write(dir.path().join("containers/auth.json"), &entry("running"));
        expect("running", "/containers/auth.json").await;
        write(dir.path().join(".docker/config.json"), &entry("docker"));
        expect("docker", "/.docker/config.json").await;
        write(secret, &entry("secret"));
        expect("secret", "/secret").await;
        let before = credentials.keychain().generation();
        let given = Login::Basic { user: "given".into(), password: crate::base::Secret::new("p") };
        credentials.given().set(super::super::Server::parse("r.example").unwrap(), given);
        expect("given", "`rafsd credentials set`").await;
        assert!(credentials.keychain().generation() > before, "tokens must not outlive the change");
    }

    #[tokio::test]
    async fn a_place_in_trouble_does_not_hide_the_next_one_and_is_told_if_none_knows() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        write(dir.path().join(".docker/config.json"), "garbage");
        let credentials = open(&Sources::default(), &[("HOME", home)]).unwrap();

        let error = credentials.keychain().login("r.example", "a").await.unwrap_err();
        assert!(error.from.ends_with("/.docker/config.json"), "{error}");
        write(dir.path().join(".config/containers/auth.json"), &entry("lasting"));
        assert_eq!(user(&credentials, "r.example").await.0.as_deref(), Some("lasting"));
    }

    #[tokio::test]
    async fn a_file_that_is_named_is_the_only_one() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path().join(".docker/config.json"), &entry("docker"));
        let named = write(dir.path().join("named.json"), r#"{"auths": {}}"#);
        let sources = Sources { docker_config: Some(named), ..Sources::default() };
        let credentials = open(&sources, &[("HOME", dir.path().to_str().unwrap())]).unwrap();
        assert_eq!(user(&credentials, "r.example").await, (None, None));
    }

    #[test]
    fn what_cannot_work_is_told_at_the_start() {
        let providers = Sources { providers: Some("/x".into()), ..Sources::default() };
        assert!(matches!(open(&providers, &[]), Err(SourcesError::NoProviderDir)));
        assert!(matches!(open(&Sources::default(), &[("IMAGE_PULL_AUTH", "?")]), Err(SourcesError::Environment(_))));
    }

    #[test]
    fn a_confined_daemon_reads_directories_and_not_single_files() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources {
            docker_config: Some(dir.path().join("d/config.json")),
            secrets: vec![dir.path().to_owned()],
            providers: Some("/etc/p/config.json".into()),
            provider_dir: Some("/opt/p".into()),
        };
        let readable = sources.readable(&|_| None);
        assert_eq!(readable, [dir.path().to_owned(), "/etc/p".into(), dir.path().join("d"), "/opt/p".into()]);
    }
}
