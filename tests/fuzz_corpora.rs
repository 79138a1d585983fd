//! The bodies of the fuzz targets on a stable compiler: every committed seed, and seeded mutations
//! of the seeds. The long runs, which learn from what they reach, are made by `fuzz/run`;
//! `RAFSD_MUTATIONS=1000000` makes this one longer.
//!
//! `RAFSD_WRITE_SEEDS=1 cargo test --test fuzz_corpora` writes the seeds anew.

#[path = "../fuzz/bodies/mod.rs"]
mod bodies;
#[path = "fuzz_corpora/fuse_server.rs"]
mod fuse_server;
#[path = "fuzz_corpora/seeds.rs"]
mod seeds;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rafsd::build::lift;
use rafsd::image::Image;
use rafsd::image::v5::Bootstrap;
use support::tree::Random;

/// Mutations of all seeds of one target together.
const MUTATIONS: u64 = 4000;
/// Longest that one input may take in a build without optimisation.
const PATIENCE: Duration = Duration::from_secs(5);

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// Seeds by name.
fn corpus(target: &str) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder(target)).unwrap().map(|entry| entry.unwrap());
    files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect()
}

/// Runs `body` on the corpus of `target` and on mutations of it.
#[track_caller]
fn check(target: &str, body: fn(&[u8])) {
    let seeds = corpus(target);
    assert!(seeds.len() >= 3, "{} seeds of {target}", seeds.len());
    let inputs: Vec<&[u8]> = seeds.values().map(Vec::as_slice).collect();
    let mut random = Random::new(target.bytes().map(u64::from).sum());
    for (name, input) in &seeds {
        run(target, name, body, input);
    }
    let mutations = std::env::var("RAFSD_MUTATIONS").map_or(MUTATIONS, |text| text.parse().expect("a number"));
    for number in 0..mutations {
        let input = mutate(&mut random, &inputs);
        run(target, &format!("mutation {number}"), body, &input);
    }
}

/// A panic inside names the input; the sequence of inputs is the same every time.
fn run(target: &str, name: &str, body: fn(&[u8]), input: &[u8]) {
    let clock = Instant::now();
    let ended = std::panic::catch_unwind(|| body(input));
    assert!(ended.is_ok(), "target {target}: {name}, {} bytes, breaks it", input.len());
    assert!(clock.elapsed() < PATIENCE, "target {target}: {name} took {:?}", clock.elapsed());
}

/// One to four changes of one seed, as a fuzzer makes them.
fn mutate(random: &mut Random, seeds: &[&[u8]]) -> Vec<u8> {
    let pick = |random: &mut Random, limit: usize| usize::try_from(random.below(limit.max(1) as u64)).unwrap();
    let mut input = seeds[pick(random, seeds.len())].to_vec();
    for _ in 0..=random.below(4) {
        let at = pick(random, input.len());
        let Some(byte) = input.get_mut(at) else { break };
        match random.below(7) {
            0 | 1 => *byte ^= 1 << random.below(8),
            2 => *byte = [0, 1, 0x7f, 0x80, 0xff, b'0', b'\n', b'='][pick(random, 8)],
            3 => {
                let word = [0, 1, u64::MAX, 1 << 63, 0x1000, random.next()][pick(random, 6)].to_le_bytes();
                let width = 1 << random.below(4);
                let end = (at + width).min(input.len());
                input[at..end].copy_from_slice(&word[..end - at]);
            }
            4 => input.truncate(at),
            5 => {
                let len = pick(random, 64).min(input.len() - at);
                input.drain(at..at + len);
            }
            _ => {
                let other = seeds[pick(random, seeds.len())];
                let from = pick(random, other.len());
                let piece = other[from..].iter().take(pick(random, 600)).copied().collect::<Vec<_>>();
                input.splice(at..at, piece);
            }
        }
    }
    input
}

#[test]
fn bootstraps_of_any_bytes_are_read_or_refused() {
    check("bootstrap", bodies::bootstrap::run);
}

#[test]
fn blob_tables_of_any_bytes_are_read_or_refused() {
    check("blob_meta", bodies::blob_meta::run);
}

#[test]
fn archives_of_any_bytes_are_read_or_refused() {
    check("tar", bodies::tar::run);
}

#[test]
fn stored_bytes_of_any_kind_are_decoded_or_refused() {
    check("codec", bodies::codec::run);
}

#[test]
fn files_of_any_bytes_give_their_parts_or_are_refused() {
    check("toc", bodies::toc::run);
}

#[test]
fn lists_of_any_bytes_are_read_or_refused() {
    check("lists", bodies::lists::run);
}

#[test]
fn what_registries_send_of_any_bytes_is_read_or_refused() {
    check("oci", bodies::oci::run);
}

#[test]
fn version_5_bootstraps_of_any_bytes_are_lifted_or_refused() {
    check("rafs5", bodies::rafs5::run);
}

#[test]
fn requests_of_any_bytes_are_understood_or_refused() {
    check("fuse_wire", |input| {
        bodies::fuse_wire::run(input);
    });
}

/// Without this the mutations would be of garbage and prove little.
#[test]
fn seeds_are_accepted_by_their_parsers() {
    if std::env::var_os("RAFSD_WRITE_SEEDS").is_some() {
        for (target, fresh) in seeds::all() {
            fs::create_dir_all(folder(target)).unwrap();
            for (name, input) in fresh {
                fs::write(folder(target).join(name), input).unwrap();
            }
        }
    }
    for (name, input) in corpus("bootstrap") {
        let image = Image::parse(bodies::bootstrap::unpack(&input)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut walk = image.walk();
        while let Some(visit) = walk.next_visit() {
            visit.unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
    for (name, input) in corpus("rafs5") {
        let bytes = bodies::bootstrap::unpack(&input);
        let lifted = Bootstrap::parse(&bytes).map_err(Into::into).and_then(|image| lift(&image));
        lifted.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for (name, input) in corpus("blob_meta") {
        bodies::blob_meta::tables(&input).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for (name, input) in corpus("tar") {
        bodies::tar::read(&input).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for (name, input) in corpus("toc") {
        let parts = bodies::toc::parts(&input).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!parts.is_empty(), "{name}");
    }
    for (name, input) in corpus("lists") {
        assert!(bodies::lists::read(&input), "{name}");
    }
    for (name, input) in corpus("oci") {
        assert!(bodies::oci::read(&input), "{name}");
    }
    for (name, input) in corpus("fuse_wire") {
        assert!(bodies::fuse_wire::run(&input), "{name}");
    }
    for (name, input) in corpus("codec") {
        assert!(bodies::codec::decode(&input).is_ok(), "{name}");
    }
}
