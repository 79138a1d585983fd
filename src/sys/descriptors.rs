//! Threads with a table of descriptors of their own.
//!
//! Some calls wait for this very process and hear no signal meanwhile: whoever asked something of a FUSE file
//! system waits for the answer once the request was read, whatever happens (seen on 6.18 for every kind of
//! request). If the process is killed then, the thread stays in the kernel, and with it the table of descriptors
//! that it shares with all others: the connection stays open that would have to end for the thread to go on, and
//! the keepers do not hear that their daemon has died. It waits for itself for ever.
//!
//! So whoever may have to wait for us does so on a thread whose table has nothing in it that somebody waits for
//! the end of. The table of the process then goes with its other threads, and what the thread waits for ends.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, Builder};

use nix::sched::{CloneFlags, unshare};

/// Runs `work` on a thread that has only the descriptors in `keep`, under their numbers, and the first three.
///
/// What `work` opens it must close: nothing but values can be brought out of there, and a descriptor that was
/// opened elsewhere names another file, or none. A panic goes on in the caller. Where a table of its own is refused,
/// as filters of system calls may do, that of the process is shared.
///
/// # Errors
/// If no thread can be started.
pub fn alone<T: Send>(keep: &[BorrowedFd<'_>], work: impl FnOnce() -> T + Send) -> io::Result<T> {
    alone_asking(keep, &|()| (), |_| work())
}

/// As [`alone`], for work that has a question to ask for which the descriptors of the process are needed. `answer`
/// is called on the calling thread.
///
/// # Errors
/// If no thread can be started.
pub fn alone_asking<Q: Send, A: Send, T: Send>(
    keep: &[BorrowedFd<'_>],
    answer: &dyn Fn(Q) -> A,
    work: impl FnOnce(&dyn Fn(Q) -> A) -> T + Send,
) -> io::Result<T> {
    let (ask, asked) = channel::<(Q, Sender<A>)>();
    let alone = move || {
        leave_all_but(keep);
        work(&|question| {
            let (tell, told) = channel();
            // It fails only when the caller panics; then nobody answers below.
            let _ = ask.send((question, tell));
            told.recv().expect("the caller answers until it panics")
        })
    };
    thread::scope(|scope| {
        let thread = Builder::new().name("alone".into()).spawn_scoped(scope, alone)?;
        // Until the thread has ended, and with it what it asks by.
        for (question, tell) in asked {
            let _ = tell.send(answer(question));
        }
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Leaves the calling thread, which owns no descriptor, nothing but the first three, for good.
pub fn leave_all() {
    leave_all_but(&[]);
}

/// Gives the calling thread a table of its own in which only `keep` and the first three descriptors are open.
fn leave_all_but(keep: &[BorrowedFd<'_>]) {
    /// `CLOSE_RANGE_UNSHARE`: in a table of its own, to which only what stays is copied.
    const UNSHARE: libc::c_uint = 1 << 1;
    let mut keep: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    keep.sort_unstable();
    let last = keep.last().map_or(2, |last| *last.max(&2));
    // The second way is for kernels before Linux 5.9.
    if !close_range(last + 1..=RawFd::MAX, UNSHARE) && unshare(CloneFlags::CLONE_FILES).is_err() {
        return;
    }
    let mut first = 3;
    for number in keep {
        close(first..=number - 1);
        first = first.max(number + 1);
    }
    close(first..=RawFd::MAX);
}

fn close_range(numbers: RangeInclusive<RawFd>, flags: libc::c_uint) -> bool {
    // SAFETY: plain numbers. What is closed is closed in a table that the calling thread has for itself, with the
    // flag from this call on, else because the caller has seen to that, and no value on this thread owns any of
    // the numbers: what owns them elsewhere uses another table. On failure nothing is closed.
    unsafe { libc::syscall(libc::SYS_close_range, *numbers.start(), *numbers.end(), flags) == 0 }
}

/// Closes these numbers in a table that the calling thread has for itself, and owns nothing in.
fn close(numbers: RangeInclusive<RawFd>) {
    if numbers.is_empty() || close_range(numbers.clone(), 0) {
        return;
    }
    let Ok(open) = std::fs::read_dir("/proc/thread-self/fd") else { return };
    let open: Vec<RawFd> = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in open.into_iter().filter(|number| numbers.contains(number)) {
        // SAFETY: as above; the directory that was read is closed already, and its number names nothing.
        unsafe { libc::close(number) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::fdpass;

    fn is_here(file: &impl AsRawFd) -> bool {
        fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd())).is_ok()
    }

    #[test]
    fn only_what_is_kept_is_there_and_nothing_of_others_is_closed() {
        let mut files: Vec<File> = (0..5).map(|_| File::open("/proc/self/stat").unwrap()).collect();

        let there = alone(&[files[3].as_fd(), files[1].as_fd()], || files.iter().map(is_here).collect::<Vec<_>>());

        assert_eq!(there.unwrap(), [false, true, false, true, false]);
        for file in &mut files {
            assert!(is_here(file) && file.read(&mut [0]).is_ok_and(|len| len == 1));
        }
    }

    #[test]
    fn the_end_of_a_talk_is_heard_while_a_thread_is_alone() {
        let (ours, theirs) = fdpass::pair().unwrap();
        let (go, wait) = channel::<()>();
        thread::scope(|scope| {
            let (entered, has_entered) = channel();
            scope.spawn(move || {
                alone(&[], move || {
                    entered.send(()).unwrap();
                    let _ = wait.recv();
                })
            });
            has_entered.recv().unwrap();

            drop(theirs);

            assert!(fdpass::receive(ours.as_fd(), &mut [0]).unwrap().is_none(), "a copy is left");
            drop(go);
        });
    }

    #[test]
    fn questions_are_answered_by_who_has_the_descriptors() {
        let file = File::open("/dev/null").unwrap();

        let answers = alone_asking(&[], &|()| is_here(&file), |ask| (is_here(&file), ask(()), ask(())));

        assert_eq!(answers.unwrap(), (false, true, true));
    }

    #[test]
    fn a_panic_goes_on_in_the_caller() {
        let panic = std::panic::catch_unwind(|| alone(&[], || panic!("expected by the test"))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"expected by the test"));
    }
}
