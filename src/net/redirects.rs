//! Where a server sent us last time, for as long as that holds.
//!
//! A registry answers each request for a blob with the signed address of an object store. Asking it once
//! for each range would double the round trips, and put the registry into the path of every read.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::header::{CACHE_CONTROL, HeaderMap};

/// How long a redirect is believed that does not say itself.
const UNSIGNED: Duration = Duration::from_secs(60);

/// The longest that any is believed: a blob may be deleted or move.
const LONGEST: Duration = Duration::from_secs(3600);

/// The part of its time after which a signed address is asked for anew, in percent: a request that starts
/// just before the end would be cut off.
const USED: u32 = 80;

/// Addresses kept; when there are more, those that end first go.
const MOST: usize = 4096;

/// Targets by the address that redirected. Both may be signed, so there is no way to print them.
#[derive(Default)]
pub(super) struct Redirects(Mutex<HashMap<Url, Target>>);

struct Target {
    url: Url,
    ends: Instant,
}

impl Redirects {
    /// Where `from` led, if that still holds at `now`.
    pub(super) fn find(&self, from: &Url, now: Instant) -> Option<Url> {
        let known = self.0.lock().unwrap();
        known.get(from).filter(|target| now < target.ends).map(|target| target.url.clone())
    }

    /// Notes that `from` led to `to`, as the answer with `headers` said at `now`.
    pub(super) fn learn(&self, from: Url, to: Url, headers: &HeaderMap, now: Instant) {
        let Some(ends) = lifetime(&to, headers).and_then(|time| now.checked_add(time)) else { return };
        let mut known = self.0.lock().unwrap();
        if known.len() >= MOST && !known.contains_key(&from) {
            known.retain(|_, target| now < target.ends);
        }
        if known.len() >= MOST
            && let Some(first) = known.iter().min_by_key(|(_, target)| target.ends).map(|(from, _)| from.clone())
        {
            known.remove(&first);
        }
        known.insert(from, Target { url: to, ends });
    }

    /// Forgets where `from` led, if that is still `to`.
    pub(super) fn forget(&self, from: &Url, to: &Url) {
        let mut known = self.0.lock().unwrap();
        if known.get(from).is_some_and(|target| target.url == *to) {
            known.remove(from);
        }
    }
}

/// How long `to` may be used, counted from now: what its signature says, else the answer that named it.
/// Only spans are read, and no times of day, since one of the two clocks may be wrong. `None` for not at all.
fn lifetime(to: &Url, headers: &HeaderMap) -> Option<Duration> {
    let signed = to.query_pairs().find_map(|(key, value)| {
        // Signatures of version 4 name the time in seconds, whichever cloud's prefix they have.
        let key = key.to_ascii_lowercase();
        (key.starts_with("x-") && key.ends_with("-expires")).then(|| value.parse().ok()).flatten()
    });
    let control = || headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let directives = || control().flat_map(|value| value.split(',')).map(str::trim);
    if directives().any(|directive| directive.eq_ignore_ascii_case("no-store")) {
        return None;
    }
    let aged = || {
        directives().find_map(|directive| {
            let (name, value) = directive.split_once('=')?;
            if name.eq_ignore_ascii_case("max-age") { value.parse().ok() } else { None }
        })
    };
    let full = signed.or_else(aged).map_or(UNSIGNED, Duration::from_secs).min(LONGEST);
    let used = full.saturating_mul(USED) / 100;
    (!used.is_zero()).then_some(used)
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn after(to: &str, control: &'static str) -> Option<u64> {
        let mut headers = HeaderMap::new();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static(control));
        lifetime(&url(to), &headers).map(|time| time.as_secs())
    }

    #[test]
    fn a_redirect_is_believed_as_long_as_its_signature_or_its_answer_says() {
        assert_eq!(after("https://s/x?X-Amz-Date=20200101T000000Z&X-Amz-Expires=1000", "max-age=10"), Some(800));
        assert_eq!(after("https://s/x?x-goog-expires=100", ""), Some(80));
        assert_eq!(after("https://s/x", "private, max-age=10"), Some(8));
        assert_eq!(after("https://s/x", ""), Some(48));
        assert_eq!(after("https://s/x?X-Amz-Expires=99999999999", ""), Some(2880));
        for (to, control) in [("https://s/x?X-Amz-Expires=1000", "no-store"), ("https://s/x?X-Amz-Expires=0", "")] {
            assert_eq!(after(to, control), None);
        }
    }

    #[test]
    fn what_has_ended_or_failed_is_not_given_again() {
        let (known, now) = (Redirects::default(), Instant::now());
        let (from, first, second) = (url("http://r/a"), url("http://s/1?X-Amz-Expires=10"), url("http://s/2"));
        known.learn(from.clone(), first.clone(), &HeaderMap::new(), now);

        assert_eq!(known.find(&from, now + Duration::from_secs(7)), Some(first.clone()));
        assert_eq!(known.find(&from, now + Duration::from_secs(8)), None);

        known.learn(from.clone(), second.clone(), &HeaderMap::new(), now);
        known.forget(&from, &first);
        assert_eq!(known.find(&from, now), Some(second.clone()), "somebody has asked anew since");
        known.forget(&from, &second);
        assert_eq!(known.find(&from, now), None);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let (known, now) = (Redirects::default(), Instant::now());
        for i in 0..MOST as u64 + 10 {
            let to = url(&format!("http://s/{i}?X-Amz-Expires={}", 100 + i % 50));
            known.learn(url(&format!("http://r/{i}")), to, &HeaderMap::new(), now);
        }
        assert_eq!(known.0.lock().unwrap().len(), MOST);
    }
}
