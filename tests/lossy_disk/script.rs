//! What happens to a store: mounts, reads, flushes, evictions, failures, the death of its process, and people
//! who meddle with its files while it is stopped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rafsd::cache::{Device, Disk, StockError, Store, fill_blocking};

use super::images::{Image, NEVER_READ, options, runtime};
use super::model::{Fault, Kind, Model, SECTOR};
use super::rng::Rng;

/// Units that were made durable when the log had this length; holds until somebody meddles.
#[derive(Clone, Debug)]
pub(crate) struct Promise {
    pub(crate) since: usize,
    pub(crate) image: usize,
    pub(crate) units: Vec<usize>,
    /// Whether the image had a directory of its own, because another one that it contradicts had the
    /// common one. When that goes, the image takes the common one anew at its next mount.
    pub(crate) apart: bool,
}

/// One machine between two power cuts.
pub(crate) struct Script<'a> {
    pub(crate) disk: Model,
    /// Where the lock lies, on the real disk, and the name of the store on the other one.
    root: &'a Path,
    rng: Rng,
    store: Option<Arc<Store>>,
    devices: [Option<Arc<Device>>; 3],
    pub(crate) promises: Vec<Promise>,
    /// Lengths of the log at which somebody meddled: no promise goes beyond.
    pub(crate) meddled: Vec<usize>,
    /// What went wrong in a step, if anything.
    wrong: Option<String>,
}

impl<'a> Script<'a> {
    pub(crate) fn new(disk: Model, root: &'a Path, rng: Rng) -> Self {
        let devices = [None, None, None];
        Self { disk, root, rng, store: None, devices, promises: vec![], meddled: vec![], wrong: None }
    }

