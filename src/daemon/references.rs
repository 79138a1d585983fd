//! Where references led the last time, in the cache directory, so that what is known need not be asked for again
//! and can be mounted when nobody answers.
//!
//! One small file for each reference and platform, with all documents of the chain. They are hints that can be had
//! again, so a damaged one is nothing, and the oldest go when there are too many.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::base::Digest;
use crate::codec::sha256;
use crate::oci::{Link, Platform, Reference, Resolved};

/// Most references that are kept.
const MOST: usize = 1024;

/// Longest file that is read, in bytes: three documents of the longest kind, with their quotes escaped.
const MOST_BYTES: u64 = 32 << 20;

/// Most bytes of all files.
const MOST_TOTAL: u64 = 128 << 20;

/// The directory of what is known.
#[derive(Debug)]
pub(super) struct References {
    dir: PathBuf,
    scratch: AtomicU64,
}

/// A file.
#[derive(Serialize, Deserialize)]
struct Kept {
    reference: String,
    platform: String,
    links: Vec<Link>,
}

impl References {
    /// Kept below `dir`, which is made when there is something to keep.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, scratch: AtomicU64::new(0) }
    }

    /// By what a reference for a platform is known.
    pub(super) fn key(reference: &Reference, platform: Option<&Platform>) -> Digest {
        sha256(format!("{reference} {}", platform_text(platform)).as_bytes())
    }

    /// Where `reference` led the last time.
    pub(super) fn find(&self, reference: &Reference, platform: Option<&Platform>) -> Option<Resolved> {
        let path = self.path(reference, platform);
        if fs::metadata(&path).ok()?.len() > MOST_BYTES {
            return None;
        }
        let kept: Kept = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        let is_same = kept.reference == reference.to_string() && kept.platform == platform_text(platform);
        let found = Resolved::of_links(reference, kept.links).filter(|_| is_same)?;
        // What is used goes last; that it is not written down does no harm.
        let _ = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(found)
    }

    /// Keeps where a reference led. It is no harm if that fails.
    pub(super) fn keep(&self, resolved: &Resolved, platform: Option<&Platform>) {
        if let Err(error) = self.try_keep(resolved, platform) {
            tracing::warn!(%error, dir = %self.dir.display(), "cannot keep where a reference leads");
        }
    }

    fn try_keep(&self, resolved: &Resolved, platform: Option<&Platform>) -> std::io::Result<()> {
        let reference = &resolved.reference;
        let links = resolved.links.clone();
        let kept = Kept { reference: reference.to_string(), platform: platform_text(platform), links };
        let text = serde_json::to_vec(&kept)?;
        if text.len() as u64 > MOST_BYTES {
            // Nobody would read it.
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let number = self.scratch.fetch_add(1, Ordering::Relaxed);
        let scratch = self.dir.join(format!(".new-{}-{number}", std::process::id()));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
        let written = file.write_all(&text);
        let named = written.and_then(|()| fs::rename(&scratch, self.path(reference, platform)));
        if named.is_err() {
            // The error is told; a rest is swept at the next start.
            let _ = fs::remove_file(&scratch);
        }
        self.thin_out();
        named
    }

    fn thin_out(&self) {
        let facts = |entry: fs::DirEntry| {
            let meta = entry.metadata().ok()?;
            Some((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), entry.path()))
        };
        let mut aged: Vec<_> = fs::read_dir(&self.dir).into_iter().flatten().flatten().filter_map(facts).collect();
        let mut bytes: u64 = aged.iter().map(|(_, len, _)| len).sum();
        let mut count = aged.len();
        if count <= MOST && bytes <= MOST_TOTAL {
            return;
        }
        aged.sort();
        // Some more than needed, so that this is not done every time.
        for (_, len, path) in aged {
            if count <= MOST / 8 * 7 && bytes <= MOST_TOTAL / 8 * 7 {
                break;
            }
            let _ = fs::remove_file(path);
            (count, bytes) = (count - 1, bytes.saturating_sub(len));
        }
    }

    fn path(&self, reference: &Reference, platform: Option<&Platform>) -> PathBuf {
        self.dir.join(Self::key(reference, platform).to_string())
    }
}

fn platform_text(platform: Option<&Platform>) -> String {
    platform.map_or_else(String::new, ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::How;

    fn resolved(reference: &str) -> Resolved {
        let text = format!(r#"{{"config": {{"digest": "sha256:{}", "size": 1}}, "layers": []}}"#, Digest([1; 32]));
        let digest = sha256(text.as_bytes()).to_string();
        let link = Link { how: How::Named, digest, content_type: None, platform: None, text };
        Resolved::of_links(&reference.parse().unwrap(), vec![link]).unwrap()
    }

    #[test]
    fn what_is_kept_is_found_for_the_same_question_only() {
        let dir = tempfile::tempdir().unwrap();
        let references = References::new(dir.path().join("references"));
        let arm: Platform = "linux/arm64".parse().unwrap();
        let one = resolved("r.example/a:1");
        assert!(references.find(&one.reference, None).is_none());

        references.keep(&one, None);

        let again = References::new(dir.path().join("references"));
        let found = again.find(&one.reference, None).unwrap();
        assert_eq!((found.manifest_digest, found.head()), (one.manifest_digest, one.head()));
        assert!(again.find(&one.reference, Some(&arm)).is_none());
        assert!(again.find(&"r.example/a:2".parse().unwrap(), None).is_none());
    }

    #[test]
    fn a_damaged_file_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let references = References::new(dir.path().to_owned());
        let (one, other) = (resolved("r.example/a:1"), resolved("r.example/b:1"));
        references.keep(&one, None);
        let path = references.path(&one.reference, None);
        let sound = fs::read_to_string(&path).unwrap();
        for text in ["", "{}", &sound.replace("layers", "Layers"), &sound.replace("r.example/a", "r.example/c")] {
            fs::write(&path, text).unwrap();
            assert!(references.find(&one.reference, None).is_none(), "{text}");
        }
        fs::write(references.path(&other.reference, None), sound).unwrap();
        assert!(references.find(&other.reference, None).is_none(), "that is another one's");
    }

    #[test]
    fn there_are_not_ever_more_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let references = References::new(dir.path().to_owned());
        for number in 0..MOST {
            fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        let one = resolved("r.example/a:1");
        references.keep(&one, None);
        assert!(fs::read_dir(dir.path()).unwrap().count() <= MOST);
        assert!(references.find(&one.reference, None).is_some(), "the newest stays");
    }
}
