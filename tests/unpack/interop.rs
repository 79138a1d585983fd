//! Images made by Nydus's own builder, unpacked. See `tests/interop.rs` for where they are looked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rafsd::tools::unpack::{UnpackOptions, to_directory};

use crate::fixture::{Fixture, unable_to_own};
use crate::support::skip;

const IMAGES: [&str; 8] =
    ["v6-none", "v6-zstd", "v6-lz4_block", "v6-sha256-1m", "v6-prefetch", "v6-tar", "v6-merged", "v6-dict"];

#[test]
fn images_of_nydus_unpack_to_what_their_listing_says() {
    let test = "images_of_nydus_unpack_to_what_their_listing_says";
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/interop");
    let folder = std::env::var_os("RAFSD_INTEROP").map_or(default, PathBuf::from);
    if !folder.is_dir() {
        return skip(test, "no images of other builders here");
    }
    if let Some(why) = unable_to_own() {
        return skip(test, why);
    }
    for name in IMAGES {
        let (fixture, image) = (Fixture::new(), folder.join(name));
        let files = fixture.open(&image).unwrap_or_else(|error| panic!("{name}: {error:?}"));

        let unpacked = to_directory(&files, &fixture.path("new"), UnpackOptions::default(), &());

        unpacked.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let listing =
            Command::new("python3").arg(folder.join("listtree.py")).arg(fixture.path("new")).output().unwrap();
        assert!(listing.status.success(), "{name}: {}", String::from_utf8_lossy(&listing.stderr));
        let want = fs::read_to_string(folder.join(fs::read_to_string(image.join("expect")).unwrap().trim())).unwrap();
        let got = String::from_utf8(listing.stdout).unwrap();
        let cut = |line: &str| line.chars().take(300).collect::<String>();
        for (want, got) in want.lines().zip(got.lines()) {
            assert!(want == got, "{name} differs:\n- {}\n+ {}", cut(want), cut(got));
        }
        assert!(want.lines().count() > 10 && want.lines().count() == got.lines().count(), "{name}");
    }
}
