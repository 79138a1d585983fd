//! Every operation of the disk fails once, and from some operation on all of them fail.
//!
//! While it lasts a reader gets data or an error; afterwards the same store heals without being
//! opened again; and a power cut at the worst moment still leaves nothing that lies.

use std::path::Path;
use std::sync::Arc;

use rafsd::cache::{Device, Fill, Store, fill_blocking};

use super::images::{Image, options, runtime};
use super::media::{Luck, Media};
use super::model::{Fault, Kind, Model};
use super::rng::Rng;

const ALL: &[Kind] = &[Kind::Name, Kind::Write, Kind::Sync];

#[test]
fn a_disk_that_fails_once_at_any_operation_costs_an_error_at_most() {
    for errno in [libc::EIO, libc::ENOSPC] {
        fail_everywhere(errno, false, ALL);
    }
}

#[test]
fn a_disk_that_fails_for_good_from_any_operation_on_never_lies_and_heals_when_it_is_mended() {
    for errno in [libc::EIO, libc::ENOSPC] {
        fail_everywhere(errno, true, ALL);
    }
    // A full disk still syncs what it has, and a dying one may take writes that it never syncs.
    fail_everywhere(libc::ENOSPC, true, &[Kind::Name, Kind::Write]);
    fail_everywhere(libc::EIO, true, &[Kind::Sync]);
}

fn fail_everywhere(errno: i32, stays: bool, kinds: &'static [Kind]) {
    let root = tempfile::tempdir().expect("a directory for the lock");
    let mut struck = 0;
    for at in 0.. {
        let disk = Model::new(true, root.path());
        match one_life(&disk, root.path(), Fault { at, errno, stays, kinds }) {
            Ok(()) => {}
            Err(wrong) => panic!("operation {at} of {kinds:?} failing with {errno}, for good {stays}: {wrong}"),
        }
        if disk.faults_met() == 0 {
            break;
        }
        struck += 1;
    }
    println!("{struck} operations of {kinds:?} failed with errno {errno}, for good: {stays}");
    assert!(struck > 10, "only {struck} operations were struck");
}

fn one_life(disk: &Model, root: &Path, fault: Fault) -> Result<(), String> {
    let mut media = Media::under(disk);
    disk.set_fault(Some(fault));
    let (store, devices) = trouble(disk, root)?;
    disk.set_fault(None);
    healed(disk, root, store, devices)?;
    let mut rng = Rng::new(fault.at as u64);
    for (number, op) in disk.log().iter().enumerate() {
        media.follow(op);
        if number % 4 == fault.at % 4 {
            let luck = if rng.below(2) == 0 { Some(Luck::Nothing) } else { None };
            let left = media.survivor(luck, &mut rng);
            let store =
                Store::open_on(Arc::new(left.clone()), root, options(), runtime()).map_err(|e| e.to_string())?;
            for image in &Image::all()[..2] {
                let device = store.device(image.map(), image.source()).map_err(|e| e.to_string())?;
                image.judge(&device, &left).map_err(|wrong| format!("after a power cut: {wrong}"))?;
            }
        }
    }
    Ok(())
}

type Devices = [Option<Arc<Device>>; 2];

/// Mounts, reads and flushes while the disk fails: data or an error, never a wrong byte.
fn trouble(disk: &Model, root: &Path) -> Result<(Option<Arc<Store>>, Devices), String> {
    let Ok(store) = Store::open_on(Arc::new(disk.clone()), root, options(), runtime()) else {
        return Ok((None, [None, None]));
    };
    let mut devices = [None, None];
    for (image, device) in Image::all().iter().zip(&mut devices) {
        for units in [image.known.start..image.known.start + 3, image.known.end - 3..image.known.end] {
            if device.is_none() {
                *device = store.device(image.map(), image.source()).ok();
            }
            let Some(device) = device else { continue };
            for unit in units {
                let outcome = fill_blocking(&**device, image.range(unit));
                if outcome.is_ok() != device.present(image.range(unit)) {
                    return Err(format!("unit {unit}: told {outcome:?}"));
                }
                image.judge(device, disk)?;
            }
            // Fails when the disk does.
            let _ = device.flush();
            image.judge(device, disk)?;
        }
    }
    Ok((Some(store), devices))
}

/// Without starting anything anew, everything can be had and made durable.
fn healed(disk: &Model, root: &Path, store: Option<Arc<Store>>, devices: Devices) -> Result<(), String> {
    let store = match store {
        Some(store) => store,
        None => Store::open_on(Arc::new(disk.clone()), root, options(), runtime()).map_err(|e| e.to_string())?,
    };
    for (image, device) in Image::all().iter().zip(devices) {
        let device = match device {
            Some(device) => device,
            None => store.device(image.map(), image.source()).map_err(|e| format!("mount after healing: {e}"))?,
        };
        for unit in image.known.clone() {
            fill_blocking(&*device, image.range(unit)).map_err(|e| format!("unit {unit} after healing: {e}"))?;
        }
        device.flush().map_err(|e| format!("flush after healing: {e}"))?;
        image.judge(&device, disk)?;
        if image.present(&device) != image.known.clone().collect::<Vec<_>>() {
            return Err("not everything is present after healing".into());
        }
    }
    Ok(())
}