    /// Runs `steps` steps. What is wrong while the power is on is an error.
    pub(crate) fn run(&mut self, steps: usize) -> Result<(), String> {
        for _ in 0..steps {
            self.step();
            self.wait_for_quiet();
            self.judge()?;
        }
        // The power goes before anything can be put in order.
        self.kill();
        Ok(())
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..14 => self.open(),
            14..57 => self.fill(),
            57..77 => self.flush(),
            77..81 => self.close_one(),
            81..85 => self.kill(),
            85..88 => self.stop(),
            88..92 => self.fail(),
            92..96 => self.evict(),
            _ => self.meddle(),
        }
    }

    /// Waits until nobody but the open devices has files open: the thread that brought the last unit may
    /// hold on to a device's files a little longer, and what comes next must not depend on how long.
    fn wait_for_quiet(&self) {
        let mut alive: Vec<_> = self.devices.iter().flatten().map(Arc::as_ptr).collect();
        alive.sort_unstable();
        alive.dedup();
        let until = Instant::now() + Duration::from_secs(20);
        // `data` and `present`.
        while self.disk.open_files() != 2 * alive.len() {
            assert!(Instant::now() < until, "files stay open");
            std::thread::yield_now();
        }
    }

    fn store(&mut self) -> Option<Arc<Store>> {
        if self.store.is_none() {
            let has_trash = self.disk.has_trash();
            if has_trash {
                // Swept by a thread of the store: no fault must strike at a moment that no seed decides.
                self.disk.set_fault(None);
            }
            let disk = Arc::new(self.disk.clone());
            self.store = Store::open_on(disk, self.root, options(), runtime()).ok();
            let until = Instant::now() + Duration::from_secs(20);
            while self.store.is_some() && has_trash && self.disk.has_trash() {
                assert!(Instant::now() < until, "what is half removed stays");
                std::thread::yield_now();
            }
        }
        self.store.clone()
    }

    /// Removes a blob, if nobody uses it.
    fn evict(&mut self) {
        if self.rng.below(3) > 0 {
            self.devices = [None, None, None];
            self.wait_for_quiet();
        }
        let Some(store) = self.store() else { return };
        store.say_uses_are_known();
        let names = store.directories();
        if names.is_empty() {
            return;
        }
        let name = &names[self.rng.below(names.len())];
        let dir = self.root.join("v1").join(name);
        let is_used = |device: &Arc<Device>| device.data_path().is_some_and(|path| path.starts_with(&dir));
        let is_used = self.devices.iter().flatten().any(is_used);
        let begins = self.disk.log_len();
        let met = self.disk.faults_met();

        let outcome = store.shelves().remove(name);

        let has_changed = self.disk.log_len() > begins;
        self.wrong = match (is_used, &outcome) {
            (true, Err(StockError::InUse(_))) if !has_changed => None,
            (false, Ok(())) if self.disk.look_at(&dir.join("data"), |_| ()).is_err() => None,
            (false, Err(_)) if self.disk.faults_met() > met => None,
            _ => Some(format!("removing {name}, used {is_used}: {outcome:?}")),
        };
    }

    /// Mounts an image. May fail if the disk does; then the next try must work.
    fn open(&mut self) {
        let which = self.rng.below(3);
        let image = &Image::all()[which];
        let Some(store) = self.store() else { return };
        // These readers run on this thread, which opens: one whose write is refused would wait for an eviction,
        // and that for what is being opened.
        if !self.disk.is_about_to_fail() {
            self.disturb();
        }
        if let Ok(device) = store.device(image.map(), image.source()) {
            self.devices[which] = Some(device);
        }
        self.disk.set_meanwhile(None);
    }

    fn any_device(&mut self) -> Option<(usize, Arc<Device>)> {
        let open: Vec<_> = (0..3).filter_map(|which| Some((which, self.devices[which].clone()?))).collect();
        if open.is_empty() { None } else { Some(open[self.rng.below(open.len())].clone()) }
    }

    fn fill(&mut self) {
        let Some((which, device)) = self.any_device() else { return };
        for _ in 0..=self.rng.below(4) {
            let unit = some_unit(which, &mut self.rng);
            // Fails when the disk does.
            let _ = fill_blocking(&*device, Image::all()[which].range(unit));
        }
    }

    fn flush(&mut self) {
        let Some((which, device)) = self.any_device() else { return };
        let before = Image::all()[which].present(&device);
        let log_len = self.disk.log_len();
        self.disturb();
        let flushed = device.flush();
        self.disk.set_meanwhile(None);
        // With nothing to do, it rests on what an earlier process wrote and may have failed to sync.
        if flushed.is_ok() && self.disk.log_len() > log_len {
            let apart = !device.data_path().is_some_and(|path| path.starts_with(self.common_dir()));
            self.promises.push(Promise { since: self.disk.log_len(), image: which, units: before, apart });
        }
    }

    /// Lets readers come in the middle of the syncs of the next step.
    fn disturb(&mut self) {
        let Some((which, device)) = self.any_device().filter(|_| self.rng.below(2) == 0) else { return };
        let mut rng = Rng::new(self.rng.below(usize::MAX) as u64);
        self.disk.set_meanwhile(Some(Box::new(move || {
            if rng.below(2) == 0 {
                let _ = fill_blocking(&*device, Image::all()[which].range(some_unit(which, &mut rng)));
            }
        })));
    }

    fn close_one(&mut self) {
        if let Some((which, device)) = self.any_device() {
            self.devices[which] = None;
            drop(device);
        }
    }

    /// Ends the process in order.
    fn stop(&mut self) {
        self.devices = [None, None, None];
        self.store = None;
    }

    fn kill(&mut self) {
        let next = self.disk.reboot_process();
        self.stop();
        self.disk = next;
    }

    fn fail(&mut self) {
        let kinds: &'static [Kind] =
            [&[Kind::Sync][..], &[Kind::Sync], &[Kind::Write], &[Kind::Name]][self.rng.below(4)];
        let errno = if kinds == [Kind::Sync] { libc::EIO } else { libc::ENOSPC };
        self.disk.set_fault(Some(Fault { at: self.rng.below(3), errno, stays: false, kinds }));
    }

    /// Meddles with the files while nobody runs.
    fn meddle(&mut self) {
        self.stop();
        let dir = self.common_dir();
        let data = dir.join("data");
        let negative = |bytes: &[u8]| bytes.iter().map(|byte| !byte).collect::<Vec<_>>();
        let Ok(content) = self.disk.look_at(&data, negative) else { return };
        self.disk.set_fault(None);
        let outcome = match self.rng.below(6) {
            0 => self.disk.remove(&data),
            1 => self.disk.remove(&dir.join("present")),
            2 => self.disk.remove(&dir.join("units")),
            3 => self.flip_a_byte(&data, content.len()),
            4 => self.disk.replace_from_outside(&data, &content),
            // Shorter by a block: what was durable about the rest must go with it.
            _ => self.disk.replace_from_outside(&data, content.get(4096..).unwrap_or_default()),
        };
        drop(outcome);
        self.meddled.push(self.disk.log_len());
    }

    /// Changes a byte in place, some time after it was let go in order: after a crash nobody knows when a file was
    /// changed.
    fn flip_a_byte(&mut self, data: &Path, len: usize) -> std::io::Result<()> {
        self.disk.open(&self.common_dir().join("rest"))?.sync()?;
        self.disk.sync_dir(&self.common_dir())?;
        let at = self.rng.below(len.max(1)) / SECTOR * SECTOR;
        let mut sector = [0; SECTOR];
        let file = self.disk.open(data)?;
        file.read_at(&mut sector, at as u64)?;
        sector[self.rng.below(SECTOR)] ^= 0x40;
        file.write_at(&sector, at as u64)
    }

    pub(crate) fn common_dir(&self) -> PathBuf {
        self.root.join("v1/one")
    }

    fn judge(&self) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let open = self.devices.iter().zip(Image::all());
        open.filter_map(|(device, image)| Some((device.as_ref()?, image)))
            .try_for_each(|(device, image)| image.judge(device, &self.disk))
    }
}

/// A unit that the image can check.
fn some_unit(image: usize, rng: &mut Rng) -> usize {
    let known = &Image::all()[image].known;
    loop {
        let unit = known.start + rng.below(known.len());
        if unit != NEVER_READ {
            return unit;
        }
    }
}
