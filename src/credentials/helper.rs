//! Docker's credential helpers: `docker-credential-NAME get`, which is told a server and answers with JSON.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::chain::Trouble;
use super::programs::{Programs, find, is_name};
use super::record::named;
use super::remembered::Remembered;
use super::server::for_programs;
use crate::base::Secret;
use crate::net::auth::Login;

/// How long a helper may take.
const LIMIT: Duration = Duration::from_secs(20);

/// How long an answer is believed. What helpers give is often good for hours, but they do not say so.
const BELIEVED: Duration = Duration::from_secs(60);

/// What helpers say of a server that they do not know. Their library has this text.
const UNKNOWN: &str = "credentials not found";

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    user: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// All helpers, and what they said lately.
pub struct Helpers {
    programs: Arc<dyn Programs>,
    /// Where they are looked for.
    dirs: Vec<PathBuf>,
    /// By helper and server.
    answers: Remembered<(String, String), Option<Login>>,
}

impl Helpers {
    /// Helpers in `dirs`, which is `PATH`, run by `programs`.
    pub fn new(programs: Arc<dyn Programs>, dirs: Vec<PathBuf>) -> Self {
        Self { programs, dirs, answers: Remembered::default() }
    }

    /// What the helper `name` knows of `registry`. Blocks.
    pub(super) fn ask(&self, name: &str, registry: &str, now: Instant) -> Result<Option<Login>, Trouble> {
        if !is_name(name) {
            return Err(Trouble::new(
                "a credential helper",
                "its name has other signs than letters, digits, . _ and -",
            ));
        }
        let server = for_programs(registry);
        let believed = now.checked_add(BELIEVED);
        self.answers.get((name.to_owned(), server.clone()), now, || Ok((self.run(name, &server)?, believed)))
    }

    /// Gives `login` no more without asking.
    pub(super) fn forget(&self, login: &Login) {
        self.answers.forget(|known| known.as_ref() == Some(login));
    }

    fn run(&self, name: &str, server: &str) -> Result<Option<Login>, Trouble> {
        let name = format!("docker-credential-{name}");
        let trouble = |detail: String| Trouble::new(name.clone(), detail);
        let program = find(&name, self.dirs.iter().cloned());
        let program = program.ok_or_else(|| trouble("it is in no directory of PATH; install it there".to_owned()))?;
        let output = self.programs.run(&program, &["get".to_owned()], server.as_bytes(), &[], LIMIT);
        let output = output.map_err(|error| trouble(error.to_string()))?;
        if output.status == Some(0) {
            // What cannot be read is not shown: it may be secret.
            let answer: Answer = serde_json::from_slice(&output.stdout)
                .map_err(|_| trouble(format!("its answer for {server} is not the JSON of a credential helper")))?;
            return Ok((!answer.user.is_empty()).then(|| named(answer.user, Secret::new(answer.secret))));
        }
        if String::from_utf8_lossy(&output.stdout).to_ascii_lowercase().contains(UNKNOWN) {
            return Ok(None);
        }
        let status = output.status.map_or_else(|| "a signal".to_owned(), |status| format!("status {status}"));
        Err(trouble(format!("it ended with {status} for {server}; `echo {server} | {name} get` shows why")))
    }
}

impl fmt::Debug for Helpers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helpers").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::programs::Runner;
    use super::*;
    use crate::sys::programs::write_program;
    use crate::sys::sandbox::Sandbox;

    struct Bench {
        dir: tempfile::TempDir,
        helpers: Helpers,
    }

    fn bench(script: &str) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-test");
        let log = dir.path().join("log");
        let log = log.display();
        write_program(&path, &format!("#!/bin/sh\nread server\necho \"$1 $server\" >> {log}\n{script}\n"));
        let helpers = Helpers::new(Arc::new(Runner::new(Sandbox::off())), vec![dir.path().to_owned()]);
        Bench { dir, helpers }
    }

    impl Bench {
        fn asked(&self) -> Vec<String> {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            log.lines().map(ToOwned::to_owned).collect()
        }
    }

    #[test]
    fn a_helper_is_asked_once_a_while_and_again_when_its_answer_was_refused() {
        let bench = bench(r#"echo '{"ServerURL": "x", "Username": "me", "Secret": "p"}'"#);
        let now = Instant::now();
        let login = Some(Login::Basic { user: "me".into(), password: Secret::new("p") });

        for _ in 0..3 {
            assert_eq!(bench.helpers.ask("test", "R.example", now).unwrap(), login);
        }
        assert_eq!(bench.asked(), ["get r.example"]);
        bench.helpers.forget(&login.clone().unwrap());
        bench.helpers.ask("test", "registry-1.docker.io", now).unwrap();
        assert_eq!(bench.helpers.ask("test", "r.example", now).unwrap(), login);
        assert_eq!(bench.asked(), ["get r.example", "get https://index.docker.io/v1/", "get r.example"]);
        bench.helpers.ask("test", "r.example", now + BELIEVED).unwrap();
        assert_eq!(bench.asked().len(), 4);
    }

    #[test]
    fn a_refresh_token_has_a_name_of_its_own() {
        let bench = bench(r#"echo '{"Username": "<token>", "Secret": "r"}'"#);
        assert_eq!(bench.helpers.ask("test", "r", Instant::now()).unwrap(), Some(Login::Identity(Secret::new("r"))));
    }

    #[test]
    fn a_helper_that_does_not_know_a_server_is_no_trouble_and_others_say_what_to_do() {
        let ask = |script: &str| bench(script).helpers.ask("test", "r.example", Instant::now());

        assert_eq!(ask("echo 'credentials not found in native keychain'; exit 1"), Ok(None));
        for (script, told) in [
            (
                "echo hunter2; exit 2",
                "it ended with status 2 for r.example; `echo r.example | docker-credential-test get` shows why",
            ),
            ("echo hunter2", "its answer for r.example is not the JSON of a credential helper"),
            (
                "kill -9 $$",
                "it ended with a signal for r.example; `echo r.example | docker-credential-test get` shows why",
            ),
        ] {
            assert_eq!(ask(script).unwrap_err().to_string(), format!("docker-credential-test: {told}"));
        }
        let nowhere = bench("").helpers.ask("other", "r.example", Instant::now()).unwrap_err();
        assert_eq!(nowhere.to_string(), "docker-credential-other: it is in no directory of PATH; install it there");
        assert!(bench("").helpers.ask("../test", "r.example", Instant::now()).is_err());
    }
}
