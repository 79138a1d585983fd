//! Programs of which little is known: started, told something, heard, within bounds of time and memory.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::service;

/// Most bytes that are heard on each of its two ways to say something.
const MOST_OUTPUT: u64 = 1 << 20;

/// What a program said.
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote. May be secret.
    pub stdout: Vec<u8>,
    /// The same for people; empty unless that was asked for.
    pub stderr: Vec<u8>,
}

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Said").field("status", &self.status).finish_non_exhaustive()
    }
}

/// Why a program said nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    #[error("it cannot be started ({0})")]
    Start(String),
    #[error("it has not ended within {} s", .0.as_secs_f64())]
    Time(Duration),
    #[error("it says more than 1 MiB")]
    Output,
}

/// Runs `command`, writes `stdin` to it, and waits for its end, for `limit` at most. What it says for people is heard if
/// the command has a pipe for that. The service manager, who means this process, is not told to it. Blocks.
///
/// # Errors
/// It cannot be started, does not end in time, or says more than 1 MiB.
pub fn run(mut command: Command, stdin: &[u8], limit: Duration) -> Result<Said, ProgramError> {
    for name in service::VARIABLES {
        command.env_remove(name);
    }
    // A group of its own, so that all of it can be ended.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(cannot)?;
    let group = i32::try_from(child.id()).map(Pid::from_raw);
    let stdin = stdin.to_vec();
    let (tell, told) = channel();
    let listener = thread::Builder::new().name("listener".into()).spawn(move || {
        // Nobody listens any more only when the caller has panicked.
        let _ = tell.send(converse(&mut child, &stdin));
    });
    let listener = listener.map_err(cannot)?;
    match told.recv_timeout(limit) {
        Err(RecvTimeoutError::Timeout) => {
            if let Ok(group) = group {
                // Gone is as good as killed.
                let _ = killpg(group, Signal::SIGKILL);
            }
            // Not waited for: something that left the group may keep the pipe open.
            drop(listener);
            Err(ProgramError::Time(limit))
        }
        outcome => outcome.unwrap_or_else(|_| Err(ProgramError::Start("nobody listens to it".to_owned()))),
    }
}

fn cannot(error: io::Error) -> ProgramError {
    ProgramError::Start(error.to_string())
}

/// Says `stdin`, hears everything, waits for the end.
fn converse(child: &mut Child, stdin: &[u8]) -> Result<Said, ProgramError> {
    if let Some(mut pipe) = child.stdin.take() {
        // A program need not listen. What is written fits into the pipe or is read.
        let _ = pipe.write_all(stdin);
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = thread::scope(|scope| {
        let beside = stderr.map(|pipe| thread::Builder::new().spawn_scoped(scope, || hear(pipe))).transpose();
        let stdout = stdout.map_or_else(Vec::new, hear);
        let stderr = beside.map_err(cannot)?.map(|beside| beside.join().unwrap_or_default());
        Ok((stdout, stderr.unwrap_or_default()))
    })?;
    // Whoever says too much gets SIGPIPE now that the pipe is closed.
    let status = child.wait().map_err(cannot)?;
    if [&stdout, &stderr].iter().any(|said| said.len() as u64 > MOST_OUTPUT) {
        return Err(ProgramError::Output);
    }
    Ok(Said { status, stdout, stderr })
}

fn hear(pipe: impl Read) -> Vec<u8> {
    let mut said = Vec::new();
    // What has come until an error is judged as it is.
    let _ = pipe.take(MOST_OUTPUT + 1).read_to_end(&mut said);
    said
}

/// Makes a program of `text` at `path`, without ever having it open for writing here: a child that another test starts
/// at that moment would have it open as well, and nobody could run it (`ETXTBSY`).
#[cfg(test)]
pub(crate) fn write_program(path: &std::path::Path, text: &str) {
    let write = r#"printf %s "$1" > "$2" && chmod 755 "$2""#;
    let written = Command::new("/bin/sh").args(["-c", write, "sh", text]).arg(path).status().unwrap();
    assert!(written.success(), "{written}");
}
