//! Many images under one daemon. `RAFSD_MOUNTS=1000` and `RAFSD_BURST=10000` for the numbers that are aimed at; what is said
//! about time is printed and never decides.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rafsd::daemon::api::{BackendChoice, ImageSpec, MountRequest, PrefetchOrder, UnmountRequest};
use rafsd::daemon::client::Client;

use super::fixture::{Fixture, content};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

pub(crate) const CASES: &[Case] = &[
    Case { name: "many_mounts_under_one_daemon_survive_it", needs: NEEDS, place: Place::Here, run: many_mounts },
    Case { name: "a_burst_of_cold_reads_waits_and_is_served", needs: NEEDS, place: Place::Here, run: burst },
    Case {
        name: "an_image_of_many_files_is_mounted_again_without_being_read",
        needs: NEEDS,
        place: Place::Here,
        run: again,
    },
    Case { name: "an_image_of_many_blobs_is_mounted", needs: NEEDS, place: Place::Here, run: many_blobs },
];

/// Different images that the mounts are of.
const IMAGES: usize = 10;
/// Files of each image, with one unit of these bytes each.
const FILES: usize = 60;
const LENGTH: usize = 64 << 10;
/// Readers while the daemon is killed.
const READERS: usize = 8;
/// Most memory of the daemon, as the kernel counts what belongs to it alone.
const MOST_MEMORY: u64 = 144 << 20;

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The number in the environment's `variable`, for long runs.
fn number(variable: &str, usual: usize) -> anyhow::Result<usize> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(usual),
    }
}

/// Bytes of memory that belong to the process: anonymous, and its share of files.
fn memory(pid: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find(|line| line.starts_with("Pss:")).context("Pss")?;
    let kib: u64 = line.split_whitespace().nth(1).context("a number")?.parse()?;
    Ok(kib << 10)
}

fn choice(backend: Backend) -> BackendChoice {
    match backend {
        Backend::Fanotify => BackendChoice::Fanotify,
        Backend::Cachefiles => BackendChoice::Cachefiles,
        Backend::FuseDevice => BackendChoice::FuseDevice,
        Backend::FuseTree => BackendChoice::FuseTree,
    }
}

fn many_mounts(ctx: &Ctx) -> Outcome {
    let count = number("RAFSD_MOUNTS", 200)?;
    let mut fixture = Fixture::files(ctx, 1)?;
    let images: Vec<PathBuf> = (0..IMAGES)
        .map(|image| {
            let fill = |dir: &Path| {
                (0..FILES)
                    .try_for_each(|file| fs::write(dir.join(file.to_string()), content(image * 100 + file, LENGTH)))
            };
            fixture.build_other(&format!("source-{image}"), fill)
        })
        .collect::<anyhow::Result<_>>()?;
    let dirs: Vec<PathBuf> = (0..count).map(|number| ctx.dir.join(format!("m/{number}"))).collect();
    let (client, runtime) = (Client::new(&fixture.run())?, runtime()?);
    let began = Instant::now();
    for (number, dir) in dirs.iter().enumerate() {
        fs::create_dir_all(dir)?;
        let image = &images[number % IMAGES];
        let blobs = image.join("blobs").to_str().context("UTF-8")?.to_owned();
        let image = spec(image.join("bootstrap"), &blobs);
        let request = MountRequest { image, dir: dir.clone(), backend: choice(ctx.backend), trace: None };
        runtime.block_on(client.mount(&request)).with_context(|| format!("mount {number}"))?;
    }
    println!("{count} mounts in {:?}", began.elapsed());
    println!("memory of the daemon: {} KiB", memory(fixture.pid())? >> 10);
    ensure!(memory(fixture.pid())? < MOST_MEMORY, "too much memory: {}", memory(fixture.pid())?);

    let stop = AtomicBool::new(false);
    let (reads, worst) = std::thread::scope(|scope| {
        let reader = |seed| {
            let (dirs, stop) = (&dirs, &stop);
            scope.spawn(move || read_until(dirs, seed, stop))
        };
        let readers: Vec<_> = (0..READERS).map(reader).collect();
        std::thread::sleep(Duration::from_millis(100));
        let killed = kill_and_start(&mut fixture);
        std::thread::sleep(Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        let mut read = readers.into_iter().map(|reader| reader.join().expect("no panic"));
        let all = read.try_fold((0, Duration::ZERO), |(reads, worst), one| {
            one.map(|(more, slow)| (reads + more, worst.max(slow)))
        });
        killed.and(all)
    })?;
    println!("{reads} reads by {READERS} readers meanwhile, the slowest in {worst:?}");
    // The old one's connection went with its daemon.
    let client = Client::new(&fixture.run())?;
    println!("taken over after {:?} ms", runtime.block_on(client.info())?.takeover_ms);
    println!("memory of the next daemon: {} KiB", memory(fixture.pid())? >> 10);
    ensure!(fixture.list()?.len() == count, "{} of {count} mounts", fixture.list()?.len());

    let began = Instant::now();
    for dir in &dirs {
        runtime.block_on(client.unmount(&UnmountRequest { dir: dir.clone(), lazy: false }))?;
    }
    println!("{count} unmounted in {:?}", began.elapsed());
    fixture.finish()
}

fn kill_and_start(fixture: &mut Fixture<'_>) -> Outcome {
    fixture.kill()?;
    let began = Instant::now();
    fixture.start(&[])?;
    println!("the next daemon answered after {:?}", began.elapsed());
    Ok(())
}

/// Reads files of mounts, compares all of their bytes, and tells how many it were, and how long the slowest took.
fn read_until(dirs: &[PathBuf], seed: usize, stop: &AtomicBool) -> anyhow::Result<(usize, Duration)> {
    let (mut reads, mut worst) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        // Other mounts and other files with each round, and no reader the same as another.
        let at = reads * READERS + seed;
        let (number, file) = (at * 7919 % dirs.len(), at * 104_729 / 13 % FILES);
        let began = Instant::now();
        let got = fs::read(dirs[number].join(file.to_string()))?;
        worst = worst.max(began.elapsed());
        ensure!(got == content(number % IMAGES * 100 + file, LENGTH), "file {file} of mount {number}");
        reads += 1;
    }
    ensure!(reads > 0, "a reader never read");
    Ok((reads, worst))
}

