//! Layers merged into one image: what overlayfs shows of the same layers, and what is refused.

mod support;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use rafsd::base::{BlobId, Digest};
use rafsd::build::{self, BlobFacts, BuildError, Layer, MergeReport, MergeSpec, MergeVersion, Source, Whiteouts};
use rafsd::image::{Image, Kind};
use support::building::{build, spec};
use support::image::{self, Mounted};
use support::layers::{self, Form, What, every_change};
use support::tree::{Random, set_mtime};
use support::{listing, skip, unable_to_mount};

/// A merge of these bootstraps with everything left as it is by default.
fn merge_spec(layers: &[PathBuf], out: &Path) -> MergeSpec {
    MergeSpec {
        layers: layers.iter().map(|path| open(path)).collect(),
        parent: None,
        dictionary: None,
        whiteouts: Whiteouts::Oci,
        prefetch: None,
        facts: Vec::new(),
        version: MergeVersion::V6,
        out: out.to_owned(),
    }
}

fn open(path: &Path) -> Layer {
    Layer { name: path.to_owned(), image: Image::open(path).unwrap(), id: None }
}

fn merge(layers: &[PathBuf], out: &Path) -> Result<MergeReport, BuildError> {
    build::merge(merge_spec(layers, out), &())
}

/// A directory in which layers are written, built and merged.
struct Workshop {
    dir: tempfile::TempDir,
    blobs: Vec<PathBuf>,
}

impl Workshop {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), blobs: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Builds `source` as the layer called `name` and returns its bootstrap.
    fn layer(&mut self, source: &Path, name: &str) -> PathBuf {
        let out = self.path(name);
        let mut spec = spec(Source::open(source).unwrap(), &out);
        spec.threads = NonZeroUsize::MIN;
        let report = build::build(spec, &()).unwrap();
        self.blobs.extend(report.blobs.iter().map(|blob| PathBuf::from(&blob.path)));
        report.bootstrap.into()
    }

    /// Builds a layer of regular files.
    fn files(&mut self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let source = self.path(&format!("{name}.source"));
        for (path, content) in files {
            let path = source.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        fs::create_dir_all(&source).unwrap();
        self.layer(&source, name)
    }

    /// What the kernel shows of a bootstrap whose blobs were all made here.
    fn listing(&self, bootstrap: &Path) -> Vec<listing::Line> {
        let image = Image::open(bootstrap).unwrap();
        let devices: Vec<PathBuf> = image.devices().iter().map(|device| self.device(&device.blob)).collect();
        let at = self.path("mnt");
        fs::create_dir_all(&at).unwrap();
        let mounted = Mounted::new(bootstrap, &devices, &at).unwrap();
        listing::of(mounted.path()).unwrap()
    }

    fn device(&self, id: &BlobId) -> PathBuf {
        let device = self.path(&format!("device-{id}"));
        if !device.exists() {
            let blob = self.blobs.iter().find(|path| path.ends_with(id.as_str())).expect("a blob of this workshop");
            image::expand(blob, &device).unwrap();
        }
        device
    }

    /// Writes `layers` in both forms, merges each, and compares with what overlayfs shows.
    fn compare(&mut self, name: &str, layers: &[layers::Layer]) {
        let has_sockets = layers.iter().flatten().any(|(_, what)| *what == What::Socket);
        let memory = self.path("trees");
        fs::create_dir_all(&memory).unwrap();
        let memory = Mounted::memory(&memory).unwrap();
        let mut trees = Vec::new();
        let mut built = [Vec::new(), Vec::new()];
        for (number, layer) in layers.iter().enumerate() {
            let seed = number as u64;
            let tree = memory.path().join(format!("{name}-{number}"));
            fs::create_dir(&tree).unwrap();
            layers::write(&tree, layer, Form::Overlayfs, seed).unwrap();
            built[0].push(self.layer(&tree, &format!("{name}-{number}.boot")));
            trees.push(tree);
            if has_sockets {
                // Archives have none, so these layers would be others.
                continue;
            }
            let container = memory.path().join(format!("{name}-{number}.oci"));
            fs::create_dir(&container).unwrap();
            layers::write(&container, layer, Form::Oci, seed).unwrap();
            let archive = memory.path().join(format!("{name}-{number}.tar"));
            layers::pack(&container, &archive);
            built[1].push(self.layer(&archive, &format!("{name}-{number}.oci-boot")));
        }
        let at = self.path("overlay");
        fs::create_dir_all(&at).unwrap();
        let want = listing::of_overlay(Mounted::overlay(&trees, &at).unwrap().path()).unwrap();
        let out = self.path(&format!("{name}.merged"));
        for (form, bootstraps) in [Whiteouts::Overlayfs, Whiteouts::Oci].into_iter().zip(&built) {
            if bootstraps.is_empty() {
                continue;
            }
            let spec = MergeSpec { whiteouts: form, ..merge_spec(bootstraps, &out) };
            build::merge(spec, &()).unwrap();
            listing::assert_same(&want, &self.listing(&out));
        }
    }
}

