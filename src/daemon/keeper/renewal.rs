//! Keepers that a predecessor started, and what they would do if this daemon died.
//!
//! A keeper goes by what it was told when it was started: how long readers wait, and which program is
//! started with which arguments, in which environment and directory. A successor may have been
//! started otherwise. Then its keepers are replaced, one by one. Those that were started as this
//! daemon would start them stay: they know how often daemons have died lately, and since when readers
//! wait.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::absence::SERVED;
use super::wire::{Kind, Name, Op, Word};
use super::{End, Held, Keepers, Plan, RANKS, State, dismiss};
use crate::sys::faultpoint;
use crate::sys::files::inode_id_at;
use crate::sys::service;

/// The keepers of a predecessor are to be replaced.
pub(super) struct Renewal {
    due: Instant,
    /// The program that an upgrade had asked for: this daemon, or one that was never reached.
    program: Option<Held>,
}

impl Renewal {
    /// Of keepers that hold all this, when this daemon has not died of its start.
    pub(super) fn of(held: &BTreeMap<Name, Held>) -> Self {
        Self { due: Instant::now() + SERVED, program: held.get(&Name::only(Kind::Program)).cloned() }
    }
}

impl Keepers {
    /// Whether a [`Renewal`] is due. The program that it knows of is not held any more then.
    fn is_renewal_due(&self, state: &mut State) -> bool {
        let Some(renewal) = state.renewal.as_mut().filter(|renewal| Instant::now() >= renewal.due) else {
            return false;
        };
        let name = Name::only(Kind::Program);
        // Somebody may have asked for another one meanwhile.
        if let Some(program) = renewal.program.take()
            && state.held.get(&name).is_some_and(|held| Arc::ptr_eq(held, &program))
        {
            state.held.remove(&name);
            self.forget_at_the_supervisor(name);
        }
        true
    }

    /// Replaces those that a predecessor started otherwise than this daemon does, if it is time for that. At no time fewer
    /// than two hold everything.
    pub(super) fn replace_foreign(&self) -> io::Result<()> {
        for rank in 0..RANKS {
            let mut state = self.state.lock().unwrap();
            if state.finished || !self.is_renewal_due(&mut state) {
                return Ok(());
            }
            let Some(old) = state.ends[rank].as_ref().filter(|old| !self.plan.has_started(rank, old)) else { continue };
            tracing::info!(rank, pid = old.pid, "a keeper was started with other settings and is replaced");
            let meanwhile = |new: &End| {
                faultpoint::reach("keeper-filled");
                // One that does not know the word leaves when it is told to finish.
                let _ = old.tell(Word::new(Op::Relief).with(u64::from(new.pid)), None);
            };
            let filled = self.fill_post(rank, &state.held, meanwhile);
            if filled.is_err() {
                state.renewal = None;
            }
            faultpoint::reach("keeper-posted");
            if let Some(old) = state.ends[rank].replace(filled?) {
                dismiss(old);
            }
        }
        let mut state = self.state.lock().unwrap();
        // Unless somebody has asked for another one meanwhile.
        if state.renewal.take().is_some() && !state.held.contains_key(&Name::only(Kind::Program)) {
            // Those that stayed. One that does not hear this is dead.
            let _ = self.tell_all(&mut state, Word::about(Op::Release, Name::only(Kind::Program)), None);
        }
        Ok(())
    }
}

impl Plan {
    /// The command line of the keeper of `rank`, without the program.
    pub(super) fn arguments(&self, rank: usize) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["keeper".into(), "--run".into(), self.run.clone().into()];
        words.extend(["--rank".into(), rank.to_string().into()]);
        words.extend(["--patience".into(), self.patience.as_millis().to_string().into()]);
        if !self.sandbox {
            words.push("--no-sandbox".into());
        }
        if let Some(successor) = &self.successor {
            words.push("--".into());
            words.extend(successor.iter().cloned());
        }
        words
    }

    /// Whether the keeper of `rank` is as this plan would have it. No, if that cannot be told.
    fn has_started(&self, rank: usize, end: &End) -> bool {
        end.child.is_some() || self.is_followed_by(rank, &Path::new("/proc").join(end.pid.to_string()))
    }

    /// The same, of a process by its directory in `/proc`.
    fn is_followed_by(&self, rank: usize, process: &Path) -> bool {
        let inode = |path: PathBuf| inode_id_at(&path).ok();
        let is_program = inode(process.join("exe")).is_some_and(|exe| inode(self.program.clone()) == Some(exe));
        let words = fs::read(process.join("cmdline")).map(|text| split(&text)).unwrap_or_default();
        let has_orders = words.get(1..) == Some(&self.arguments(rank)[..]);
        // Who starts no daemon passes nothing on.
        let passes_on = || {
            let own = Path::new("/proc/self/cwd").to_owned();
            let environment = fs::read(process.join("environ")).map(|text| split(&text)).ok();
            inode(process.join("cwd")) == inode(own) && environment.map(passed_on) == Some(own_environment())
        };
        is_program && has_orders && (self.successor.is_none() || passes_on())
    }
}

