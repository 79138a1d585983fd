//! Files with logins: of docker and its like, and secrets that Kubernetes puts into directories.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::chain::{Place, Trouble};
use super::helper::Helpers;
use super::record::AuthRecords;
use crate::net::auth::Login;

/// Most bytes of a file.
const MOST_BYTES: u64 = 4 << 20;

/// Names of files in a directory of secrets.
const SECRET_NAMES: [&str; 3] = [".dockerconfigjson", ".dockercfg", "config.json"];

/// Secrets of one directory that are looked at.
const MOST_SECRETS: usize = 256;

/// A file that is read whenever it is needed. While it is damaged, what it said before is used.
struct Watched {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    good: Option<Arc<AuthRecords>>,
    /// What is wrong with it and has been logged.
    complaint: Option<String>,
}

impl Watched {
    fn new(path: PathBuf) -> Self {
        Self { path, state: Mutex::default() }
    }

    /// The file: in a directory, its `config.json`. A directory may come later than whoever looks into it.
    fn file(&self) -> PathBuf {
        if self.path.is_dir() { self.path.join("config.json") } else { self.path.clone() }
    }

    /// What it says now. A file that is not there says nothing.
    fn read(&self) -> Result<Arc<AuthRecords>, Trouble> {
        let read = match read_bounded(&self.file()) {
            Ok(text) => AuthRecords::parse(&text).map_err(Some),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Err(None),
            Err(error) => Err(Some(format!("it cannot be read ({error})"))),
        };
        let mut state = self.state.lock().unwrap();
        match read {
            Ok(records) => {
                let records = Arc::new(records);
                *state = State { good: Some(records.clone()), complaint: None };
                Ok(records)
            }
            Err(None) => {
                *state = State::default();
                Ok(Arc::default())
            }
            Err(Some(detail)) => {
                let Some(good) = state.good.clone() else { return Err(self.trouble(detail)) };
                if state.complaint.as_ref() != Some(&detail) {
                    tracing::warn!(file = %self.path.display(), detail, "credentials stay as they were: their file is damaged");
                    state.complaint = Some(detail);
                }
                Ok(good)
            }
        }
    }

    fn trouble(&self, detail: String) -> Trouble {
        Trouble::new(self.file().display().to_string(), detail)
    }
}

pub(super) fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(io::Error::other("it has more than 4 MiB"));
    }
    Ok(text)
}

/// A `config.json` of docker or `auth.json` of podman and others, with the helpers that it names.
pub struct AuthFile {
    file: Watched,
    helpers: Arc<Helpers>,
}

impl AuthFile {
    /// The file at `path`, which need not be there; in a directory, its `config.json`.
    pub fn new(path: &Path, helpers: Arc<Helpers>) -> Self {
        Self { file: Watched::new(path.to_owned()), helpers }
    }
}

impl Place for AuthFile {
    fn find(&self, registry: &str, repository: &str, now: Instant) -> Result<Option<Login>, Trouble> {
        let records = self.file.read()?;
        for helper in records.helpers(registry, repository) {
            if let Some(login) = self.helpers.ask(helper, registry, now)? {
                return Ok(Some(login));
            }
        }
        records.find(registry, repository).map_err(|detail| self.file.trouble(detail))
    }

    fn refused(&self, _registry: &str, _repository: &str, login: &Login) {
        self.helpers.forget(login);
    }

    fn name(&self) -> String {
        self.file.file().display().to_string()
    }
}

impl fmt::Debug for AuthFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AuthFile").field(&self.file.path).finish()
    }
}

/// Secrets of Kubernetes of the types `dockerconfigjson` and `dockercfg`, as volumes show them. They name
/// logins only: a helper that one names is not started.
pub struct SecretFiles {
    paths: Vec<PathBuf>,
    files: Mutex<HashMap<PathBuf, Arc<Watched>>>,
}

impl SecretFiles {
    /// Each of `paths` is a file, a directory that shows a secret, or one whose directories do. What comes
    /// and goes in them is seen.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, files: Mutex::default() }
    }

    fn files(&self) -> Result<Vec<Arc<Watched>>, Trouble> {
        let mut found = Vec::new();
        for path in &self.paths {
            let told = |error| Trouble::new(path.display().to_string(), format!("it cannot be listed ({error})"));
            found.extend(secrets(path).map_err(told)?);
        }
        let mut files = self.files.lock().unwrap();
        files.retain(|path, _| found.contains(path));
        let known = |path: PathBuf| files.entry(path.clone()).or_insert_with(|| Arc::new(Watched::new(path))).clone();
        Ok(found.into_iter().map(known).collect())
    }
}

/// The files beneath `path`, sorted by name.
fn secrets(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = fs::read_dir(path)?.flatten();
    // Names with two dots are how a volume changes all its files at once.
    let is_own = |name: &std::ffi::OsString| !name.as_encoded_bytes().starts_with(b"..");
    let mut dirs: Vec<_> = entries
        .map(|entry| entry.file_name())
        .filter(is_own)
        .map(|name| path.join(name))
        .filter(|it| it.is_dir())
        .collect();
    dirs.sort();
    dirs.truncate(MOST_SECRETS);
    let within = |dir: &Path| SECRET_NAMES.map(|name| dir.join(name));
    let all = within(path).into_iter().chain(dirs.iter().flat_map(|dir| within(dir)));
    Ok(all.filter(|path| path.is_file()).collect())
}

