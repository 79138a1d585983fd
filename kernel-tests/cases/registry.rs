//! Images that come from a registry: found, checked, mounted, and served when the registry is not there.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::libc::EIO;
use serde_json::{Value, json};

use super::dockerregistry::{DockerRegistry, PASSWORD, Pusher};
use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
use super::interop::{list, read_listing};
use crate::host::{Need, interop};
use crate::support::{listing, tree};
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Erofs,
    Need::DiskStore,
    Need::Backend,
    Need::Program("docker-registry"),
    Need::Program("htpasswd"),
];

const fn case(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Here, run }
}

const fn only_here(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Host, run }
}

pub(crate) const CASES: &[Case] = &[
    case("an_image_of_a_registry_shows_its_whole_tree", an_image_of_a_registry_shows_its_whole_tree),
    only_here("what_is_known_of_a_registry_is_not_asked_again", what_is_known_of_a_registry_is_not_asked_again),
    Case {
        name: "images_of_nydus_in_a_registry_show_what_their_listing_says",
        needs: &[
            Need::Root,
            Need::Erofs,
            Need::DiskStore,
            Need::Backend,
            Need::Interop,
            Need::Program("docker-registry"),
        ],
        place: Place::Host,
        run: images_of_nydus_in_a_registry_show_what_their_listing_says,
    },
    case("a_registry_that_is_gone_spares_what_is_here", a_registry_that_is_gone_spares_what_is_here),
    only_here("a_registry_with_a_password_wants_it", a_registry_with_a_password_wants_it),
    only_here("an_index_and_a_referrer_lead_to_the_rafs_image", an_index_and_a_referrer_lead_to_the_rafs_image),
    only_here(
        "an_image_gets_no_blob_that_its_manifest_does_not_name",
        an_image_gets_no_blob_that_its_manifest_does_not_name,
    ),
    only_here("a_pulled_image_needs_no_registry", a_pulled_image_needs_no_registry),
    only_here("many_starters_of_one_image_fetch_it_once", many_starters_of_one_image_fetch_it_once),
];

/// The repository of most cases.
const REPOSITORY: &str = "team/app";

fn text(path: &std::path::Path) -> anyhow::Result<&str> {
    path.to_str().context("UTF-8")
}

