//! Letting readers fail, and taking mounts out of the tree, with memory that was laid out beforehand.

use std::os::fd::{AsFd, BorrowedFd};

use super::hands::Hands;
use super::post::failure;
use crate::sys::fanotify::{Answer, EVENT_BUFFER, Event, Group};
use crate::sys::inotify::each_watch;
use crate::sys::journal::Journal;
use crate::sys::mount::each_mount;
use crate::telemetry::memoryless::MemorylessLog;

/// Most superblocks that are told from others; further ones are left in the tree, and denied like all.
const MOST_MOUNTS: usize = 32 << 10;

/// What a keeper does to those who use the mounts of a daemon that has gone.
pub(super) struct Denial {
    /// Events that were just taken, or lines of the mount table.
    buffer: Vec<u8>,
    /// Superblocks of ours.
    devices: Vec<(u32, u32)>,
    /// Whether the events that a dead daemon had taken have been denied.
    denied_taken: bool,
}

impl Denial {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; EVENT_BUFFER], devices: Vec::with_capacity(MOST_MOUNTS), denied_taken: false }
    }

    /// Another daemon has come, whose events are others.
    pub(super) fn begin_anew(&mut self) {
        self.denied_taken = false;
    }

    /// Denies every reader who waits now: first those whose events a daemon had taken, known by
    /// their numbers there, for afterwards these numbers may name events that are taken here.
    pub(super) fn deny(&mut self, group: BorrowedFd<'_>, journal: &Journal) {
        let Ok(group) = group.try_clone_to_owned().map(Group::from) else { return };
        let deny = Answer::Deny(libc::EIO);
        if !self.denied_taken {
            journal.each_number(&mut self.buffer, &mut |number| {
                let _ = group.answer_number(number, deny);
                journal.clear(number);
            });
            journal.clear_landing();
        }
        let mut answer = |event: Event| {
            if let Ok(file) = event.file {
                let _ = group.answer(file.as_fd(), deny);
            }
        };
        while let Ok(taken) = group.take_each(journal, &mut self.buffer, &mut answer) {
            journal.clear_landing();
            if taken == 0 {
                break;
            }
        }
        self.denied_taken = true;
    }

    /// Takes every mount of what `watch` watches out of the tree.
    pub(super) fn take_down(&mut self, watch: BorrowedFd<'_>, hands: &Hands, log: MemorylessLog) {
        let Self { buffer, devices, .. } = self;
        devices.clear();
        let listed = each_watch(watch, &mut |watched| {
            if devices.len() < MOST_MOUNTS {
                devices.push(watched.device);
            }
        });
        if let Err(error) = listed {
            log.error(format_args!("cannot learn what lives: {}", failure(&error)));
        }
        devices.sort_unstable();
        // The table changes while it is read, so until nothing of ours was found in it.
        loop {
            let mut gone = 0;
            let read = each_mount(buffer, |device, target| {
                if devices.binary_search(&device).is_err() {
                    return;
                }
                match hands.detach(target) {
                    Ok(()) => gone += 1,
                    Err(error) => {
                        let dir = target.utf8_chunks().map(|chunk| chunk.valid()).next().unwrap_or_default();
                        let why = failure(&error);
                        log.error(format_args!("cannot take a mount out of the tree dir={dir} error={why}"));
                    }
                }
            });
            if let Err(error) = &read {
                log.error(format_args!("cannot learn what is mounted: {}", failure(error)));
            }
            if gone == 0 || read.is_err() {
                break;
            }
        }
    }
}
