//! The tree of digests: what is in a file or directory, and nothing about it (`rafs-v5.md` section 8).

use super::Source;
use super::layout::{Layout, index};
use crate::base::Digest;
use crate::blob::digest_of;
use crate::build::tree::Kind;

/// The digest of every path, in the order of [`Layout::paths`].
pub(super) fn digests(source: &Source<'_>, layout: &Layout<'_>) -> Vec<Digest> {
    let mut digests = vec![Digest([0; 32]); layout.paths.len()];
    let mut text = Vec::new();
    // Children have greater numbers than their directory.
    for (at, path) in layout.paths.iter().enumerate().rev() {
        text.clear();
        match &source.tree.node(path.node).kind {
            Kind::Directory(_) => {
                let children = index(path.first_child - 1)..index(path.first_child - 1 + path.children);
                digests[children].iter().for_each(|child| text.extend_from_slice(&child.0));
            }
            Kind::Regular(content) => source.chunks(content).for_each(|chunk| text.extend_from_slice(&chunk.digest.0)),
            Kind::Symlink(target) => text.extend_from_slice(target),
            Kind::Character(_) | Kind::Block(_) | Kind::Fifo | Kind::Socket => {}
        }
        digests[at] = digest_of(source.facts.digest, &text);
    }
    digests
}
