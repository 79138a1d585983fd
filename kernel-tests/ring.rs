//! Cases over FUSE run again with requests over io_uring, which the kernel has to be told to offer.

use std::fs::{self, File};
use std::io;

use nix::fcntl::{Flock, FlockArg};

use crate::{Backend, Case, Place};

/// Where the kernel is told.
pub(crate) const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// By which a daemon that a case starts hears of it.
pub(crate) const VARIABLE: &str = "RAFSD_FUSE_TRANSPORT";

/// Cases of all backends that run again: what goes wrong with readers, or while a daemon makes room for another one.
/// Those that kill one and want readers to go on cannot.
const AGAIN: &[&str] = &[
    "a_second_mount_shares_the_cache",
    "a_stalled_source_is_eio_by_the_deadline",
    "a_waiting_reader_can_be_killed",
    "a_source_that_comes_back_serves_again",
    "a_flipped_bit_is_eio_and_the_log_names_it",
    "an_abort_frees_who_waits",
    "a_stalled_read_holds_up_nobody_else",
    "signals_other_than_sigkill_interrupt_no_read",
    "what_nobody_kept_fails_and_is_ended",
    "a_burst_of_cold_reads_waits_and_is_served",
    "an_upgrade_is_not_noticed_by_readers",
    "kept_mounts_are_served_by_the_next_daemon",
    "random_reads_of_every_kind_show_the_bytes",
    "readers_stuck_on_a_dead_source_die_when_killed_and_the_mount_goes",
];

/// Whether a case runs over io_uring for `backend`.
pub(crate) fn runs(case: &Case, backend: Backend) -> bool {
    let is_fuse = matches!(backend, Backend::FuseDevice | Backend::FuseTree);
    let whole_tables = [crate::cases::reading::CASES, crate::cases::metadata::CASES];
    let is_again = AGAIN.contains(&case.name)
        || whole_tables.iter().copied().flatten().any(|it| it.name == case.name && it.place.runs(backend));
    is_fuse && (case.place == Place::Ring || (is_again && case.place.runs(backend)))
}

/// The kernel's switch, on as long as this lives, for this process alone of those that mind. Who is killed
/// meanwhile leaves it on.
pub(crate) struct Switch {
    _lock: Flock<File>,
    was: String,
}

impl Switch {
    /// Turns it on. The error says why that is not to be had.
    pub(crate) fn on() -> Result<Self, String> {
        let unusable = |error: io::Error| format!("FUSE over io_uring cannot be switched on: {error}");
        let file = File::open(SWITCH).map_err(|error| format!("this kernel has no FUSE over io_uring: {error}"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| unusable(errno.into()))?;
        let was = fs::read_to_string(SWITCH).map_err(unusable)?;
        fs::write(SWITCH, "Y").map_err(unusable)?;
        Ok(Self { _lock: lock, was })
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.was.trim());
    }
}