/// More readers at once than there may be events under way, and descriptors for far fewer.
fn burst(ctx: &Ctx) -> Outcome {
    /// Bytes from one reader's place to the next.
    const STEP: usize = 16 << 10;
    let readers = number("RAFSD_BURST", 1500)?;
    let wanted = content(3, readers * STEP);
    let mut fixture = Fixture::with(
        ctx,
        &["--chunk-size", "4096"],
        rafsd::net::server::ServerOptions { delay: Duration::from_millis(20), ..Default::default() },
        &[],
        |dir| fs::write(dir.join("big"), &wanted),
    )?;
    fixture.stop()?;
    fixture.limit_descriptors(600);
    fixture.start(&[])?;
    let mount = fixture.mount("mnt")?;
    // One open file for all: its readers are what there are many of.
    let file = File::open(mount.join("big"))?;
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    let began = Instant::now();
    let failures: Vec<String> = std::thread::scope(|scope| {
        let read = |reader: usize| {
            let (file, wanted) = (&file, &wanted);
            let work = move || {
                let (mut byte, at) = ([0], reader * STEP);
                file.read_exact_at(&mut byte, at as u64).map_err(|e| e.to_string())?;
                if byte[0] == wanted[at] { Ok(()) } else { Err(format!("a wrong byte at {at}")) }
            };
            std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, work).expect("a thread")
        };
        let reading: Vec<_> = (0..readers).map(read).collect();
        reading.into_iter().filter_map(|reader| reader.join().expect("no panic").err()).collect()
    });
    println!("{readers} cold reads at once in {:?}", began.elapsed());
    drop(file);
    ensure!(failures.is_empty(), "{} of {readers} readers failed: {:?}", failures.len(), failures.first());
    fixture.umount(&mount)?;
    fixture.finish()
}

