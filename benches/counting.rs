//! What counting costs on the way of a read, as ratios within one run.
//!
//! `cargo bench --bench counting` prints nanoseconds per read and the ratio to the same read without
//! the counters of `telemetry`.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rafsd::base::Class;
use rafsd::cache::Request;
use rafsd::telemetry::{Answer, Backend, Telemetry};

const ROUNDS: u32 = 2_000_000;

/// The best of several runs, in nanoseconds per round: the others were disturbed.
fn nanoseconds(mut round: impl FnMut()) -> f64 {
    let run = |round: &mut dyn FnMut()| {
        let begun = Instant::now();
        (0..ROUNDS).for_each(|_| round());
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
    };
    (0..5).map(|_| run(&mut round)).fold(f64::INFINITY, f64::min)
}

/// Two clock reads and an allocation: what a miss did before it was counted, the least of it.
fn bare_miss() {
    let asked = Instant::now();
    let done: Box<dyn FnOnce() -> Duration> = Box::new(move || asked.elapsed());
    black_box(black_box(done)());
}

fn main() {
    let (plain, telemetry) = (AtomicU64::new(0), Telemetry::default());
    let hit = nanoseconds(|| {
        black_box(&plain).fetch_add(1, Ordering::Relaxed);
    });
    let counted_hit =
        nanoseconds(|| black_box(&telemetry).reads.at(Backend::Fanotify).answered.at(Answer::AtOnce).inc());
    let miss = nanoseconds(bare_miss);
    let counted_miss = nanoseconds(|| {
        let request = Request::new(telemetry.next_request(), Class::OnDemand);
        let waiting = telemetry.waiting_read(Backend::Fanotify, request.asked());
        bare_miss();
        telemetry.fills.misses.at(Class::OnDemand).inc();
        telemetry.fills.queue.observe(Duration::from_micros(30));
        telemetry.fills.fetch.at(Class::OnDemand).observe(Duration::from_millis(3));
        telemetry.fills.decode_queue.at(Class::OnDemand).observe(Duration::from_micros(30));
        telemetry.fills.land.at(Class::OnDemand).observe(Duration::from_millis(1));
        telemetry.fills.filled.at(Class::OnDemand).inc();
        telemetry.fills.filled_bytes.at(Class::OnDemand).add(1 << 20);
        waiting.answered(Answer::Filled);
    });
    // Waking another thread and back is the least that any event costs, whatever is counted.
    let event = wake_up();
    println!("hit: plain counter {hit:.1} ns, counted {counted_hit:.1} ns, ratio {:.2}", counted_hit / hit);
    println!("hit with its wake-ups ({event:.0} ns): ratio {:.4}", (event + counted_hit) / (event + hit));
    println!("miss: bookkeeping {:.0} ns", counted_miss - miss);
    let fetched = 1e6;
    println!("miss with a fetch of 1 ms: ratio {:.5}", (fetched + counted_miss) / (fetched + miss));
}

/// Nanoseconds for waking a thread that answers, as the kernel does for an event.
fn wake_up() -> f64 {
    let (ask, asked) = std::sync::mpsc::sync_channel::<()>(0);
    let (answer, answered) = std::sync::mpsc::sync_channel::<()>(0);
    let thread = std::thread::spawn(move || asked.iter().try_for_each(|()| answer.send(())));
    let rounds = 20_000;
    let begun = Instant::now();
    for _ in 0..rounds {
        ask.send(()).expect("a listener");
        answered.recv().expect("an answer");
    }
    let took = begun.elapsed().as_secs_f64() * 1e9 / f64::from(rounds);
    drop(ask);
    let _ = thread.join();
    took
}
