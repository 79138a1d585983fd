//! Whether a program could go on in the place of this daemon: tried before anything ends for it.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::DaemonError;
use crate::sys::programs::{self, ProgramError, Said};

/// What has `rafsd serve` look at its settings and do nothing.
pub const ONLY_CHECK: &str = "--only-check";

/// How long a program may take to say a few words.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most characters that are repeated of what it says.
const MOST_WORDS: usize = 1000;

/// Tries `program`, which would be started with `arguments`. Blocks.
///
/// # Errors
/// It cannot be run, is not rafsd, or does not take its settings.
pub(super) fn try_out(program: &Path, arguments: &[OsString]) -> Result<(), DaemonError> {
    let unusable = |cause| DaemonError::Io { path: program.to_owned(), cause };
    let said = run(program, &["--version".into()], PATIENCE).map_err(unusable)?;
    if !said.status.success() || !said.stdout.starts_with(b"rafsd ") {
        let how = if said.status.success() { "something else".to_owned() } else { told(&said) };
        return Err(unusable(io::Error::other(format!("it does not answer --version as rafsd does, but: {how}"))));
    }
    let words: Vec<_> = arguments.iter().cloned().chain([ONLY_CHECK.into()]).collect();
    let said = run(program, &words, PATIENCE).map_err(unusable)?;
    if said.status.success() { Ok(()) } else { Err(DaemonError::Settings(told(&said))) }
}

/// Runs a program of which little is known, for `patience` at most.
fn run(program: &Path, words: &[OsString], patience: Duration) -> io::Result<Said> {
    let mut command = Command::new(program);
    command.args(words).stderr(Stdio::piped());
    programs::run(command, b"", patience).map_err(|error| match error {
        ProgramError::Time(_) => io::Error::new(io::ErrorKind::TimedOut, error),
        error => io::Error::other(error),
    })
}

/// How a program ended that failed, and what it said about that, in one line.
fn told(said: &Said) -> String {
    let text = String::from_utf8_lossy(&said.stderr);
    let lines = text.lines().map(|line| line.trim().trim_start_matches("rafsd: ")).filter(|line| !line.is_empty());
    let words: String = lines.collect::<Vec<_>>().join("; ").chars().take(MOST_WORDS).collect();
    if words.is_empty() { said.status.to_string() } else { words }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Instant;

    use super::*;
    use crate::base::Chain;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("program");
        programs::write_program(&path, text);
        path
    }

    #[test]
    fn what_cannot_go_on_is_refused_with_its_own_words() {
        let dir = tempfile::tempdir().unwrap();
        for (text, words) in [
            ("#!/bin/sh\nexit 1\n", "but: exit status: 1"),
            ("#!/bin/sh\necho hello\n", "but: something else"),
            ("#!/bin/sh\necho cannot load libx.so >&2\nexit 127\n", "but: cannot load libx.so"),
            ("#!/bin/sh\nexec yes\n", "it says more than 1 MiB"),
            ("#!/bin/sh\nexec yes >&2\n", "it says more than 1 MiB"),
            ("#!/nowhere/sh\n", "No such file or directory"),
            ("\u{7f}", "Exec format error"),
            (
                "#!/bin/sh\n[ $1 = --version ] && echo rafsd 9 && exit\nprintf 'rafsd: no %s\\n\\n  x\\n' \"$*\" >&2\nexit 2\n",
                "another daemon could not use the settings: no serve --run /r --only-check; x",
            ),
        ] {
            let program = script(dir.path(), text);
            let refused = try_out(&program, &["serve", "--run", "/r"].map(OsString::from)).unwrap_err();
            let said = Chain(&refused).to_string();
            assert!(said.contains(words), "{text:?}: {said}");
        }
        let fit = script(dir.path(), "#!/bin/sh\necho rafsd 9\n");
        try_out(&fit, &["serve".into()]).unwrap();
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "#!/bin/sh\nsleep 1000\n");
        let clock = Instant::now();

        let late = run(&program, &[], Duration::from_millis(50)).unwrap_err();

        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        assert!(late.to_string().contains("within 0.05 s") && clock.elapsed() < Duration::from_secs(100), "{late}");
    }
}
