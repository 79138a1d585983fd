//! Who answers a reader when several threads may: exactly one, exactly once.
//!
//! Run by `cargo test --features shuttle --lib schedules`; see the tests of the same name in `cache`.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use shuttle::thread;

use super::permission::{Permission, Respond, deliver};
use crate::base::sync::Mutex;
use crate::cache::explore;
use crate::sys::fanotify::Answer;

/// A kernel that notes answers, and may refuse the first.
#[derive(Debug, Default)]
struct Kernel {
    answers: Mutex<Vec<Answer>>,
    refuses: Option<i32>,
}

impl Respond for Kernel {
    fn respond(&self, _: BorrowedFd<'_>, answer: Answer) {
        let kernel = |answer| {
            let mut answers = self.answers.lock().unwrap();
            answers.push(answer);
            match self.refuses {
                Some(errno) if answers.len() == 1 => Err(io::Error::from_raw_os_error(errno)),
                _ => Ok(()),
            }
        };
        deliver(kernel, answer);
    }
}

fn event() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

type Completion = Box<dyn FnOnce(Answer) + Send>;

/// One event, whose completion lies where three threads find it: one completes it, two drop it, as a
/// cancelled fill and an unwinding thread do.
fn race(refuses: Option<i32>) -> Vec<Answer> {
    let kernel = Arc::new(Kernel { refuses, ..Kernel::default() });
    let permission = Permission::new(kernel.clone(), event());
    let completion: Completion = Box::new(move |answer| permission.answer(answer));
    let place = Arc::new(Mutex::new(Some(completion)));
    let take = |with: fn(Completion)| {
        let place = Arc::clone(&place);
        thread::spawn(move || {
            let taken = place.lock().unwrap().take();
            if let Some(taken) = taken {
                with(taken);
            }
        })
    };
    let threads = [take(|completion| completion(Answer::Allow)), take(drop), take(drop)];
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    kernel.answers.lock().unwrap().clone()
}

#[test]
fn an_event_is_answered_exactly_once_whoever_gets_it() {
    explore(|| {
        let answers = race(None);
        assert!(matches!(answers[..], [Answer::Allow] | [Answer::Deny(libc::EIO)]), "{answers:?}");
    });
}

#[test]
fn an_answer_that_the_kernel_refuses_becomes_a_denial_and_nothing_more() {
    explore(|| {
        let answers = race(Some(libc::EINVAL));
        assert!(matches!(answers[..], [_, Answer::Deny(libc::EIO)]), "{answers:?}");
        let gone = race(Some(libc::ENOENT));
        assert_eq!(gone.len(), 1, "the reader was killed: {gone:?}");
    });
}
