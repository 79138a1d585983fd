//! Where a user who is not root has what a daemon needs, by the rules of the XDG base directories.
//!
//! Root of a user namespace over the host's own files is such a user: the directories of the host are not his.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::daemon::settings::UserDirs;

/// The directories of the user of this process; `None` for root, if the host is his.
pub(super) fn user_dirs() -> Option<UserDirs> {
    let uid = nix::unistd::geteuid().as_raw();
    (!owns_the_host(uid)).then(|| dirs(uid, |name| std::env::var_os(name)))
}

/// Whether `uid` is root, and to whom the root directory belongs: it shows as another one's in a user namespace
/// whose root is somebody else outside. In a container with files of its own it shows as root's.
fn owns_the_host(uid: u32) -> bool {
    uid == 0 && std::fs::metadata("/").map_or(true, |root| root.uid() == uid)
}

/// Fails for a user who is not root if `dir`, which is there, is another one's, or what another one's link leads
/// to: in a place that anybody writes to, somebody may have been faster.
pub(super) fn ensure_own(dir: &Path) -> anyhow::Result<()> {
    let us = nix::unistd::geteuid().as_raw();
    let owners = || std::io::Result::Ok([std::fs::symlink_metadata(dir)?.uid(), std::fs::metadata(dir)?.uid()]);
    let owners = owners().with_context(|| format!("cannot use {}", dir.display()))?;
    match owners.into_iter().find(|owner| !owns_the_host(us) && *owner != us) {
        Some(owner) => bail!("{} belongs to user {owner}; give --cache or --run", dir.display()),
        None => Ok(()),
    }
}

/// The directories by what the environment says. Without any, what anybody may write to: [`ensure_own`] sees
/// to it that they belong to nobody else.
fn dirs(uid: u32, variable: impl Fn(&str) -> Option<OsString>) -> UserDirs {
    // A relative one is to be ignored.
    let dir = |name| variable(name).map(PathBuf::from).filter(|dir: &PathBuf| dir.is_absolute());
    let cache = dir("XDG_CACHE_HOME").or_else(|| dir("HOME").map(|home| home.join(".cache")));
    let cache = cache.map_or_else(|| PathBuf::from(format!("/var/tmp/rafsd-{uid}")), |dir| dir.join("rafsd"));
    let run = dir("XDG_RUNTIME_DIR");
    let run = run.map_or_else(|| PathBuf::from(format!("/tmp/rafsd-{uid}")), |dir| dir.join("rafsd"));
    UserDirs { cache, run }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(environment: &[(&str, &str)], cache: &str, run: &str) {
        let find = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        assert_eq!(dirs(7, find), UserDirs { cache: cache.into(), run: run.into() });
    }

    #[test]
    fn the_environment_says_where() {
        let all = [("XDG_CACHE_HOME", "/c"), ("XDG_RUNTIME_DIR", "/r"), ("HOME", "/h")];
        check(&all, "/c/rafsd", "/r/rafsd");
        check(&[("HOME", "/h")], "/h/.cache/rafsd", "/tmp/rafsd-7");
        check(&[("XDG_CACHE_HOME", "c"), ("XDG_RUNTIME_DIR", "")], "/var/tmp/rafsd-7", "/tmp/rafsd-7");
    }
}