impl Place for SecretFiles {
    /// The nearest login of all files. One that is damaged counts only if no other has one.
    fn find(&self, registry: &str, repository: &str, _now: Instant) -> Result<Option<Login>, Trouble> {
        let (mut best, mut trouble) = (None, None);
        for file in self.files()? {
            let nearest = match file.read() {
                Ok(records) => records.nearest(registry, repository),
                Err(error) => {
                    trouble = trouble.or(Some(error));
                    continue;
                }
            };
            match nearest {
                Some((fit, Ok(login))) if best.as_ref().is_none_or(|(least, _)| fit > *least) => {
                    best = Some((fit, login))
                }
                Some((_, Err(detail))) => trouble = trouble.or_else(|| Some(file.trouble(detail))),
                _ => {}
            }
        }
        match (best, trouble) {
            (Some((_, login)), _) => Ok(Some(login)),
            (None, Some(trouble)) => Err(trouble),
            (None, None) => Ok(None),
        }
    }

    fn name(&self) -> String {
        let paths: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
        format!("the secrets in {}", paths.join(", "))
    }
}

impl fmt::Debug for SecretFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SecretFiles").field(&self.paths).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::programs::Runner;
    use super::*;
    use crate::sys::sandbox::Sandbox;

    fn user(found: Result<Option<Login>, Trouble>) -> Option<String> {
        match found.unwrap()? {
            Login::Basic { user, .. } => Some(user),
            other => panic!("{other:?}"),
        }
    }

    fn entry(host: &str, user: &str) -> String {
        format!(r#"{{"auths": {{"{host}": {{"username": "{user}", "password": "p"}}}}}}"#)
    }

    fn auth_file(path: &Path) -> AuthFile {
        AuthFile::new(path, Arc::new(Helpers::new(Arc::new(Runner::new(Sandbox::off())), Vec::new())))
    }

    #[test]
    fn a_file_is_read_again_and_a_damaged_one_leaves_things_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let (file, now) = (auth_file(dir.path()), Instant::now());
        let find = || file.find("r.example", "a", now);

        assert_eq!(user(find()), None, "it is not there");
        fs::write(&path, "{").unwrap();
        let error = find().unwrap_err().to_string();
        assert_eq!(error, format!("{}: not a config.json of docker (line 1, column 1)", path.display()));
        fs::write(&path, entry("r.example", "one")).unwrap();
        assert_eq!(user(find()).as_deref(), Some("one"));
        fs::write(&path, entry("r.example", "two")).unwrap();
        assert_eq!(user(find()).as_deref(), Some("two"));
        fs::write(&path, "garbage").unwrap();
        assert_eq!(user(find()).as_deref(), Some("two"));
        fs::write(&path, entry("s.example", "three")).unwrap();
        assert_eq!(user(find()), None);
        fs::write(&path, entry("r.example", "four")).unwrap();
        assert_eq!(user(find()).as_deref(), Some("four"));
        fs::remove_file(&path).unwrap();
        assert_eq!(user(find()), None, "somebody has logged out");
    }

    #[test]
    fn a_file_without_an_end_is_an_error() {
        let error = auth_file(Path::new("/dev/zero")).find("r.example", "a", Instant::now()).unwrap_err();
        assert_eq!(error.to_string(), "/dev/zero: it cannot be read (it has more than 4 MiB)");
    }

    #[test]
    fn secrets_are_found_in_files_and_directories_as_volumes_show_them() {
        let dir = tempfile::tempdir().unwrap();
        let (one, many) = (dir.path().join("one.json"), dir.path().join("many"));
        for (name, text) in [
            ("..2026/a/.dockerconfigjson", entry("hidden.example", "hidden")),
            ("a/.dockerconfigjson", entry("a.example", "a")),
            ("b/.dockercfg", r#"{"b.example": {"username": "b", "password": "p"}}"#.to_owned()),
            ("c/config.json", entry("a.example/team", "team")),
            ("d/.dockerconfigjson", "garbage".to_owned()),
        ] {
            let path = many.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::write(&one, entry("one.example", "one")).unwrap();
        let (secrets, now) = (SecretFiles::new(vec![one, many.clone()]), Instant::now());
        let find = |registry: &str, repository: &str| secrets.find(registry, repository, now);

        for (registry, repository, expected) in [
            ("one.example", "x", "one"),
            ("a.example", "x", "a"),
            ("b.example", "x", "b"),
            ("a.example", "team/x", "team"),
        ] {
            assert_eq!(user(find(registry, repository)).as_deref(), Some(expected), "{registry}/{repository}");
        }
        let trouble = find("hidden.example", "x").unwrap_err();
        assert!(trouble.from.ends_with("many/d/.dockerconfigjson"), "it might have been there: {trouble}");
        fs::remove_dir_all(many.join("d")).unwrap();
        assert_eq!(user(find("hidden.example", "x")), None);
        fs::create_dir(many.join("e")).unwrap();
        fs::write(many.join("e/.dockerconfigjson"), entry("new.example", "new")).unwrap();
        assert_eq!(user(find("new.example", "x")).as_deref(), Some("new"));
    }

    #[test]
    fn secrets_start_no_programs() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), r#"{"credsStore": "evil", "auths": {}}"#).unwrap();
        let secrets = SecretFiles::new(vec![file.path().to_owned()]);
        assert_eq!(user(secrets.find("r.example", "a", Instant::now())), None);
    }
}
