//! Credential provider plugins of the kubelet: programs that clouds write, by the protocol
//! `credentialprovider.kubelet.k8s.io`. Each is told an image and answers with logins and how long they are good.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::chain::{Place, Trouble};
use super::files::read_bounded;
use super::goduration::go_duration;
use super::programs::{Programs, find, is_name};
use super::record::named;
use super::server::{Server, nearest};
use crate::base::Secret;
use crate::net::auth::Login;

/// How long a plugin may take. The kubelet allows a minute; readers do not wait that long.
const LIMIT: Duration = Duration::from_secs(20);

/// The longest that an answer is believed.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Answers of one plugin that are remembered.
const MOST_ANSWERS: usize = 1024;

/// Versions of the protocol. They do not differ in what is used here.
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];

const GROUP: &str = "credentialprovider.kubelet.k8s.io";

/// Why plugins cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use the credential providers of {}: {detail}", path.display())]
pub struct PluginsError {
    /// Their config file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub detail: String,
}

#[derive(Deserialize)]
struct Config {
    kind: String,
    #[serde(rename = "apiVersion")]
    version: String,
    providers: Vec<ProviderConfig>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProviderConfig {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: String,
    #[serde(rename = "apiVersion")]
    version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Serialize)]
struct Request<'a> {
    #[serde(rename = "apiVersion")]
    version: &'a str,
    kind: &'a str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    #[serde(rename = "apiVersion")]
    version: String,
    cache_key_type: CacheKey,
    cache_duration: Option<String>,
    auth: Option<std::collections::BTreeMap<String, Auth>>,
}

#[derive(Deserialize)]
struct Auth {
    username: String,
    password: String,
}

/// For what an answer is good.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
enum CacheKey {
    Image,
    Registry,
    Global,
}

/// All plugins of one config file, in its order.
#[derive(Debug)]
pub struct Plugins {
    path: PathBuf,
    plugins: Vec<Plugin>,
}

struct Plugin {
    name: String,
    program: PathBuf,
    images: Vec<Server>,
    believed: Duration,
    version: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    programs: Arc<dyn Programs>,
    known: Mutex<Vec<Known>>,
    /// One at a time: most answers are for a whole registry, and who waits finds it known.
    running: Mutex<()>,
}

/// What a plugin said.
#[derive(Clone)]
struct Known {
    key: CacheKey,
    /// The registry, or with the repository, or nothing, by the key.
    subject: String,
    logins: Vec<(Server, Login)>,
    ends: Instant,
}

impl Plugins {
    /// Reads the kubelet's config file, as JSON, and finds its plugins in `dir`.
    ///
    /// # Errors
    /// What is wrong with it, or which plugin is missing.
    pub fn open(path: &Path, dir: &Path, programs: &Arc<dyn Programs>) -> Result<Self, PluginsError> {
        let wrong = |detail: String| PluginsError { path: path.to_owned(), detail };
        let text = read_bounded(path).map_err(|error| wrong(format!("it cannot be read ({error})")))?;
        let config: Config = serde_json::from_slice(&text).map_err(|error| {
            let place = format!("line {}, column {}", error.line(), error.column());
            wrong(format!("it is not a CredentialProviderConfig in JSON ({place}); YAML must be converted"))
        })?;
        if config.kind != "CredentialProviderConfig" || !config.version.starts_with("kubelet.config.k8s.io/") {
            return Err(wrong("its kind and apiVersion are not those of a CredentialProviderConfig".to_owned()));
        }
        let plugins: Result<Vec<_>, _> =
            config.providers.into_iter().map(|it| Plugin::new(it, dir, programs).map_err(wrong)).collect();
        Ok(Self { path: path.to_owned(), plugins: plugins? })
    }
}

impl Place for Plugins {
    fn find(&self, registry: &str, repository: &str, now: Instant) -> Result<Option<Login>, Trouble> {
        for plugin in &self.plugins {
            let is_meant = plugin.images.iter().any(|image| image.fit(registry, repository).is_some());
            if is_meant && let Some(login) = plugin.find(registry, repository, now)? {
                return Ok(Some(login));
            }
        }
        Ok(None)
    }

    fn refused(&self, _registry: &str, _repository: &str, login: &Login) {
        for plugin in &self.plugins {
            plugin.known.lock().unwrap().retain(|known| known.logins.iter().all(|(_, it)| it != login));
        }
    }

