//! Images made by Nydus's own builder, mounted.
//!
//! The images are not part of the project; see `tests/interop.rs` for where they are looked for.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::fixture::Fixture;
use crate::host::{Need, interop};
use crate::{Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[Case {
    name: "images_of_nydus_show_what_their_listing_says",
    needs: &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::Interop, Need::Program("python3")],
    place: Place::Host,
    run: images_of_nydus_show_what_their_listing_says,
}];

/// Native images: one for each compressor, digest and source, with several blobs, with a dictionary.
const IMAGES: [&str; 8] =
    ["v6-none", "v6-zstd", "v6-lz4_block", "v6-sha256-1m", "v6-prefetch", "v6-tar", "v6-merged", "v6-dict"];

fn images_of_nydus_show_what_their_listing_says(ctx: &Ctx) -> Outcome {
    let folder = interop().context("a need of this case")?;
    let fixture = Fixture::files(ctx, 1)?;
    let target = ctx.dir.join("mnt");
    fs::create_dir(&target)?;
    let at = target.to_str().context("UTF-8")?;

    for name in IMAGES {
        let image = folder.join(name);
        let (bootstrap, blobs) = (image.join("bootstrap"), image.join("blobs"));
        let (bootstrap, blobs) = (bootstrap.to_str().context("UTF-8")?, blobs.to_str().context("UTF-8")?);
        fixture.must(&["mount", bootstrap, at, "--blobs", blobs, "--backend", ctx.backend.name()])?;
        let listing = Command::new("python3").arg(folder.join("listtree.py")).arg(&target).output()?;
        fixture.umount(&target)?;

        ensure!(listing.status.success(), "{name}: {}", String::from_utf8_lossy(&listing.stderr));
        let expected = fs::read_to_string(image.join("expect"))?;
        let expected = fs::read(folder.join(expected.trim()))?;
        let lines = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect::<Vec<_>>();
        let (want, got) = (lines(&expected), lines(&listing.stdout));
        let first = want.iter().zip(&got).find(|(want, got)| want != got);
        ensure!(want.len() > 10 && first.is_none() && want.len() == got.len(), "{name} differs: {first:?}");
    }
    fixture.finish()
}