#[test]
fn three_layers_with_every_change_of_kind_merge_as_overlayfs_shows_them() {
    if let Some(why) = unable_to_mount() {
        return skip("three_layers_with_every_change_of_kind_merge_as_overlayfs_shows_them", why);
    }
    for sockets in [false, true] {
        let layers = every_change(sockets);
        let names = layers[0].iter().filter(|(path, _)| !path.contains(&b'/')).count();
        assert!(names > 11 * 12 * 12, "{names}");
        Workshop::new().compare("every", &layers);
    }
}

#[test]
fn random_stacks_merge_as_overlayfs_shows_them() {
    if let Some(why) = unable_to_mount() {
        return skip("random_stacks_merge_as_overlayfs_shows_them", why);
    }
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let count = 2 + random.below(4);
        let layers: Vec<_> = (0..count).map(|_| layers::random(&mut random, 40)).collect();
        Workshop::new().compare(&format!("seed-{seed}"), &layers);
    }
}

#[test]
fn a_hundred_and_thirty_layers_merge_as_overlayfs_shows_them() {
    if let Some(why) = unable_to_mount() {
        return skip("a_hundred_and_thirty_layers_merge_as_overlayfs_shows_them", why);
    }
    let mut random = Random::new(130);
    let layers: Vec<_> = (0..130).map(|_| layers::random(&mut random, 6)).collect();
    Workshop::new().compare("l", &layers);
}

#[test]
fn marks_of_the_lowest_layer_and_leftovers_of_aufs_vanish() {
    let mut shop = Workshop::new();
    let lowest = [
        ("keep", "1"),
        (".wh.gone", ""),
        (".wh..wh.plnk/x", "1"),
        (".wh..wh.aufs", ""),
        ("d/.wh..wh..opq", ""),
        ("d/x", "1"),
        (".wh.", ""),
    ];
    let layers = [shop.files("low", &lowest), shop.files("high", &[("new/.wh.never", ""), ("new/.wh..wh.orph", "")])];
    let out = shop.path("merged");

    merge(&layers, &out).unwrap();

    assert_eq!(paths(&out), ["", "d", "d/x", "keep", "new"]);
}

#[test]
fn a_whiteout_spares_what_its_own_layer_adds() {
    let mut shop = Workshop::new();
    let low = shop.files("low", &[("f", "old"), ("d/old", "1")]);
    let high = shop.files("high", &[(".wh.f", ""), ("f", "new!"), (".wh.d", ""), ("d/new", "1")]);
    let out = shop.path("merged");

    merge(&[low, high], &out).unwrap();

    assert_eq!(paths(&out), ["", "d", "d/new", "f"]);
    let size = |inode: rafsd::image::Inode| (inode.kind, inode.size);
    assert_eq!(find(&Image::open(&out).unwrap(), "f").map(size), Some((Kind::Regular, 4)));
}