/// Words that each end with NUL.
fn split(text: &[u8]) -> Vec<OsString> {
    let words = text.split_inclusive(|byte| *byte == 0);
    words.map(|word| OsString::from_vec(word.strip_suffix(&[0]).unwrap_or(word).to_vec())).collect()
}

/// The variables that a successor gets to see.
fn passed_on(variables: Vec<OsString>) -> BTreeSet<OsString> {
    let is_managed = |variable: &OsString| {
        let name = variable.as_encoded_bytes().split(|byte| *byte == b'=').next();
        service::VARIABLES.iter().any(|known| name == Some(known.as_bytes()))
    };
    variables.into_iter().filter(|variable| !is_managed(variable)).collect()
}

fn own_environment() -> BTreeSet<OsString> {
    let joined = |(mut name, value): (OsString, OsString)| {
        name.push("=");
        name.push(value);
        name
    };
    passed_on(std::env::vars_os().map(joined).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;
    use crate::sys::service::Supervisor;

    fn plan(successor: Option<&[&str]>) -> Plan {
        Plan {
            program: fs::canonicalize("/bin/sh").unwrap(),
            run: "/run/x".into(),
            patience: Duration::from_secs(60),
            successor: successor.map(|words| words.iter().map(OsString::from).collect()),
            sandbox: true,
            supervisor: Supervisor::default(),
        }
    }

    /// What the kernel would show of a keeper of rank 1 that `plan` has started, and `change` to it.
    fn follows(plan: &Plan, change: impl FnOnce(&Path)) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let there = |name: &str| dir.path().join(name);
        let text = |words: Vec<OsString>| {
            words.into_iter().flat_map(|word| [word.into_vec(), vec![0]].concat()).collect::<Vec<u8>>()
        };
        symlink(&plan.program, there("exe")).unwrap();
        symlink(std::env::current_dir().unwrap(), there("cwd")).unwrap();
        fs::write(there("cmdline"), text([vec!["rafsd".into()], plan.arguments(1)].concat())).unwrap();
        fs::write(there("environ"), text(own_environment().into_iter().collect())).unwrap();
        change(dir.path());
        plan.is_followed_by(1, dir.path())
    }

    fn append(path: PathBuf, more: &[u8]) {
        let old = fs::read(&path).unwrap();
        fs::write(path, [&old, more].concat()).unwrap();
    }

    #[test]
    fn a_keeper_that_would_do_the_same_stays() {
        assert!(follows(&plan(None), |_| ()));
        assert!(follows(&plan(Some(&["/bin/rafsd", "serve", "--deadline", "5s"])), |_| ()));
    }

    #[test]
    fn one_that_would_do_something_else_does_not() {
        let plan = plan(Some(&["/bin/rafsd", "serve"]));
        let impatient = Plan { patience: Duration::from_secs(2), ..plan.clone() };
        let alone = Plan { successor: None, ..plan.clone() };
        let free = Plan { sandbox: false, ..plan.clone() };
        let move_link = |path: PathBuf, to: &str| {
            fs::remove_file(&path).unwrap();
            symlink(to, path).unwrap();
        };

        assert!(!follows(&plan, |dir| append(dir.join("cmdline"), b"--more\0")));
        for other in [&impatient, &alone, &free] {
            let words = [vec![OsString::from("rafsd")], other.arguments(1)].concat();
            let text: Vec<u8> = words.into_iter().flat_map(|word| [word.into_vec(), vec![0]].concat()).collect();
            assert!(!follows(&plan, |dir| fs::write(dir.join("cmdline"), &text).unwrap()), "{other:?}");
        }
        assert!(!follows(&plan, |dir| move_link(dir.join("exe"), "/bin/cat")));
        assert!(!follows(&plan, |dir| move_link(dir.join("cwd"), "/")));
        assert!(!follows(&plan, |dir| append(dir.join("environ"), b"RAFSD_LOG=debug\0")));
        assert!(follows(&plan, |dir| append(dir.join("environ"), b"LISTEN_FDS=3\0")), "not passed on");
        for gone in ["exe", "cwd", "cmdline", "environ"] {
            assert!(!follows(&plan, |dir| fs::remove_file(dir.join(gone)).unwrap()), "without {gone}");
        }
    }

    #[test]
    fn what_is_not_passed_on_does_not_count() {
        let change = |dir: &Path| append(dir.join("environ"), b"INVOCATION_ID=7\0");
        assert!(follows(&plan(None), change));
    }
}
