//! Facts about pre-content events that the fanotify backend rests on, one by one.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rafsd::sys::fanotify::{Answer, EVENT_BUFFER, Event, Group};

use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Host, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_read_of_a_marked_file_raises_its_pages", a_read_of_a_marked_file_raises_its_pages),
    case("a_descriptor_from_before_the_mark_is_exempt", a_descriptor_from_before_the_mark_is_exempt),
    case("a_denial_carries_its_errno", a_denial_carries_its_errno),
    case("closing_the_last_group_descriptor_shows_zeros", closing_the_last_group_descriptor_shows_zeros),
    case("a_second_holder_of_the_group_keeps_readers_waiting", a_second_holder_of_the_group_keeps_readers_waiting),
];

/// A sparse file and a descriptor of it from before any mark.
fn sparse(ctx: &Ctx) -> anyhow::Result<(std::path::PathBuf, File)> {
    let path = ctx.dir.join("sparse");
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    file.set_len(1 << 20)?;
    Ok((path, file))
}

fn next_event(group: &Group) -> anyhow::Result<Event> {
    let until = Instant::now() + Duration::from_secs(10);
    let mut buffer = vec![0; EVENT_BUFFER];
    while Instant::now() < until {
        let mut fds = [PollFd::new(group.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(100u8))?;
        match group.read(&mut buffer) {
            Ok(mut events) if events.len() == 1 => return Ok(events.remove(0)),
            Ok(events) => bail!("{} events at once", events.len()),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
    bail!("no event came")
}

fn answer(group: &Group, event: &Event, answer: Answer) -> anyhow::Result<()> {
    let file = event.file.as_ref().map_err(|errno| anyhow::anyhow!("errno {errno}"))?;
    Ok(group.answer(file.as_fd(), answer)?)
}

fn a_read_of_a_marked_file_raises_its_pages(ctx: &Ctx) -> Outcome {
    let (path, file) = sparse(ctx)?;
    let group = Group::new()?;
    group.mark(file.as_fd())?;
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 5000];
        File::open(path)?.read_exact_at(&mut bytes, 12345).map(|()| bytes[0])
    });

    let event = next_event(&group)?;
    ensure!(event.range == rafsd::base::ByteRange::at(12288, 8192), "{event:?}");
    ensure!(event.pid.cast_unsigned() == std::process::id(), "{event:?}");
    file.write_all_at(&[7; 8192], 12288)?;
    answer(&group, &event, Answer::Allow)?;

    ensure!(reader.join().expect("no panic")? == 7, "the reader does not see what was filled");
    Ok(())
}

fn a_descriptor_from_before_the_mark_is_exempt(ctx: &Ctx) -> Outcome {
    let (_, file) = sparse(ctx)?;
    let group = Group::new()?;
    group.mark(file.as_fd())?;

    // Would wait for ever if it raised an event, for nobody answers.
    file.write_all_at(&[1; 4096], 0)?;
    file.read_exact_at(&mut [0; 4096], 0)?;

    let outcome = group.read(&mut vec![0; EVENT_BUFFER]).map_err(|e| e.kind());
    ensure!(matches!(outcome, Err(std::io::ErrorKind::WouldBlock)), "{outcome:?}");
    Ok(())
}

fn a_denial_carries_its_errno(ctx: &Ctx) -> Outcome {
    let (path, file) = sparse(ctx)?;
    let group = Group::new()?;
    group.mark(file.as_fd())?;
    let reader = std::thread::spawn(move || File::open(path)?.read_exact_at(&mut [0; 10], 0));

    answer(&group, &next_event(&group)?, Answer::Deny(nix::libc::ENOSPC))?;

    let error = reader.join().expect("no panic").err().and_then(|e| e.raw_os_error());
    ensure!(error == Some(nix::libc::ENOSPC), "{error:?}");
    Ok(())
}

fn closing_the_last_group_descriptor_shows_zeros(ctx: &Ctx) -> Outcome {
    let (path, file) = sparse(ctx)?;
    let group = Group::new()?;
    group.mark(file.as_fd())?;
    let reader = std::thread::spawn(move || fs::read(path));
    let event = next_event(&group)?;

    drop(event);
    drop(group);

    let got = reader.join().expect("no panic")?;
    ensure!(got.iter().all(|&b| b == 0), "if this kernel fails closed now, the keeper is not needed any more");
    Ok(())
}

fn a_second_holder_of_the_group_keeps_readers_waiting(ctx: &Ctx) -> Outcome {
    let (path, file) = sparse(ctx)?;
    let group = Group::new()?;
    group.mark(file.as_fd())?;
    let keeper = Group::from(group.as_fd().try_clone_to_owned()?);
    let reader = std::thread::spawn(move || File::open(path)?.read_exact_at(&mut [0; 10], 0));
    let event = next_event(&group)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(event.file.as_ref().map_err(|_| anyhow::anyhow!("no file"))?);

    drop(event);
    drop(group);
    std::thread::sleep(Duration::from_millis(300));

    ensure!(!reader.is_finished(), "the reader was let through");
    keeper.answer_number(number, Answer::Deny(nix::libc::EIO)).context("answer by number")?;
    let error = reader.join().expect("no panic").err().and_then(|e| e.raw_os_error());
    ensure!(error == Some(nix::libc::EIO), "{error:?}");
    Ok(())
}