#[test]
fn whiteouts_of_another_kind_than_told_are_files() {
    let mut shop = Workshop::new();
    let low = shop.files("low", &[("f", "old")]);
    let high = shop.files("high", &[(".wh.f", "")]);
    for whiteouts in [Whiteouts::None, Whiteouts::Overlayfs] {
        let out = shop.path("merged");
        let spec = MergeSpec { whiteouts, ..merge_spec(&[low.clone(), high.clone()], &out) };
        build::merge(spec, &()).unwrap();
        assert_eq!(paths(&out), ["", ".wh.f", "f"]);
    }
}

#[test]
fn one_layer_merges_into_itself() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let mut random = Random::new(5);
    for i in 0..300 {
        let len = usize::try_from(random.below(9000)).unwrap();
        fs::write(source.join(format!("file-{i}")), random.text(len)).unwrap();
    }
    fs::write(source.join("zeros"), vec![0; 5 << 20]).unwrap();
    fs::hard_link(source.join("file-7"), source.join("file-7-again")).unwrap();
    set_mtime(&source.join("file-1"), -1_000_000_000, 1).unwrap();
    rustix::fs::setxattr(source.join("file-2"), "user.x", b"y", rustix::fs::XattrFlags::empty()).unwrap();
    let report = build(&source, &dir.path().join("out")).unwrap();
    let out = dir.path().join("merged");

    let merged = merge(&[PathBuf::from(&report.bootstrap)], &out).unwrap();

    assert!(fs::read(&out).unwrap() == fs::read(&report.bootstrap).unwrap(), "the same bootstrap, byte for byte");
    assert_eq!((merged.files, merged.hard_links, merged.file_bytes), (301, 1, report.source_bytes));
}

#[test]
fn layers_that_share_a_blob_share_its_row_and_its_chunks() {
    let mut shop = Workshop::new();
    let low = shop.files("low", &[("a", "one"), ("b", "two")]);
    let high = shop.files("high", &[("c", "three")]);
    let out = shop.path("merged");

    let report = merge(&[low.clone(), high, low], &out).unwrap();

    assert_eq!((report.blobs.len(), report.dropped_blobs.len()), (2, 0));
    assert_eq!(Image::open(&out).unwrap().chunk_records().len(), 3);
}

#[test]
fn blobs_that_no_file_needs_are_dropped_and_the_rest_renumbered_by_first_use() {
    let mut shop = Workshop::new();
    let names = ["z", "hidden", "m", "a"];
    let mut layers: Vec<_> = names.iter().map(|name| shop.files(name, &[(name, name)])).collect();
    layers.push(shop.files("top", &[(".wh.hidden", "")]));
    let ids: Vec<_> = layers.iter().flat_map(|path| ids(path)).collect();
    let out = shop.path("merged");

    let report = merge(&layers, &out).unwrap();

    assert_eq!(report.blobs, [&ids[3], &ids[2], &ids[0]].map(ToString::to_string));
    assert_eq!(report.dropped_blobs, [ids[1].to_string()]);
}

