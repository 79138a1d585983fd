use std::sync::{Arc, RwLock};

use crate::base::{BlobId, ByteRange};
use crate::source::{BlobSource, Verdict};

/// Most attempts to get right bytes of a range.
const MOST_TRIES: usize = 8;

/// Most sources one device keeps; the oldest is forgotten for a fifth.
const MOST: usize = 4;

/// Where one device's bytes can be had, best first. Never empty.
///
/// Every image that shares the blob brings a source. The newest is asked first, because it was
/// named by somebody who wants bytes now; the others stay, because it may be wrong.
pub(super) struct Sources(RwLock<Vec<Arc<dyn BlobSource>>>);

impl Sources {
    pub(super) fn new(source: Arc<dyn BlobSource>) -> Self {
        Self(RwLock::new(vec![source]))
    }

    /// Puts `source` before all others, in place of its older self if there is one.
    pub(super) fn add(&self, source: Arc<dyn BlobSource>) {
        let name = source.describe();
        let mut sources = self.0.write().unwrap();
        sources.retain(|known| known.describe() != name);
        sources.insert(0, source);
        sources.truncate(MOST);
    }

    /// All of them at this moment.
    pub(super) fn all(&self) -> Vec<Arc<dyn BlobSource>> {
        self.0.read().unwrap().clone()
    }

    /// How often bytes may come and be wrong before there is nobody left to ask: once for each place, and twice in any case, because
    /// what lies between may have damaged them.
    pub(super) fn tries(&self) -> usize {
        self.0.read().unwrap().iter().map(|source| source.places()).sum::<usize>().clamp(2, MOST_TRIES)
    }

    /// Tells all of them what became of the bytes at `stored` that came last.
    pub(super) fn judged(&self, blob: &BlobId, stored: ByteRange, verdict: Verdict) {
        self.0.read().unwrap().iter().for_each(|source| source.judged(blob, stored, verdict));
    }

    /// What to call the best one in messages.
    pub(super) fn describe(&self) -> String {
        self.0.read().unwrap().first().map(|source| source.describe()).unwrap_or_default()
    }

    /// Puts `source` behind all others, because it will not have the blob next time either.
    pub(super) fn demote(&self, source: &Arc<dyn BlobSource>) {
        let mut sources = self.0.write().unwrap();
        if let Some(at) = sources.iter().position(|known| Arc::ptr_eq(known, source)) {
            sources[at..].rotate_left(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::base::{BlobId, ByteRange};
    use crate::source::{BoxFuture, ReadCtx, SourceError};

    struct Named(&'static str);

    impl BlobSource for Named {
        fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
            unreachable!("nobody asks")
        }

        fn read<'a>(&'a self, _: &'a BlobId, _: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            unreachable!("nobody asks")
        }

        fn describe(&self) -> String {
            self.0.to_owned()
        }
    }

    fn names(sources: &Sources) -> String {
        sources.all().iter().map(|source| source.describe()).collect()
    }

    #[test]
    fn the_newest_is_first_and_replaces_its_older_self() {
        let sources = Sources::new(Arc::new(Named("a")));
        for (name, want) in [("b", "ba"), ("a", "ab"), ("c", "cab"), ("d", "dcab"), ("e", "edca"), ("c", "ceda")] {
            sources.add(Arc::new(Named(name)));
            assert_eq!((names(&sources), sources.describe()), (want.to_owned(), name.to_owned()));
        }
    }

    #[test]
    fn a_demoted_source_is_asked_last_and_a_forgotten_one_changes_nothing() {
        let sources = Sources::new(Arc::new(Named("a")));
        ["b", "c"].into_iter().for_each(|name| sources.add(Arc::new(Named(name))));
        let all = sources.all();

        sources.demote(&all[1]);
        assert_eq!(names(&sources), "cab");
        sources.demote(&all[0]);
        assert_eq!(names(&sources), "abc");
        sources.demote(&(Arc::new(Named("a")) as Arc<dyn BlobSource>));
        assert_eq!(names(&sources), "abc");
    }
}
