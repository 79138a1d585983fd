//! Programs that know credentials: started, told something, heard, within bounds.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::environment;
use crate::sys::programs;
pub use crate::sys::programs::ProgramError;
use crate::sys::sandbox::Sandbox;

/// What a program said.
#[derive(Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; `None` if a signal ended it.
    pub status: Option<i32>,
    /// What it wrote. May be secret.
    pub stdout: Vec<u8>,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").field("status", &self.status).finish_non_exhaustive()
    }
}

/// Runs programs. The daemon is confined and cannot; what it gives is the way out.
pub trait Programs: Send + Sync + fmt::Debug {
    /// Runs `program` with `args` and more `env`, writes `stdin` to it, and waits for its end. Blocks.
    fn run(
        &self,
        program: &Path,
        args: &[String],
        stdin: &[u8],
        env: &[(String, String)],
        limit: Duration,
    ) -> Result<Output, ProgramError>;
}

/// Runs programs outside of a sandbox.
#[derive(Clone, Debug)]
pub struct Runner(Sandbox);

impl Runner {
    /// By way of `sandbox`; in place if that is off.
    pub fn new(sandbox: Sandbox) -> Self {
        Self(sandbox)
    }
}

impl Programs for Runner {
    fn run(
        &self,
        program: &Path,
        args: &[String],
        stdin: &[u8],
        env: &[(String, String)],
        limit: Duration,
    ) -> Result<Output, ProgramError> {
        self.0.outside(|| run(program, args, stdin, env, limit))
    }
}

fn run(
    program: &Path,
    args: &[String],
    stdin: &[u8],
    env: &[(String, String)],
    limit: Duration,
) -> Result<Output, ProgramError> {
    let mut command = Command::new(program);
    command.args(args).envs(env.iter().map(|(name, value)| (name, value)));
    // Credentials for one place are not for another. What it says for people may be secret.
    for name in environment::VARIABLES {
        command.env_remove(name);
    }
    command.stderr(Stdio::null());
    let said = programs::run(command, stdin, limit)?;
    Ok(Output { status: said.status.code(), stdout: said.stdout })
}

/// Whether `name` may be part of the name of a program: no path, no option, nothing a shell would heed.
pub(super) fn is_name(name: &str) -> bool {
    let is_sign = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty() && name.len() <= 128 && name.bytes().all(is_sign) && !name.starts_with(['.', '-'])
}

/// The program `name` in the first of `dirs` that has it. Relative directories are passed over.
pub(super) fn find(name: &str, dirs: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    dirs.into_iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(is_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, stdin: &[u8], limit: Duration) -> Result<Output, ProgramError> {
        let args = ["-c".to_owned(), script.to_owned()];
        let env = [("GREETING".to_owned(), "hello".to_owned())];
        Runner::new(Sandbox::off()).run(Path::new("/bin/sh"), &args, stdin, &env, limit)
    }

    const PLENTY: Duration = Duration::from_secs(30);

    #[test]
    fn a_program_is_told_and_heard() {
        let output = shell("read line; echo \"$GREETING $line\"; exit 3", b"world\n", PLENTY).unwrap();
        assert_eq!((output.status, output.stdout), (Some(3), b"hello world\n".to_vec()));
        assert_eq!(shell("kill -9 $$", b"", PLENTY).unwrap().status, None);
        assert_eq!(shell("exec <&-; echo deaf", &[b'x'; 9000], PLENTY).unwrap().stdout, b"deaf\n");
    }

    #[test]
    fn a_program_that_does_not_end_is_ended_with_its_children() {
        let limit = Duration::from_millis(200);
        assert_eq!(shell("sleep 1000 & sleep 1000", b"", limit), Err(ProgramError::Time(limit)));
    }

    #[test]
    fn a_program_that_says_too_much_or_is_not_there_is_an_error() {
        assert_eq!(shell("yes", b"", PLENTY), Err(ProgramError::Output));
        let nowhere = Runner::new(Sandbox::off()).run(Path::new("/nowhere"), &[], b"", &[], PLENTY);
        assert!(matches!(nowhere, Err(ProgramError::Start(_))), "{nowhere:?}");
    }

    #[test]
    fn programs_are_found_by_names_that_are_names() {
        for (name, good) in [
            ("ecr-login", true),
            ("a.b_c", true),
            ("", false),
            ("../x", false),
            ("-x", false),
            ("a b", false),
            ("a/b", false),
        ] {
            assert_eq!(is_name(name), good, "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("plain"), "").unwrap();
        let dirs = || [PathBuf::from("bin"), dir.path().to_owned(), PathBuf::from("/bin")];
        assert_eq!(find("sh", dirs()), Some(PathBuf::from("/bin/sh")));
        assert_eq!(find("plain", dirs()), None, "it cannot be executed");
    }
}