    fn name(&self) -> String {
        format!("the credential providers of {}", self.path.display())
    }
}

impl Plugin {
    fn new(config: ProviderConfig, dir: &Path, programs: &Arc<dyn Programs>) -> Result<Self, String> {
        let name = config.name;
        if !is_name(&name) {
            return Err("the name of a provider has other signs than letters, digits, . _ and -".to_owned());
        }
        if config.token_attributes.is_some() {
            return Err(format!("{name} wants tokens of service accounts, which only the kubelet has"));
        }
        let version = config.version.strip_prefix(GROUP).and_then(|rest| rest.strip_prefix('/'));
        if !version.is_some_and(|version| VERSIONS.contains(&version)) {
            return Err(format!("{name} speaks another protocol than {GROUP}/v1"));
        }
        let image = |text: &String| Server::parse(text).ok_or_else(|| format!("{name} matches no image with {text:?}"));
        let images = config.match_images.iter().map(image).collect::<Result<Vec<_>, _>>()?;
        let believed = go_duration(&config.default_cache_duration);
        let believed = believed.ok_or_else(|| format!("the defaultCacheDuration of {name} is no time such as 12h"))?;
        let program = find(&name, [dir.to_owned()]);
        let program = program.ok_or_else(|| format!("there is no program {}", dir.join(&name).display()))?;
        let env = config.env.unwrap_or_default().into_iter().map(|it| (it.name, it.value)).collect();
        let args = config.args.unwrap_or_default();
        let (programs, known, running) = (programs.clone(), Mutex::default(), Mutex::default());
        Ok(Self { name, program, images, believed, version: config.version, args, env, programs, known, running })
    }

    fn find(&self, registry: &str, repository: &str, now: Instant) -> Result<Option<Login>, Trouble> {
        if let Some(known) = self.known(registry, repository, now) {
            return Ok(known.nearest(registry, repository));
        }
        let _alone = self.running.lock().unwrap();
        if let Some(known) = self.known(registry, repository, now) {
            return Ok(known.nearest(registry, repository));
        }
        let known = self.run(registry, repository, now)?;
        let login = known.nearest(registry, repository);
        if now < known.ends {
            let mut all = self.known.lock().unwrap();
            all.retain(|other| now < other.ends && (other.key, &other.subject) != (known.key, &known.subject));
            if all.len() >= MOST_ANSWERS {
                all.clear();
            }
            all.push(known);
        }
        Ok(login)
    }

    fn known(&self, registry: &str, repository: &str, now: Instant) -> Option<Known> {
        let known = self.known.lock().unwrap();
        known.iter().find(|it| now < it.ends && it.subject == it.key.subject(registry, repository)).cloned()
    }

    fn run(&self, registry: &str, repository: &str, now: Instant) -> Result<Known, Trouble> {
        let trouble = |detail: String| Trouble::new(format!("the credential provider {}", self.name), detail);
        let image = CacheKey::Image.subject(registry, repository);
        let request = Request { version: &self.version, kind: "CredentialProviderRequest", image: &image };
        let request = serde_json::to_vec(&request).expect("three strings");
        let output = self.programs.run(&self.program, &self.args, &request, &self.env, LIMIT);
        let output = output.map_err(|error| trouble(error.to_string()))?;
        if output.status != Some(0) {
            let status = output.status.map_or_else(|| "a signal".to_owned(), |status| format!("status {status}"));
            return Err(trouble(format!("it ended with {status} for {image}")));
        }
        // What cannot be read is not shown: it may be secret.
        let response: Response = serde_json::from_slice(&output.stdout)
            .map_err(|_| trouble(format!("its answer for {image} is no CredentialProviderResponse")))?;
        if response.kind != "CredentialProviderResponse" || response.version != self.version {
            return Err(trouble(format!("its answer for {image} is not of {}", self.version)));
        }
        let said = response.cache_duration.as_deref().map(go_duration);
        let believed = said.unwrap_or(Some(self.believed));
        let believed = believed.ok_or_else(|| trouble("its cacheDuration is no time such as 6h".to_owned()))?;
        let login = |(image, auth): (String, Auth)| {
            Some((Server::parse(&image)?, named(auth.username, Secret::new(auth.password))))
        };
        let key = response.cache_key_type;
        Ok(Known {
            key,
            subject: key.subject(registry, repository),
            logins: response.auth.into_iter().flatten().filter_map(login).collect(),
            ends: now.checked_add(believed.min(LONGEST)).unwrap_or(now),
        })
    }
}

