//! Credentials that somebody gave the running daemon. They are in its memory and nowhere else.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::chain::{Place, Trouble};
use super::server::{Server, nearest};
use crate::net::auth::Login;

/// Logins by server, replaced and removed while images are mounted.
#[derive(Default)]
pub struct Given {
    logins: RwLock<BTreeMap<Server, Login>>,
    generation: AtomicU64,
}

/// What is told of one login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenEntry {
    pub server: Server,
    /// The name, where the login has one.
    pub user: Option<String>,
    pub kind: LoginKind,
}

/// What kind of secret a login has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoginKind {
    Password,
    IdentityToken,
    RegistryToken,
}

impl Given {
    /// Takes `login` for `server`, in place of the one that was there, and says what it will tell of it. Nothing that
    /// was got with the same login is void.
    pub fn set(&self, server: Server, login: Login) -> GivenEntry {
        let entry = entry(&server, &login);
        let mut logins = self.logins.write().unwrap();
        if logins.get(&server) != Some(&login) {
            logins.insert(server, login);
            self.generation.fetch_add(1, Ordering::Release);
        }
        entry
    }

    /// Forgets the login of `server`. `false`: there was none.
    pub fn remove(&self, server: &Server) -> bool {
        let removed = self.logins.write().unwrap().remove(server).is_some();
        if removed {
            self.generation.fetch_add(1, Ordering::Release);
        }
        removed
    }

    /// All of them, without what is secret, by host and path.
    pub fn list(&self) -> Vec<GivenEntry> {
        self.logins.read().unwrap().iter().map(|(server, login)| entry(server, login)).collect()
    }

    /// Grows with every change.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

fn entry(server: &Server, login: &Login) -> GivenEntry {
    let (user, kind) = match login {
        Login::Basic { user, .. } => (Some(user.clone()), LoginKind::Password),
        Login::Identity(_) => (None, LoginKind::IdentityToken),
        Login::Bearer(_) => (None, LoginKind::RegistryToken),
    };
    GivenEntry { server: server.clone(), user, kind }
}

impl Place for Given {
    fn find(&self, registry: &str, repository: &str, _now: Instant) -> Result<Option<Login>, Trouble> {
        let logins = self.logins.read().unwrap();
        Ok(nearest(&*logins, registry, repository).map(|(_, login)| login.clone()))
    }

    fn name(&self) -> String {
        "`rafsd credentials set`".to_owned()
    }
}

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.list()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Secret;

    fn login(user: &str) -> Login {
        Login::Basic { user: user.to_owned(), password: Secret::new(format!("secret of {user}")) }
    }

    fn server(text: &str) -> Server {
        Server::parse(text).unwrap()
    }

    #[test]
    fn the_nearest_login_is_found_and_replaced_and_removed() {
        let (given, now) = (Given::default(), Instant::now());
        let find = |repository| given.find("r.example", repository, now).unwrap();
        given.set(server("r.example"), login("all"));
        given.set(server("r.example/team"), login("team"));
        let before = given.generation();

        assert_eq!(
            (find("team/a"), find("other"), find("teams")),
            (Some(login("team")), Some(login("all")), Some(login("all")))
        );
        assert_eq!(given.find("x.example", "a", now).unwrap(), None);

        given.set(server("https://R.example/"), login("new"));
        assert_eq!(find("other"), Some(login("new")));
        assert!(given.remove(&server("r.example")) && !given.remove(&server("r.example")));
        assert_eq!((find("other"), find("team/a")), (None, Some(login("team"))));
        assert_eq!(given.generation(), before + 2);
    }

    #[test]
    fn nothing_secret_is_listed_or_shown() {
        let given = Given::default();
        given.set(server("r.example/x"), login("me"));
        given.set(server("s.example"), Login::Bearer(Secret::new("secret token")));

        let shown = format!("{given:?} {:?}", given.list());
        assert!(shown.contains("me") && !shown.contains("secret"), "{shown}");
    }
}
