//! The terminal while it is ours: another screen, no echo, no cursor; given back as it was.

use std::io::{self, IsTerminal, Read, Write};

use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::frame::Size;

/// Shown instead of the shell's screen until it is dropped.
pub(super) struct Screen {
    /// How standard input was set, if it is a terminal.
    before: Option<Termios>,
}

/// The second screen, and back; the cursor, hidden and shown.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

impl Screen {
    pub(super) fn take() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin()).ok();
        let screen = Self { before };
        if let Some(before) = &screen.before {
            let mut mode = before.clone();
            // Keys come one by one, and Ctrl-C is one of them.
            mode.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
            termios::tcsetattr(io::stdin(), OptionalActions::Now, &mode)?;
        }
        write(ENTER)?;
        Ok(screen)
    }

    /// Puts these lines in the place of those before.
    pub(super) fn show(&self, lines: &[String]) -> io::Result<()> {
        // Each line to its end and the screen to its end are erased: nothing flickers.
        let lines: Vec<_> = lines.iter().map(|line| format!("{line}\x1b[K")).collect();
        write(&format!("\x1b[H{}\x1b[J", lines.join("\r\n")))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = write(LEAVE);
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// How large the terminal of standard output is.
pub(super) fn size() -> Option<Size> {
    let size = termios::tcgetwinsize(io::stdout()).ok()?;
    // Some terminals do not know and say zero.
    let known = size.ws_col > 0 && size.ws_row > 0;
    known.then(|| Size { columns: size.ws_col.into(), rows: size.ws_row.into() })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Other,
}

/// Keys as they are pressed; none ever if standard input is no terminal.
pub(super) struct Keys(Option<UnboundedReceiver<io::Result<Key>>>);

impl Keys {
    /// Starts a thread that waits for keys, and ends with the process or the first error.
    pub(super) fn new() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let (tell, told) = unbounded_channel();
        let read = move || {
            let mut keys = [0; 16];
            loop {
                let pressed = io::stdin().lock().read(&mut keys).map(|len| key(&keys[..len]));
                let is_last = !matches!(pressed, Ok(Key::Other));
                if tell.send(pressed).is_err() || is_last {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("keys".to_owned()).spawn(read)?;
        Ok(Self(Some(told)))
    }

    /// The next key. The end of the input is as good as "quit".
    pub(super) async fn next(&mut self) -> io::Result<Key> {
        match &mut self.0 {
            Some(told) => told.recv().await.unwrap_or(Ok(Key::Quit)),
            None => std::future::pending().await,
        }
    }
}

fn key(pressed: &[u8]) -> Key {
    const CTRL_C: u8 = 3;
    let quits = pressed.is_empty() || pressed.iter().any(|key| matches!(key, b'q' | b'Q' | &CTRL_C));
    if quits { Key::Quit } else { Key::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_control_c_and_the_end_of_the_input_quit() {
        for pressed in [&b"q"[..], b"Q", b"\x03", b"xq", b""] {
            assert_eq!(key(pressed), Key::Quit, "{pressed:?}");
        }
        assert_eq!(key(b"\x1b[A"), Key::Other);
    }
}