impl Known {
    fn nearest(&self, registry: &str, repository: &str) -> Option<Login> {
        let logins = self.logins.iter().map(|(server, login)| (server, login));
        nearest(logins, registry, repository).map(|(_, login)| login.clone())
    }
}

impl CacheKey {
    fn subject(self, registry: &str, repository: &str) -> String {
        match self {
            Self::Image => format!("{registry}/{repository}"),
            Self::Registry => registry.to_owned(),
            Self::Global => String::new(),
        }
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Variables and arguments may be secret.
        f.debug_struct("Plugin").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::programs::{Output, ProgramError};
    use super::*;

    /// Answers with a text, and remembers what it was asked.
    #[derive(Debug, Default)]
    struct Scripted {
        status: i32,
        answer: Mutex<String>,
        asked: Mutex<Vec<String>>,
    }

    impl Programs for Scripted {
        fn run(
            &self,
            program: &Path,
            args: &[String],
            stdin: &[u8],
            env: &[(String, String)],
            _: Duration,
        ) -> Result<Output, ProgramError> {
            let name = program.file_name().unwrap().to_string_lossy();
            let line = format!("{name} {args:?} {env:?} {}", String::from_utf8_lossy(stdin));
            self.asked.lock().unwrap().push(line);
            Ok(Output { status: Some(self.status), stdout: self.answer.lock().unwrap().clone().into_bytes() })
        }
    }

    struct Bench {
        dir: tempfile::TempDir,
        programs: Arc<Scripted>,
    }

    const PROVIDER: &str = r#"{"name": "cat", "matchImages": ["*.example/team", "r.example"],
        "defaultCacheDuration": "1m", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "args": ["get"], "env": [{"name": "A", "value": "b"}]}"#;

    fn bench(status: i32) -> Bench {
        let programs = Arc::new(Scripted { status, ..Scripted::default() });
        Bench { dir: tempfile::tempdir().unwrap(), programs }
    }

    impl Bench {
        fn open(&self, providers: &str) -> Result<Plugins, PluginsError> {
            let path = self.dir.path().join("config");
            let head = r#""kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1""#;
            std::fs::write(&path, format!("{{{head}, \"providers\": [{providers}]}}")).unwrap();
            let programs: Arc<dyn Programs> = self.programs.clone();
            Plugins::open(&path, Path::new("/bin"), &programs)
        }

        fn say(&self, key: &str, more: &str) {
            let answer = format!(
                r#"{{"kind": "CredentialProviderResponse", "apiVersion": "{GROUP}/v1", "cacheKeyType": "{key}", {more}}}"#
            );
            *self.programs.answer.lock().unwrap() = answer;
        }

        fn count(&self) -> usize {
            self.programs.asked.lock().unwrap().len()
        }
    }

    const AUTH: &str = r#""auth": {"*.example": {"username": "all", "password": "p"}, "r.example/x": {"username": "x", "password": "p"}}"#;

