//! Credentials from the environment of the daemon.

use std::fmt;
use std::time::Instant;

use super::chain::{Place, Trouble};
use super::record::{AuthRecords, user_and_password};
use crate::net::auth::Login;

/// Our own variable, and that of Nydus. The first that is set counts.
pub(super) const VARIABLES: &[&str] = &["RAFSD_REGISTRY_AUTH", "IMAGE_PULL_AUTH"];

/// What a variable says.
pub struct Environment {
    variable: &'static str,
    said: Said,
}

enum Said {
    /// For every registry that asks and that nobody else knows.
    Anywhere(Login),
    Records(AuthRecords),
}

impl Environment {
    /// Reads the first variable that `get` has: base64 of `USER:PASSWORD`, or the text of a `config.json`.
    ///
    /// # Errors
    /// It is neither.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Trouble> {
        let set = VARIABLES.iter().find_map(|name| Some((*name, get(name).filter(|text| !text.trim().is_empty())?)));
        let Some((variable, text)) = set else { return Ok(None) };
        let trouble = |detail| Trouble::new(format!("the variable {variable}"), detail);
        let said = if text.trim_start().starts_with('{') {
            Said::Records(AuthRecords::parse(text.as_bytes()).map_err(trouble)?)
        } else {
            let login = user_and_password(&text);
            Said::Anywhere(
                login.ok_or_else(|| trouble("neither base64 of USER:PASSWORD nor a config.json".to_owned()))?,
            )
        };
        Ok(Some(Self { variable, said }))
    }
}

impl Place for Environment {
    fn find(&self, registry: &str, repository: &str, _now: Instant) -> Result<Option<Login>, Trouble> {
        match &self.said {
            Said::Anywhere(login) => Ok(Some(login.clone())),
            Said::Records(records) => {
                records.find(registry, repository).map_err(|detail| Trouble::new(self.name(), detail))
            }
        }
    }

    fn name(&self) -> String {
        format!("the variable {}", self.variable)
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Environment").field(&self.variable).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Secret;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Environment>, Trouble> {
        Environment::read(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn a_variable_holds_one_login_or_a_whole_file() {
        let find = |variables: &[(&str, &str)], registry: &str| {
            let place = read(variables).unwrap().unwrap();
            (place.find(registry, "a", Instant::now()).unwrap(), place.name())
        };
        let me = Some(Login::Basic { user: "me".into(), password: Secret::new("p") });

        let nydus = [("IMAGE_PULL_AUTH", "bWU6cA==")];
        assert_eq!(find(&nydus, "r.example"), (me.clone(), "the variable IMAGE_PULL_AUTH".into()));
        let ours = r#"{"auths": {"r.example": {"auth": "bWU6cA"}}}"#;
        let both = [("RAFSD_REGISTRY_AUTH", ours), ("IMAGE_PULL_AUTH", "eW91OnA=")];
        assert_eq!(find(&both, "r.example"), (me, "the variable RAFSD_REGISTRY_AUTH".into()));
        assert_eq!(find(&both, "s.example").0, None);
        assert!(read(&[("RAFSD_REGISTRY_AUTH", " ")]).unwrap().is_none() && read(&[]).unwrap().is_none());
    }

    #[test]
    fn what_makes_no_sense_is_told_without_being_shown() {
        for text in ["hunter2", "{hunter2", r#"{"auths": "hunter2"}"#] {
            let error = read(&[("RAFSD_REGISTRY_AUTH", text)]).unwrap_err().to_string();
            assert!(error.starts_with("the variable RAFSD_REGISTRY_AUTH: ") && !error.contains("hunter2"), "{error}");
        }
    }
}