/// `RAFSD_FILES=100000` for the number that is aimed at.
fn again(ctx: &Ctx) -> Outcome {
    let count = number("RAFSD_FILES", 5000)?;
    let fixture = Fixture::files(ctx, 1)?;
    let image = fixture.build_other("many", |dir| {
        (0..count).try_for_each(|file| {
            let dir = dir.join((file / 500).to_string());
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(file.to_string()), content(file, 100 + file % 900))
        })
    })?;
    // A file that was written a moment ago could change once more without that showing.
    std::thread::sleep(Duration::from_millis(3200));
    let (client, runtime) = (Client::new(&fixture.run())?, runtime()?);
    let bootstrap = image.join("bootstrap");
    let blobs = image.join("blobs").to_str().context("UTF-8")?.to_owned();
    let spec = spec(bootstrap.clone(), &blobs);
    let mount = |name: &str| {
        let dir = ctx.dir.join(name);
        fs::create_dir_all(&dir)?;
        let request = MountRequest { image: spec.clone(), dir: dir.clone(), backend: choice(ctx.backend), trace: None };
        let (before, began) = (bytes_read(fixture.pid())?, Instant::now());
        let report = runtime.block_on(client.mount(&request))?;
        let (took, read) = (began.elapsed(), bytes_read(fixture.pid())? - before);
        println!("{name} mount of {count} files in {took:?}, {read} bytes read");
        ensure!(
            report.devices.iter().all(|device| device.stats.as_ref().is_some_and(|stats| stats.units_present == 0)),
            "nothing is fetched: {report:?}"
        );
        anyhow::Ok((dir, read))
    };
    let len = fs::metadata(&bootstrap)?.len();
    let (first, read) = mount("first")?;
    ensure!(read > len, "{read} bytes read at the first mount of a bootstrap of {len}");
    let (second, read) = mount("second")?;
    ensure!(read < len / 10, "{read} bytes read at the second mount");
    fixture.umount(&first)?;
    fixture.umount(&second)?;
    let (third, read) = mount("third")?;
    ensure!(read < len / 10, "{read} bytes read at a mount when none was left");
    let wanted = content(count - 1, 100 + (count - 1) % 900);
    ensure!(fs::read(third.join(format!("{}/{}", (count - 1) / 500, count - 1)))? == wanted, "the last file");
    fixture.umount(&third)?;

    // Another image in its place is noticed.
    let other = fixture.build_other("other", |dir| fs::write(dir.join("only"), "one"))?;
    for entry in fs::read_dir(other.join("blobs"))? {
        let entry = entry?;
        fs::rename(entry.path(), image.join("blobs").join(entry.file_name()))?;
    }
    fs::rename(other.join("bootstrap"), &bootstrap)?;
    let (fourth, _) = mount("fourth")?;
    ensure!(fs::read(fourth.join("only"))? == b"one", "the image that is there now");
    fixture.umount(&fourth)?;
    fixture.finish()
}

/// Bytes that a process has read so far, by any call.
fn bytes_read(pid: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io"))?;
    Ok(text.lines().find_map(|line| line.strip_prefix("rchar: ")).context("rchar")?.parse()?)
}

/// More devices than the old mount call has room for.
fn many_blobs(ctx: &Ctx) -> Outcome {
    const LAYERS: usize = 60;
    let fixture = Fixture::files(ctx, 1)?;
    let layers: Vec<PathBuf> = (0..LAYERS)
        .map(|layer| {
            fixture.build_other(&format!("layer-{layer}"), |dir| {
                fs::write(dir.join(format!("f{layer}")), content(layer, 10_000))
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let merged = ctx.dir.join("merged");
    fs::create_dir_all(merged.join("blobs"))?;
    let mut merge = std::process::Command::new(&ctx.rafsd);
    merge.arg("merge").args(layers.iter().map(|layer| layer.join("bootstrap"))).arg("-o").arg(merged.join("bootstrap"));
    let output = merge.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for layer in &layers {
        for blob in fs::read_dir(layer.join("blobs"))? {
            let blob = blob?;
            fs::hard_link(blob.path(), merged.join("blobs").join(blob.file_name()))?;
        }
    }
    let mount = fixture.mount_other(&merged, "mnt", &[])?;
    ensure!(fixture.list()?[0]["devices"].as_array().is_some_and(|it| it.len() == LAYERS), "a device for each layer");
    for layer in 0..LAYERS {
        ensure!(fs::read(mount.join(format!("f{layer}")))? == content(layer, 10_000), "layer {layer}");
    }
    fixture.umount(&mount)?;
    fixture.finish()
}

/// Nothing is fetched ahead.
fn spec(bootstrap: PathBuf, blobs: &str) -> ImageSpec {
    let (bootstrap, blobs) = (Some(bootstrap), blobs.into());
    ImageSpec { bootstrap, blobs, prefetch: PrefetchOrder::None, ..ImageSpec::default() }
}
