//! All secrets that the tests of this process hand out, and everything that the program has said: the one must
//! not be in the other.

use std::error::Error;
use std::io;
use std::sync::{Mutex, OnceLock};

use aho_corasick::AhoCorasick;
use rafsd::base::Chain;

/// Texts that must not be said.
static KEPT: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Everything that was said: lines of the log, errors, metrics, answers.
static SAID: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Remembers a secret. One of less than 6 characters would be found by chance.
pub fn keep(text: &str) {
    assert!(text.len() >= 6, "too short to look for");
    let mut kept = KEPT.lock().unwrap();
    if !kept.iter().any(|known| known == text) {
        kept.push(text.to_owned());
    }
}

/// Remembers something that the program has said.
pub fn said(text: &str) {
    let mut said = SAID.lock().unwrap();
    said.extend_from_slice(text.as_bytes());
    said.push(b'\n');
}

/// Remembers all forms of an error.
pub fn failed(error: &(impl Error + 'static)) {
    said(&format!("{error} {error:?} {error:#?} {}", Chain(error)));
}

/// Writes the log there, at its most talkative.
#[derive(Clone, Copy)]
struct Ear;

impl io::Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        SAID.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Looks through everything that was said until it is dropped, and before.
#[must_use = "nobody looks without it"]
pub struct Watch(());

/// Begins to listen to the log of the whole process.
pub fn watch() -> Watch {
    static LISTENING: OnceLock<()> = OnceLock::new();
    LISTENING.get_or_init(|| {
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false).with_writer(|| Ear).init();
    });
    Watch(())
}

impl Watch {
    /// Bytes that were said so far, so that a test can be sure that it listens at all.
    pub fn heard(&self) -> usize {
        SAID.lock().unwrap().len()
    }

    /// What was said and is a secret, with what stood around it; a few of many.
    pub fn told(&self) -> Vec<String> {
        let (kept, said) = (KEPT.lock().unwrap().clone(), SAID.lock().unwrap());
        let search = AhoCorasick::new(&kept).expect("secrets that fit into memory");
        search.find_iter(&*said).take(20).map(|found| around(&said, found.start())).collect()
    }
}

/// The line with the place, but not more than can be read.
fn around(said: &[u8], at: usize) -> String {
    let begin = said[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let end = said[at..].iter().position(|&byte| byte == b'\n').map_or(said.len(), |len| at + len);
    String::from_utf8_lossy(&said[begin..end.min(begin + 600)]).into_owned()
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let told = self.told();
            assert!(told.is_empty(), "secrets were told:\n{}", told.join("\n"));
        }
    }
}