/// Mounts `reference` at a new directory `name`; the error text if it is refused.
fn try_mount(
    fixture: &Fixture<'_>,
    reference: &str,
    name: &str,
    options: &[&str],
) -> anyhow::Result<Result<PathBuf, String>> {
    let dir = fixture.ctx.dir.join(name);
    fs::create_dir_all(&dir)?;
    let fixed = ["mount", reference, text(&dir)?, "--backend", fixture.ctx.backend.name()];
    let output = fixture.command(&[&fixed[..], options].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(if output.status.success() { Ok(dir) } else { Err(said) })
}

/// The same; an error if it is refused.
fn mount(fixture: &Fixture<'_>, reference: &str, name: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
    let mounted = try_mount(fixture, reference, name, options)?;
    mounted.map_err(|said| anyhow::anyhow!("{said}{}", fixture.log()))
}

fn reference(registry: &DockerRegistry, tag: &str) -> String {
    format!("docker://{}/{REPOSITORY}{tag}", registry.host())
}

/// `rafsd ARGS`, which must fail with a text in which all of these are.
fn ensure_refused(fixture: &Fixture<'_>, args: &[&str], texts: &[&str]) -> anyhow::Result<()> {
    let output = fixture.command(args)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    ensure!(!output.status.success(), "rafsd {}: not refused", args.join(" "));
    ensure!(texts.iter().all(|text| said.contains(text)), "rafsd {}: {said}", args.join(" "));
    Ok(())
}

fn an_image_of_a_registry_shows_its_whole_tree(ctx: &Ctx) -> Outcome {
    let registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    let manifest = registry.pusher()?.image(REPOSITORY, Some("1"), &ctx.dir.join("image"))?;

    let dir = mount(&fixture, &reference(&registry, ":1"), "mnt", &[])?;

    let (shown, expected) = (listing::of(&dir)?, listing::of(&fixture.source())?);
    ensure!(shown == expected, "{}", listing::diff(&expected, &shown));
    ensure!(fixture.server.stats().fetches().is_empty(), "the other server was asked");
    let listed = fixture.list()?;
    let digest = manifest["digest"].as_str().context("a digest")?;
    ensure!(format!("sha256:{}", listed[0]["manifest"].as_str().unwrap_or_default()) == digest, "{listed:?}");
    ensure!(listed[0]["reference"] == format!("{}/{REPOSITORY}:1", registry.host()), "{listed:?}");
    fixture.umount(&dir)?;
    let dir = mount(&fixture, &reference(&registry, &format!("@{digest}")), "mnt", &[])?;
    ensure!(listing::of(&dir)? == expected, "by digest");
    fixture.finish()
}

/// Both versions of RAFS, several blobs, and data in a gzip layer of the ordinary image.
fn images_of_nydus_in_a_registry_show_what_their_listing_says(ctx: &Ctx) -> Outcome {
    let folder = interop(ctx.in_guest).context("a need of this case")?;
    let registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let fixture = Fixture::files(ctx, 1)?;
    let pusher = registry.pusher()?;
    for name in ["v6-zstd", "v5-zstd", "v6-merged", "v6-zran"] {
        let image = folder.join(name);
        if name == "v6-zran" {
            let about = digest_of(&pusher.blob(REPOSITORY, &fs::read(image.join("layer.tar.gz"))?)?)?;
            pusher.document(REPOSITORY, Some(name), &pusher.manifest_about(REPOSITORY, &image, Some(&about))?)?;
            let said = fixture.must(&["resolve", &reference(&registry, ":v6-zran")])?;
            ensure!(said.contains("data in the layers of the ordinary image") && said.contains(&about), "{said}");
        } else {
            pusher.image(REPOSITORY, Some(name), &image)?;
        }

        let dir = mount(&fixture, &reference(&registry, &format!(":{name}")), "mnt", &[])?;
        let got = list(&dir).with_context(|| name.to_owned());
        fixture.umount(&dir)?;

        let (got, listing) = (got?, fs::read_to_string(image.join("expect"))?);
        let want = read_listing(&folder.join(listing.trim()))?;
        let first = want.iter().zip(&got).find(|(want, got)| want != got);
        ensure!(want.len() > 10 && first.is_none() && want.len() == got.len(), "{name} differs: {first:?}");
    }
    fixture.finish()
}

fn what_is_known_of_a_registry_is_not_asked_again(ctx: &Ctx) -> Outcome {
    let mut registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let mut fixture = Fixture::files(ctx, 1)?;
    let manifest = registry.pusher()?.image(REPOSITORY, Some("1"), &ctx.dir.join("image"))?;
    let tag = reference(&registry, ":1");
    let pinned = reference(&registry, &format!("@{}", manifest["digest"].as_str().context("a digest")?));
    for reference in [&tag, &pinned] {
        let dir = mount(&fixture, reference, "mnt", &["--prefetch=none"])?;
        ensure!(fs::read(dir.join("0"))? == content(0, FILE));
        fixture.umount(&dir)?;
    }
    registry.stop();
    fixture.restart(&[])?;

    // Who wants to have what a tag leads to now is refused, and told what there is.
    for command in ["pull", "resolve"] {
        ensure_refused(&fixture, &[command, &tag], &["--offline", &registry.host()])?;
    }
    for (reference, options, is_unsure) in [(&pinned, &[][..], false), (&tag, &["--offline"], false), (&tag, &[], true)]
    {
        let began = Instant::now();
        let dir = ctx.dir.join("mnt");
        let fixed = ["mount", reference, text(&dir)?, "--backend", ctx.backend.name(), "--json"];
        let output = fixture.command(&[&fixed[..], options].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{reference} {options:?}: {said}{}", fixture.log());
        ensure!(began.elapsed() < Duration::from_secs(20), "{reference} took {:?}", began.elapsed());
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(
            report["unconfirmed"].as_str().is_some_and(|why| why.contains(&registry.host())) == is_unsure,
            "{report}"
        );
        ensure!(said.contains("warning: this is what") == is_unsure, "{said}");
        drop_caches()?;
        ensure!(fs::read(dir.join("0"))? == content(0, FILE));
        fixture.umount(&dir)?;
    }
    let unknown = reference(&registry, ":2");
    ensure_refused(&fixture, &["resolve", &unknown, "--offline"], &["nothing is kept of"])?;
    fixture.finish()
}

fn a_registry_that_is_gone_spares_what_is_here(ctx: &Ctx) -> Outcome {
    let mut registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let mut fixture = Fixture::files(ctx, 3)?;
    registry.pusher()?.image(REPOSITORY, Some("1"), &ctx.dir.join("image"))?;
    fixture.restart(&["--deadline", "4s", "--flush-every", "10ms"])?;
    let dir = mount(&fixture, &reference(&registry, ":1"), "mnt", &["--prefetch=none"])?;
    let byte = || read_byte(&dir.join("0"), 0) == Ok(content(0, FILE)[0]);
    // One byte, so that nothing is read ahead.
    ensure!(byte(), "before");
    registry.stop();

    // What came is here for a successor once it is on the disk, a hundred flushes later at the latest.
    std::thread::sleep(Duration::from_secs(1));
    fixture.kill()?;
    fixture.start(&["--deadline", "4s"])?;
    drop_caches()?;

    ensure!(byte(), "what is here");
    let began = Instant::now();
    ensure!(read_byte(&dir.join("1"), 2 << 20) == Err(Some(EIO)), "what is not here");
    ensure!(began.elapsed() < Duration::from_secs(15), "it took {:?}", began.elapsed());
    registry.start_again()?;
    let until = Instant::now() + Duration::from_secs(60);
    while read_byte(&dir.join("1"), 2 << 20).is_err() {
        ensure!(Instant::now() < until, "it does not recover: {}", fixture.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(fs::read(dir.join("1"))? == content(1, FILE) && fs::read(dir.join("2"))? == content(2, FILE));
    fixture.finish()
}

fn a_registry_with_a_password_wants_it(ctx: &Ctx) -> Outcome {
    let registry = DockerRegistry::start(&ctx.dir.join("registry"), true)?;
    let mut fixture = Fixture::files(ctx, 1)?;
    registry.pusher()?.image(REPOSITORY, Some("1"), &ctx.dir.join("image"))?;
    let docker = ctx.dir.join("docker");
    fs::create_dir(&docker)?;
    let set = |text: &str| fs::write(docker.join("config.json"), text);
    set("{}")?;
    fixture.set_environment("DOCKER_CONFIG", text(&docker)?.to_owned());
    // A registry on this very host is taken to speak plain HTTP unless somebody says otherwise.
    let hosts = ctx.dir.join("hosts");
    let own = hosts.join(registry.host().replace(':', "_") + "_");
    fs::create_dir_all(&own)?;
    fs::write(own.join("hosts.toml"), format!("server = \"https://{}\"\n", registry.host()))?;
    fixture.restart(&["--hosts-dir", text(&hosts)?])?;
    let (name, ca) = (reference(&registry, ":1"), registry.ca());
    let trusting = ["--ca", text(&ca)?];

    let said = try_mount(&fixture, &name, "mnt", &[])?.err().context("it speaks TLS, and nobody vouches for it")?;
    ensure!(said.contains(&registry.host()), "{said}");
    let said = try_mount(&fixture, &name, "mnt", &trusting)?.err().context("nobody's request was granted")?;
    ensure!(said.contains("credentials"), "{said}");
    set(&registry.docker_config("the wrong one"))?;
    let said = try_mount(&fixture, &name, "mnt", &trusting)?.err().context("a wrong password was good enough")?;
    ensure!(said.contains("credentials") && !said.contains("the wrong one"), "{said}");
    set(&registry.docker_config(PASSWORD))?;
    // A refusal is believed for a moment, ten seconds at most, so that nobody is asked in bursts.
    let until = Instant::now() + Duration::from_secs(30);
    let dir = loop {
        match try_mount(&fixture, &name, "mnt", &trusting)? {
            Ok(dir) => break dir,
            Err(said) => ensure!(Instant::now() < until, "the right password is refused: {said}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    ensure!(fs::read(dir.join("0"))? == content(0, FILE));
    let told = fixture.must(&[&["resolve", &name][..], &trusting].concat())?;
    ensure!(told.contains("alice") && told.contains("can be mounted"), "{told}");

    let everything = fixture.log() + &told + &fixture.must(&["list", "--json"])?;
    ensure!(!everything.contains(PASSWORD), "the password was told");
    fixture.finish()
}

/// The merged form, the referrer form, and what is no RAFS image.
fn an_index_and_a_referrer_lead_to_the_rafs_image(ctx: &Ctx) -> Outcome {
    let registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let fixture = Fixture::files(ctx, 1)?;
    let pusher = registry.pusher()?;
    let ordinary = pusher.ordinary(REPOSITORY)?;
    let plain = pusher.document(REPOSITORY, Some("plain"), &ordinary)?;
    let rafs = pusher.manifest(REPOSITORY, &ctx.dir.join("image"), true)?;
    let lazy = pusher.document(REPOSITORY, None, &rafs)?;
    let entry = |mut descriptor: Value, artifact: Option<&str>| {
        descriptor["platform"] = json!({"os": "linux", "architecture": std_architecture()});
        artifact.into_iter().for_each(|it| descriptor["artifactType"] = it.into());
        descriptor
    };
    let marked = entry(lazy.clone(), Some("application/vnd.nydus.image.manifest.v1+json"));
    push_index(&pusher, "both", vec![entry(plain.clone(), None), marked])?;

    let plain_name = reference(&registry, ":plain");
    ensure_refused(&fixture, &["resolve", &plain_name], &["an ordinary OCI image", "nydusify convert"])?;
    let said = try_mount(&fixture, &plain_name, "mnt", &[])?.err().context("it is an ordinary image")?;
    ensure!(said.contains("an ordinary OCI image") && said.contains("nydusify convert"), "{said}");
    let both = reference(&registry, ":both");
    let report: Value = serde_json::from_str(&fixture.must(&["resolve", &both, "--json"])?)?;
    ensure!(report["documents"][1]["how"] == "marked" && report["layers"][1]["role"] == "bootstrap", "{report}");
    ensure!(report["problem"].is_null() && report["layout"] == "native", "{report}");
    let dir = mount(&fixture, &both, "mnt", &[])?;
    ensure!(fs::read(dir.join("0"))? == content(0, FILE));
    fixture.umount(&dir)?;
    ensure_refused(&fixture, &["resolve", &both, "--platform", "linux/s390x"], &["nothing for linux/s390x"])?;

    // This registry has no interface for referrers, so that a tag stands in for it.
    let subject = digest_of(&plain)?;
    let mut referring = rafs;
    referring["subject"] = plain;
    let referring = pusher.document(REPOSITORY, None, &referring)?;
    push_index(&pusher, &subject.replace(':', "-"), vec![referring])?;
    let dir = mount(&fixture, &plain_name, "mnt", &[])?;
    ensure!(fs::read(dir.join("0"))? == content(0, FILE));
    let report: Value = serde_json::from_str(&fixture.must(&["resolve", &plain_name, "--json"])?)?;
    ensure!(report["documents"][1]["how"] == "refers", "{report}");
    fixture.finish()
}

fn std_architecture() -> String {
    rafsd::oci::Platform::here().architecture
}

fn digest_of(descriptor: &Value) -> anyhow::Result<String> {
    Ok(descriptor["digest"].as_str().context("a digest")?.to_owned())
}

fn push_index(pusher: &Pusher<'_>, tag: &str, manifests: Vec<Value>) -> anyhow::Result<()> {
    let kind = "application/vnd.oci.image.index.v1+json";
    pusher.document(REPOSITORY, Some(tag), &json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests}))?;
    Ok(())
}

/// Two tenants of one cache, the second of whom knows the bootstrap of the first.
fn an_image_gets_no_blob_that_its_manifest_does_not_name(ctx: &Ctx) -> Outcome {
    let registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let fixture = Fixture::files(ctx, 1)?;
    let pusher = registry.pusher()?;
    let image = ctx.dir.join("image");
    pusher.image(REPOSITORY, Some("1"), &image)?;
    let first = mount(&fixture, &reference(&registry, ":1"), "first", &["--prefetch"])?;
    ensure!(fs::read(first.join("0"))? == content(0, FILE));

    let stolen = pusher.manifest("other/app", &image, false)?;
    pusher.document("other/app", Some("1"), &stolen)?;
    let name = format!("docker://{}/other/app:1", registry.host());
    let said = try_mount(&fixture, &name, "second", &[])?.err().context("its manifest names no blob")?;
    ensure!(said.contains("its manifest does not name") && said.contains("--blobs"), "{said}");
    // The same again, now that its bootstrap is known.
    ensure!(try_mount(&fixture, &name, "second", &[])?.is_err(), "only the first time");
    let blobs = image.join("blobs");
    let second = mount(&fixture, &name, "second", &["--blobs", text(&blobs)?])?;
    ensure!(fs::read(second.join("0"))? == content(0, FILE));
    fixture.finish()
}

fn a_pulled_image_needs_no_registry(ctx: &Ctx) -> Outcome {
    let mut registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let fixture = Fixture::files(ctx, 3)?;
    registry.pusher()?.image(REPOSITORY, Some("1"), &ctx.dir.join("image"))?;
    let name = reference(&registry, ":1");

    let pulled: Value = serde_json::from_str(&fixture.must(&["pull", &name, "--json"])?)?;

    let stats = &pulled[0];
    ensure!(stats["state"] == "done" && stats["bytes"] == stats["bytes_present"], "{pulled}");
    ensure!(stats["bytes"].as_u64() >= Some(3 * FILE as u64), "{pulled}");
    let again: Value = serde_json::from_str(&fixture.must(&["pull", &name, "--json"])?)?;
    ensure!(again[0]["state"] == "done" && again[0]["id"] == 2, "{again}");
    registry.stop();
    let dir = mount(&fixture, &name, "mnt", &["--offline"])?;
    drop_caches()?;
    for seed in 0..3 {
        ensure!(fs::read(dir.join(seed.to_string()))? == content(seed, FILE), "{seed}");
    }
    ensure!(fixture.list()?[0]["state"] == "complete", "{:?}", fixture.list()?);
    // By the file of a bootstrap as well.
    let (bootstrap, blobs) = (fixture.bootstrap(), ctx.dir.join("image/blobs"));
    fixture.must(&["pull", text(&bootstrap)?, "--blobs", text(&blobs)?])?;
    fixture.finish()
}

fn many_starters_of_one_image_fetch_it_once(ctx: &Ctx) -> Outcome {
    const STARTERS: usize = 16;
    let registry = DockerRegistry::start(&ctx.dir.join("registry"), false)?;
    let fixture = Fixture::files(ctx, 1)?;
    let pusher = registry.pusher()?;
    let manifest = pusher.manifest(REPOSITORY, &ctx.dir.join("image"), true)?;
    pusher.document(REPOSITORY, Some("1"), &manifest)?;
    let name = reference(&registry, ":1");
    let before = registry.answers()?;

    std::thread::scope(|scope| {
        let start = |number: usize| {
            let (fixture, name) = (&fixture, &name);
            scope.spawn(move || {
                let dir = mount(fixture, name, &format!("mnt{number}"), &["--prefetch=none"])?;
                ensure!(fs::read(dir.join("0"))? == content(0, FILE), "{number}");
                anyhow::Ok(())
            })
        };
        let starters: Vec<_> = (0..STARTERS).map(start).collect();
        starters.into_iter().try_for_each(|starter| starter.join().expect("no panic"))
    })?;

    let asked = registry.answers()?.split_off(before.len());
    let bootstrap = manifest["layers"][1]["digest"].as_str().context("a digest")?;
    let blob = &manifest["layers"][0];
    let sent = |digest: &str| -> Vec<u64> {
        asked.iter().filter(|answer| answer.path.ends_with(digest)).map(|answer| answer.bytes).collect()
    };
    ensure!(sent(bootstrap).len() == 1, "{asked:?}");
    let bytes: u64 = sent(blob["digest"].as_str().context("a digest")?).iter().sum();
    ensure!(Some(bytes) <= blob["size"].as_u64(), "{bytes} of {}: {asked:?}", blob["size"]);
    println!("{} requests for {STARTERS} starters", asked.len());
    fixture.finish()
}
