//! Several places of credentials, asked in order.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::Semaphore;

use super::given::Given;
use crate::net::Clock;
use crate::net::auth::{Keychain, KeychainError, Login, LoginFuture};

/// Places asked at once. Each holds a thread that mounts and watchdogs need too.
const AT_ONCE: usize = 4;

/// Registries whose last place is remembered for messages.
const MOST_ORIGINS: usize = 1024;

/// A place of credentials.
pub trait Place: Send + Sync + fmt::Debug {
    /// How to log in to `registry`, which is `HOST[:PORT]`, for `repository`; `None` if it does not know.
    /// May block.
    ///
    /// # Errors
    /// It might know, and cannot be asked.
    fn find(&self, registry: &str, repository: &str, now: Instant) -> Result<Option<Login>, Trouble>;

    /// `login` was refused: nothing remembered of it is given again.
    fn refused(&self, _registry: &str, _repository: &str, _login: &Login) {}

    /// What to call it in messages.
    fn name(&self) -> String;
}

/// Why a place could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{from}: {detail}")]
pub struct Trouble {
    /// The file or program.
    pub from: String,
    /// What went wrong, without secrets.
    pub detail: String,
}

impl Trouble {
    /// Something is wrong with `from`.
    pub fn new(from: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { from: from.into(), detail: detail.into() }
    }
}

/// Places in the order in which they are asked.
pub struct Chain {
    asked: Arc<Asked>,
    slots: Semaphore,
    given: Option<Arc<Given>>,
    clock: Clock,
}

struct Asked {
    places: Vec<Arc<dyn Place>>,
    /// By registry.
    origins: Mutex<HashMap<String, String>>,
}

impl Chain {
    /// Asks `places`, the first one first. `given`, which may be among them, tells when what was given
    /// earlier is void.
    pub fn new(places: Vec<Arc<dyn Place>>, given: Option<Arc<Given>>, clock: Clock) -> Self {
        let asked = Arc::new(Asked { places, origins: Mutex::default() });
        Self { asked, slots: Semaphore::new(AT_ONCE), given, clock }
    }
}

impl Asked {
    /// The first answer. A place that cannot be asked does not keep the next ones from answering; if none
    /// does, it may have been the one that could.
    fn find(&self, registry: &str, repository: &str, now: Instant) -> Result<Option<Login>, Trouble> {
        let mut trouble = None;
        for place in &self.places {
            match place.find(registry, repository, now) {
                Ok(Some(login)) => {
                    self.note(registry, place.name());
                    return Ok(Some(login));
                }
                Ok(None) => {}
                Err(other) => trouble = trouble.or(Some(other)),
            }
        }
        trouble.map_or(Ok(None), Err)
    }

    fn note(&self, registry: &str, name: String) {
        let mut origins = self.origins.lock().unwrap();
        if origins.len() >= MOST_ORIGINS {
            origins.clear();
        }
        origins.insert(registry.to_owned(), name);
    }
}

impl Keychain for Chain {
    fn login<'a>(&'a self, registry: &'a str, repository: &'a str) -> LoginFuture<'a> {
        Box::pin(async move {
            // Nobody closes it.
            let _slot = self.slots.acquire().await;
            let (asked, now) = (self.asked.clone(), self.clock.now());
            let (host, name) = (registry.to_owned(), repository.to_owned());
            let found = tokio::task::spawn_blocking(move || asked.find(&host, &name, now)).await;
            // A panic of a place, or the end of the runtime.
            let found = found.unwrap_or_else(|_| Err(Trouble::new("a place of credentials", "it broke off")));
            found.map_err(|Trouble { from, detail }| KeychainError { registry: registry.to_owned(), from, detail })
        })
    }

    fn refused(&self, registry: &str, repository: &str, login: &Login) {
        self.asked.places.iter().for_each(|place| place.refused(registry, repository, login));
    }

    fn origin(&self, registry: &str, _repository: &str) -> Option<String> {
        self.asked.origins.lock().unwrap().get(registry).cloned()
    }

    fn generation(&self) -> u64 {
        self.given.as_ref().map_or(0, |given| given.generation())
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.asked.places.iter().map(|place| place.name()).collect();
        f.debug_struct("Chain").field("places", &names).finish_non_exhaustive()
    }
}
