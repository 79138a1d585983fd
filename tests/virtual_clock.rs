//! The clock that tests move is itself tested: whoever trusts it in a hundred places should be able to.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rafsd::net::{Elapsed, Timekeeper};
use support::clock::{Bustle, Driver, VirtualClock, until_quiet};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn it_moves_only_when_told() {
    let time = VirtualClock::new();
    let (now, wall) = (time.now(), time.wall());

    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!((time.now(), time.wall(), time.elapsed()), (now, wall, Duration::ZERO));

    time.advance(SECOND);
    assert_eq!((time.now(), time.wall(), time.elapsed()), (now + SECOND, wall + SECOND, SECOND));

    time.skew_wall(-86_400);
    assert_eq!((time.now(), time.wall()), (now + SECOND, wall + SECOND - 86_400 * SECOND));
}

#[tokio::test]
async fn sleepers_wake_up_in_the_order_of_their_moments() {
    let time = VirtualClock::new();
    let woken = Arc::new(Mutex::new(Vec::new()));
    let tasks: Vec<_> = [3_u32, 1, 2, 1]
        .into_iter()
        .map(|seconds| {
            let (clock, woken) = (time.clock(), Arc::clone(&woken));
            tokio::spawn(async move {
                clock.sleep(seconds * SECOND).await;
                woken.lock().unwrap().push(seconds);
            })
        })
        .collect();
    until_quiet(&time, &(), Duration::from_millis(6)).await;

    time.advance(3 * SECOND);
    for task in tasks {
        task.await.unwrap();
    }

    assert_eq!(*woken.lock().unwrap(), [1, 1, 2, 3]);
    assert_eq!(time.sleepers(), 0);
}

#[tokio::test]
async fn the_next_sleeper_is_waked_and_nobody_behind_it() {
    let time = VirtualClock::new();
    let clock = time.clock();
    let (first, second) = (clock.sleep(SECOND), clock.sleep(2 * SECOND));
    tokio::pin!(first, second);
    assert!(!time.advance_to_next_sleeper(), "nobody sleeps before somebody has looked");
    tokio::select! {
        biased;
        () = &mut first => panic!("too early"),
        () = &mut second => panic!("too early"),
        () = std::future::ready(()) => {}
    }

    assert!(time.advance_to_next_sleeper());

    first.await;
    assert_eq!((time.elapsed(), time.sleepers()), (SECOND, 1));
}

#[tokio::test]
async fn who_gives_up_sleeping_leaves_no_trace() {
    let time = VirtualClock::new();
    let clock = time.clock();

    let done = clock.timeout_at(time.now() + SECOND, async { tokio::task::yield_now().await }).await;

    assert_eq!((done, time.sleepers()), (Ok(()), 0));
}

/// Works until it is told to stop.
#[derive(Default)]
struct Worker {
    works: AtomicBool,
    steps: AtomicU64,
}

impl Bustle for Worker {
    fn busy(&self) -> bool {
        self.works.load(Ordering::SeqCst)
    }

    fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn a_driver_moves_from_sleeper_to_sleeper_in_no_time() {
    let time = VirtualClock::new();
    let _driver = Driver::start(&time, Arc::new(()), Duration::from_millis(2));
    let (clock, began) = (time.clock(), Instant::now());

    for _ in 0..24 {
        clock.sleep(3600 * SECOND).await;
    }
    let late = clock.timeout_at(time.now() + SECOND, std::future::pending::<()>()).await;

    assert_eq!((late, time.elapsed()), (Err(Elapsed), (24 * 3600 + 1) * SECOND));
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn the_time_waits_for_those_who_work_and_for_those_who_get_on() {
    let time = VirtualClock::new();
    let worker = Arc::new(Worker { works: AtomicBool::new(true), ..Worker::default() });
    let _driver = Driver::start(&time, Arc::clone(&worker) as Arc<dyn Bustle>, Duration::from_millis(6));
    let sleeping = tokio::spawn({
        let clock = time.clock();
        async move { clock.sleep(SECOND).await }
    });

    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(time.elapsed(), Duration::ZERO, "somebody works");

    worker.works.store(false, Ordering::SeqCst);
    for _ in 0..60 {
        worker.steps.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(time.elapsed(), Duration::ZERO, "somebody gets on");
    }

    sleeping.await.unwrap();
    assert_eq!(time.elapsed(), SECOND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn the_time_waits_for_other_threads_that_compute() {
    let time = VirtualClock::new();
    let clock = time.clock();
    let sleeping = tokio::spawn(async move { clock.sleep(SECOND).await });
    let computing = tokio::spawn({
        let time = time.clone();
        async move {
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(150) {
                std::hint::spin_loop();
            }
            time.elapsed()
        }
    });
    let _driver = Driver::start(&time, Arc::new(()), Duration::from_millis(3));

    assert_eq!(computing.await.unwrap(), Duration::ZERO, "somebody computes");
    sleeping.await.unwrap();
    assert_eq!(time.elapsed(), SECOND);
}