    fn user(login: Option<Login>) -> Option<String> {
        login.map(|login| match login {
            Login::Basic { user, .. } => user,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn a_plugin_is_asked_in_the_form_of_the_kubelet_for_the_images_it_is_for() {
        let bench = bench(0);
        let (plugins, now) = (bench.open(PROVIDER).unwrap(), Instant::now());
        bench.say("Registry", AUTH);

        assert_eq!(user(plugins.find("s.example", "other", now).unwrap()), None);
        assert_eq!(bench.count(), 0);
        assert_eq!(user(plugins.find("r.example", "x/y", now).unwrap()).as_deref(), Some("x"));
        assert_eq!(
            bench.programs.asked.lock().unwrap()[0],
            r#"cat ["get"] [("A", "b")] {"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderRequest","image":"r.example/x/y"}"#
        );
        assert_eq!(user(plugins.find("r.example", "z", now).unwrap()).as_deref(), Some("all"));
        assert_eq!(bench.count(), 1, "it was for the whole registry");
    }

    #[test]
    fn an_answer_is_good_for_what_it_says_and_as_long() {
        for (key, same_image, same_registry, elsewhere) in
            [("Image", 1, 2, 3), ("Registry", 1, 1, 2), ("Global", 1, 1, 1)]
        {
            let bench = bench(0);
            let (plugins, now) = (bench.open(PROVIDER).unwrap(), Instant::now());
            bench.say(key, &format!(r#"{AUTH}, "cacheDuration": "1h""#));
            let later = now + Duration::from_secs(3599);
            plugins.find("r.example", "a", now).unwrap();
            plugins.find("r.example", "a", later).unwrap();
            assert_eq!(bench.count(), same_image, "{key}");
            plugins.find("r.example", "b", later).unwrap();
            assert_eq!(bench.count(), same_registry, "{key}");
            plugins.find("s.example", "team/a", later).unwrap();
            assert_eq!(bench.count(), elsewhere, "{key}");
            plugins.find("r.example", "a", later + Duration::from_secs(1)).unwrap();
            assert_eq!(bench.count(), elsewhere + 1, "{key}");
        }
    }

    #[test]
    fn an_answer_without_a_time_is_good_for_the_default_and_one_with_none_not_at_all() {
        let bench = bench(0);
        let (plugins, now) = (bench.open(PROVIDER).unwrap(), Instant::now());
        let find = |seconds| user(plugins.find("r.example", "a", now + Duration::from_secs(seconds)).unwrap());
        bench.say("Registry", r#""auth": null"#);
        assert_eq!((find(0), find(59)), (None, None));
        assert_eq!(bench.count(), 1);
        bench.say("Registry", &format!(r#"{AUTH}, "cacheDuration": "0s""#));
        assert_eq!((find(60), find(60)), (Some("all".into()), Some("all".into())));
        assert_eq!(bench.count(), 3);
    }

    #[test]
    fn what_was_refused_is_not_given_again_without_asking() {
        let bench = bench(0);
        let (plugins, now) = (bench.open(PROVIDER).unwrap(), Instant::now());
        bench.say("Registry", AUTH);
        let login = plugins.find("r.example", "a", now).unwrap().unwrap();
        plugins.refused("r.example", "a", &login);
        plugins.find("r.example", "a", now).unwrap();
        assert_eq!(bench.count(), 2);
    }

    #[test]
    fn answers_that_cannot_be_used_are_told_without_being_shown() {
        let failed = bench(1);
        failed.say("Registry", AUTH);
        let ask = |bench: &Bench| {
            bench.open(PROVIDER).unwrap().find("r.example", "a", Instant::now()).unwrap_err().to_string()
        };
        assert_eq!(ask(&failed), "the credential provider cat: it ended with status 1 for r.example/a");
        let bench = bench(0);
        for (answer, told) in [
            ("hunter2", "its answer for r.example/a is no CredentialProviderResponse"),
            (
                r#"{"kind": "X", "apiVersion": "x", "cacheKeyType": "Image"}"#,
                "its answer for r.example/a is not of credentialprovider.kubelet.k8s.io/v1",
            ),
        ] {
            *bench.programs.answer.lock().unwrap() = answer.to_owned();
            assert_eq!(ask(&bench), format!("the credential provider cat: {told}"));
        }
        bench.say("Image", r#""cacheDuration": "hunter2""#);
        assert_eq!(ask(&bench), "the credential provider cat: its cacheDuration is no time such as 6h");
    }

    #[test]
    fn mistakes_of_the_config_are_told_when_it_is_read() {
        let bench = bench(0);
        for (from, to, told) in [
            ("\"cat\"", "\"../cat\"", "the name of a provider has other signs than letters, digits, . _ and -"),
            ("\"cat\"", "\"no-such-program\"", "there is no program /bin/no-such-program"),
            ("\"1m\"", "\"soon\"", "the defaultCacheDuration of cat is no time such as 12h"),
            ("k8s.io/v1\"", "k8s.io/v9\"", "cat speaks another protocol than credentialprovider.kubelet.k8s.io/v1"),
            ("\"r.example\"", "\"a b\"", "cat matches no image with \"a b\""),
            (
                "\"args\"",
                "\"tokenAttributes\": {}, \"args\"",
                "cat wants tokens of service accounts, which only the kubelet has",
            ),
        ] {
            assert_eq!(bench.open(&PROVIDER.replace(from, to)).unwrap_err().detail, told);
        }
        let yaml = bench.dir.path().join("yaml");
        std::fs::write(&yaml, "kind: CredentialProviderConfig\n").unwrap();
        let programs: Arc<dyn Programs> = bench.programs.clone();
        let error = Plugins::open(&yaml, Path::new("/bin"), &programs).unwrap_err();
        assert!(error.detail.ends_with("YAML must be converted"), "{error}");
    }
}
