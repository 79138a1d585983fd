//! Threads for CPU work, in two queues: readers before prefetch.
//!
//! Separate from the network threads so that decoding never delays a socket, and with two queues
//! so that prefetching a model layer never delays `ls`. A panic in a job ends the job, whose
//! waiters are cancelled by the drop of what it owned, and not the thread.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::inflight::Urgency;
use super::sink::Scratch;
use crate::base::Class;
use crate::blob::UnitIndex;
use crate::sys::sandbox::Sandbox;

/// Names a unit among all devices of an engine.
pub(super) type UnitKey = (u64, UnitIndex);

/// Work for one unit, or for several that are decoded together.
pub(super) struct Job {
    /// How [`Queue::promote`] finds the job; empty for work that is about no unit.
    pub(super) units: Vec<UnitKey>,
    /// Urgent if any of these is.
    pub(super) urgency: Vec<Urgency>,
    pub(super) run: Box<dyn FnOnce(&mut Scratch) + Send>,
}

impl Job {
    /// Work that is about no unit.
    pub(super) fn new(class: Class, run: impl FnOnce(&mut Scratch) + Send + 'static) -> Self {
        Self { units: Vec::new(), urgency: vec![Urgency::new(class)], run: Box::new(run) }
    }

    fn class(&self) -> Class {
        self.urgency.iter().map(Urgency::class).min().unwrap_or(Class::Prefetch)
    }
}

/// Where jobs wait for a thread. Outlives the threads; a job pushed after the end is dropped.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    readers: VecDeque<Job>,
    prefetch: VecDeque<Job>,
    stopped: bool,
}

impl Queue {
    /// Queues a job by its urgency at this moment; see [`Queue::promote`] for later.
    pub(super) fn push(&self, job: Job) {
        let mut state = self.state.lock().unwrap();
        if state.stopped {
            // Not under the lock: dropping a job runs completions.
            drop(state);
            return drop(job);
        }
        // Read under the lock: a promotion either came before and is seen, or finds the job.
        match job.class() {
            Class::OnDemand => state.readers.push_back(job),
            Class::Prefetch => state.prefetch.push_back(job),
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Lets the queued job for `unit`, if there is one, go before prefetch. Its urgency must have
    /// been raised already.
    pub(super) fn promote(&self, unit: UnitKey) {
        let mut state = self.state.lock().unwrap();
        let found = state.prefetch.iter().position(|job| job.units.contains(&unit));
        let job = found.and_then(|at| state.prefetch.remove(at));
        state.readers.extend(job);
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock().unwrap();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(job) = state.readers.pop_front() {
                return Some(job);
            }
            if let Some(job) = state.prefetch.pop_front() {
                return Some(job);
            }
            state = self.wake.wait(state).unwrap();
        }
    }

    fn work(&self) {
        let mut scratch = Scratch::default();
        while let Some(job) = self.next() {
            let run = job.run;
            if catch_unwind(AssertUnwindSafe(|| run(&mut scratch))).is_err() {
                tracing::error!(units = ?job.units, "a decode job panicked; its readers were cancelled");
            }
        }
    }

    fn stop(&self) {
        let mut state = self.state.lock().unwrap();
        state.stopped = true;
        let left = (std::mem::take(&mut state.readers), std::mem::take(&mut state.prefetch));
        drop(state);
        self.wake.notify_all();
        drop(left);
    }
}

/// The threads. Dropping it drops queued jobs and waits for running ones.
pub(super) struct Pool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `count` threads, at least one, which narrow themselves by `sandbox`: they take apart
    /// what a server sent.
    pub(super) fn start(count: usize, sandbox: &Sandbox) -> io::Result<Self> {
        let mut pool = Self { queue: Arc::default(), threads: Vec::new() };
        for number in 0..count.max(1) {
            let (queue, sandbox) = (Arc::clone(&pool.queue), sandbox.clone());
            let thread = std::thread::Builder::new().name(format!("decode-{number}"));
            pool.threads.push(thread.spawn(move || {
                sandbox.narrow();
                queue.work();
            })?);
        }
        Ok(pool)
    }

    pub(super) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.stop();
        join_others(self.threads.drain(..));
    }
}

/// Waits for `threads`, except for the calling one: the last owner of a pool may be a job.
pub(super) fn join_others(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    let me = std::thread::current().id();
    for thread in threads.into_iter().filter(|thread| thread.thread().id() != me) {
        // A thread that panicked has said so itself.
        let _ = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    fn job(class: Class, unit: UnitIndex, run: impl FnOnce() + Send + 'static) -> Job {
        Job { units: vec![(0, unit)], ..Job::new(class, move |_| run()) }
    }

    fn say(tx: &Sender<u32>, class: Class, unit: UnitIndex) -> Job {
        let tx = tx.clone();
        job(class, unit, move || tx.send(unit).unwrap())
    }

    /// A pool whose only thread is busy until the returned sender is dropped.
    fn busy_pool() -> (Pool, Sender<()>) {
        let pool = Pool::start(1, &Sandbox::off()).unwrap();
        let (hold, held) = channel::<()>();
        let (started, running) = channel();
        pool.queue().push(job(Class::OnDemand, 0, move || {
            started.send(()).unwrap();
            let _ = held.recv();
        }));
        running.recv().unwrap();
        (pool, hold)
    }

    #[test]
    fn readers_overtake_prefetch_and_promoted_work_overtakes_too() {
        let (pool, hold) = busy_pool();
        let (tx, rx) = channel();
        for unit in 1..=3 {
            pool.queue().push(say(&tx, Class::Prefetch, unit));
        }
        pool.queue().push(say(&tx, Class::OnDemand, 9));
        pool.queue().promote((0, 2));
        pool.queue().promote((0, 77));

        drop((hold, tx));

        assert_eq!(rx.iter().collect::<Vec<_>>(), [9, 2, 1, 3]);
    }

    #[test]
    fn a_panic_ends_the_job_and_not_the_thread() {
        let pool = Pool::start(1, &Sandbox::off()).unwrap();
        let (tx, rx) = channel();

        pool.queue().push(job(Class::OnDemand, 1, || panic!("expected by the test")));
        pool.queue().push(say(&tx, Class::OnDemand, 2));

        assert_eq!(rx.recv(), Ok(2));
    }

    #[test]
    fn the_end_drops_queued_jobs_and_leaves_no_thread() {
        let (pool, hold) = busy_pool();
        let (tx, rx) = channel();
        pool.queue().push(say(&tx, Class::OnDemand, 1));
        let queue = Arc::clone(pool.queue());
        drop(hold);

        drop(pool);
        queue.push(say(&tx, Class::OnDemand, 2));
        drop(tx);

        assert!(rx.iter().all(|unit| unit == 1), "only what ran before the end");
        assert_eq!(Arc::strong_count(&queue), 1, "every thread has let go of the queue");
    }
}