#[test]
fn layers_without_data_and_layers_that_differ_in_codec_merge() {
    let mut shop = Workshop::new();
    let empty = shop.files("empty", &[]);
    let first = shop.files("first", &[("a", &"text ".repeat(5000))]);
    let source = shop.path("second.source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("b"), "words ".repeat(5000)).unwrap();
    let mut other = spec(Source::open(&source).unwrap(), &shop.path("second"));
    other.compression = build::Compression::Lz4;
    other.digest = rafsd::format::rafs::DigestAlgorithm::Sha256;
    let second = build::build(other, &()).unwrap();
    shop.blobs.extend(second.blobs.iter().map(|blob| blob.path.clone().into()));
    let out = shop.path("merged");

    let report = merge(&[empty.clone(), first, second.bootstrap.into(), empty.clone()], &out).unwrap();

    let image = Image::open(&out).unwrap();
    let codecs = image.devices().iter().map(|device| (device.entry.compression.get(), device.entry.digest.get()));
    assert_eq!(codecs.collect::<Vec<_>>(), [(3, 0), (1, 1)]);
    // The last layer is the empty one, built with the defaults.
    assert_eq!(image.summary().flags & 0xff, 0x80 | 0x4 | 0x10 | 0x20);
    assert_eq!((report.files, report.blobs.len()), (2, 2));

    let report = merge(&[empty], &out).unwrap();
    assert_eq!((report.blobs.len(), report.bootstrap_bytes), (0, 8192));
}

#[test]
fn a_layer_may_be_given_the_id_that_a_registry_knows() {
    let mut shop = Workshop::new();
    let (low, high) = (shop.files("low", &[("a", "1")]), shop.files("high", &[("b", "2")]));
    let out = shop.path("merged");
    let id: BlobId = "registry".parse().unwrap();
    let mut spec = merge_spec(&[low.clone(), high.clone()], &out);
    spec.layers[1].id = Some(id.clone());
    let digest = Digest([7; 32]);
    let facts = BlobFacts { size: Some(12345), toc_size: Some(1024), toc_digest: Some(digest), ..BlobFacts::about(id) };
    spec.facts = vec![facts];

    build::merge(spec, &()).unwrap();

    let image = Image::open(&out).unwrap();
    let row = &image.devices()[1].entry;
    assert_eq!(image.devices()[1].blob.as_str(), "registry");
    assert_eq!((row.compressed_size.get(), row.toc_size.get(), row.toc_digest), (12345, 1024, [7; 32]));

    let mut spec = merge_spec(std::slice::from_ref(&out), &shop.path("again"));
    spec.layers[0].id = Some("x".parse().unwrap());
    assert_refused(spec, "one blob of its own, this one has 2");
    let mut spec = merge_spec(&[low, high], &shop.path("again"));
    spec.facts = vec![BlobFacts::about("nobody".parse().unwrap())];
    assert_refused(spec, "none of the layers uses blob nobody");
}

#[test]
fn layers_that_cannot_be_one_image_are_refused() {
    let mut shop = Workshop::new();
    let one = shop.files("one", &[("a", "1")]);
    let source = shop.path("one.source");
    let mut small = spec(Source::open(&source).unwrap(), &shop.path("small"));
    small.chunk_size = 4096;
    let small = PathBuf::from(build::build(small, &()).unwrap().bootstrap);
    let out = shop.path("merged");
    assert_refused(merge_spec(&[one.clone(), small], &out), "chunk size 4096, the images before it 1048576");

    // EXPLICIT_UID_GID is bit 4 of the flags at byte 1152.
    let implicit = shop.path("implicit");
    spoil(&one, &implicit, |bytes| bytes[1152] ^= 0x10);
    assert_refused(merge_spec(&[one.clone(), implicit], &out), "explicit owners flag 0, the images before it 1");

    // The stored size of blob 0 is at byte 0x58 of its row at byte 4096.
    let contradicting = shop.path("contradicting");
    spoil(&one, &contradicting, |bytes| bytes[4096 + 0x58] ^= 1);
    assert_refused(merge_spec(&[one.clone(), contradicting], &out), "stored size");

    assert_refused(merge_spec(&[], &out), "nothing to merge");
    assert!(!out.exists());
}

#[test]
fn an_image_has_at_most_254_blobs() {
    let mut shop = Workshop::new();
    let mut layers: Vec<_> =
        (0..255).map(|i| shop.files(&format!("l{i}"), &[(&format!("f{i:03}"), &format!("content {i}"))])).collect();
    let out = shop.path("merged");
    assert_eq!(merge(&layers[..254], &out).unwrap().blobs.len(), 254);
    assert_eq!(Image::open(&out).unwrap().devices().len(), 254);
    fs::remove_file(&out).unwrap();

    assert_refused(merge_spec(&layers, &out), "more than 254 blobs; join layers before");
    assert!(!out.exists());

    // What counts is what is left.
    layers.push(shop.files("top", &[(".wh.f007", "")]));
    assert_eq!(merge(&layers, &out).unwrap().blobs.len(), 254);
}

#[test]
fn wishes_to_prefetch_survive_with_their_paths() {
    let mut shop = Workshop::new();
    let low = shop.files("low", &[("a", "1"), ("b", "2"), ("d/x", "3"), ("empty", "")]);
    let high = shop.files("high", &[("c", "4"), (".wh.b", "")]);
    let prefetched = |bootstrap: &Path, paths: &[&str]| {
        let mut spec = merge_spec(&[bootstrap.to_owned()], bootstrap);
        spec.whiteouts = Whiteouts::None;
        spec.prefetch = Some(paths.iter().map(|path| path.as_bytes().to_vec()).collect());
        assert_eq!(build::merge(spec, &()).unwrap().prefetched_paths, paths.len() as u64);
    };
    prefetched(&low, &["/d", "/b", "/a"]);
    prefetched(&high, &["/c"]);
    let out = shop.path("merged");

    merge(&[low.clone(), high.clone()], &out).unwrap();
    assert_eq!(prefetch(&out), ["d", "a", "c"]);

    // One layer of two asks for everything in the image that it was.
    prefetched(&low, &["/"]);
    merge(&[low.clone(), high.clone()], &out).unwrap();
    assert_eq!(prefetch(&out), ["c"]);
    prefetched(&high, &["/"]);
    merge(&[low.clone(), high.clone()], &out).unwrap();
    assert_eq!(prefetch(&out), [""]);

    let mut spec = merge_spec(&[low, high], &out);
    spec.prefetch = Some(["/none", "/empty", "/c", "/c/", "//d//x"].map(|path| path.as_bytes().to_vec()).to_vec());
    assert_eq!(build::merge(spec, &()).unwrap().prefetched_paths, 2);
    assert_eq!(prefetch(&out), ["c", "d/x"]);
}

/// Layers of another builder with what it made of them. They are not part of the project: the
/// folder is `RAFSD_INTEROP`, or `../shared/interop` beside the checkout.
#[test]
fn layers_of_another_builder_merge_into_the_bytes_that_it_makes_of_them() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/interop");
    let folder = std::env::var_os("RAFSD_INTEROP").map_or(default, PathBuf::from).join("v6-merged");
    if !folder.is_dir() {
        return skip("layers_of_another_builder_merge_into_the_bytes_that_it_makes_of_them", "no images of it");
    }
    let dir = tempfile::tempdir().unwrap();
    let order = fs::read_to_string(folder.join("layers/order")).unwrap();
    let layers: Vec<PathBuf> = order.split_whitespace().map(|id| folder.join("layers").join(id)).collect();
    let out = dir.path().join("merged");

    merge(&layers, &out).unwrap();

    assert!(fs::read(&out).unwrap() == fs::read(folder.join("bootstrap")).unwrap());
}

