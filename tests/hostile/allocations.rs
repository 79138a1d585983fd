//! What the calling thread allocates, so that a test can say how much hostile input may cost.

#![expect(unsafe_code, reason = "an allocator cannot be written without; it only counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

thread_local! {
    /// Bytes allocated minus bytes freed by this thread since [`peak_of`] began. Constant and
    /// without a destructor, so that touching it never allocates.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize, sign: isize) {
    let live = LIVE.get() + sign * isize::try_from(bytes).unwrap_or(isize::MAX);
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: every call is passed to the system's allocator unchanged, so its guarantees are ours;
// counting touches constant thread-locals only and neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Both blocks may exist while the bytes are copied.
        count(new_size, 1);
        count(layout.size(), -1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// Runs `work` and tells how many bytes more than before it held at its worst on this thread.
pub(super) fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    LIVE.set(0);
    PEAK.set(0);
    let out = work();
    (out, usize::try_from(PEAK.get()).expect("the peak is at least where it began"))
}

#[test]
fn allocations_are_counted_with_those_that_are_freed_again() {
    let (len, peak) = peak_of(|| {
        drop(std::hint::black_box(vec![1u8; 3 << 20]));
        std::hint::black_box(vec![0u8; 1 << 20]).len()
    });

    assert_eq!(len, 1 << 20);
    assert!((3 << 20..(3 << 20) + 4096).contains(&peak), "{peak}");
}