/// Merges and expects an error that says `reason`.
#[track_caller]
fn assert_refused(spec: MergeSpec, reason: &str) {
    let error = build::merge(spec, &()).expect_err(reason);
    let text = rafsd::base::Chain(&error).to_string();
    assert!(text.contains(reason), "{text}");
}

fn spoil(from: &Path, to: &Path, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(from).unwrap();
    change(&mut bytes);
    fs::write(to, bytes).unwrap();
}

fn ids(bootstrap: &Path) -> Vec<BlobId> {
    Image::open(bootstrap).unwrap().devices().iter().map(|device| device.blob.clone()).collect()
}

/// All paths of an image, sorted.
fn paths(bootstrap: &Path) -> Vec<String> {
    let image = Image::open(bootstrap).unwrap();
    let mut paths: Vec<String> = inodes(&image).into_iter().map(|(path, _)| path).collect();
    paths.sort();
    paths
}

/// The paths that an image wants to have prefetched.
fn prefetch(bootstrap: &Path) -> Vec<String> {
    let image = Image::open(bootstrap).unwrap();
    let all = inodes(&image);
    image.prefetch().map(|nid| all.iter().find(|(_, inode)| inode.nid == nid).unwrap().0.clone()).collect()
}

fn find(image: &Image, path: &str) -> Option<rafsd::image::Inode> {
    inodes(image).into_iter().find(|(other, _)| other == path).map(|(_, inode)| inode)
}

fn inodes(image: &Image) -> Vec<(String, rafsd::image::Inode)> {
    let mut all = Vec::new();
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        let visit = visit.unwrap();
        all.push((String::from_utf8(visit.path.join(&b'/')).unwrap(), visit.inode));
    }
    all
}
