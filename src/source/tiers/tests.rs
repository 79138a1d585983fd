//! Places that lie, are slow, or have no time, and who is asked instead. What needs minutes is in `tests/registry_faults`, in
//! a time that tests move.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::base::RequestId;

const READ: ByteRange = ByteRange::new(0, 8).unwrap();

/// What a place does when it is asked.
#[derive(Clone, Copy)]
enum Act {
    Right,
    Wrong,
    /// The first half, and then nothing any more.
    Half,
    Hang,
    Missing,
}

/// Does one thing after the other, the last one for ever.
struct Scripted {
    name: &'static str,
    acts: Mutex<VecDeque<Act>>,
    asked: AtomicUsize,
}

impl Scripted {
    fn new(name: &'static str, acts: &[(usize, Act)]) -> Arc<Self> {
        let acts = acts.iter().flat_map(|&(times, act)| std::iter::repeat_n(act, times)).collect();
        Arc::new(Self { name, acts: Mutex::new(acts), asked: AtomicUsize::new(0) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    async fn answer(&self, blob: &BlobId, stored: ByteRange, take: &mut Take<'_>) -> Result<(), Failure> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let act = {
            let mut acts = self.acts.lock().unwrap();
            if acts.len() > 1 { acts.pop_front() } else { acts.front().copied() }.expect("an act")
        };
        let len = usize::try_from(stored.len()).unwrap();
        let (blob, place) = (blob.clone(), self.name.to_owned());
        match act {
            Act::Right => take(vec![1; len].into()),
            Act::Wrong => take(vec![0; len].into()),
            Act::Missing => return Err(SourceError::NotFound { blob, place }.into()),
            Act::Half | Act::Hang => {
                if matches!(act, Act::Half) {
                    take(vec![1; len / 2].into());
                }
                // The caller sees to the deadline.
                return std::future::pending().await;
            }
        }
        Ok(())
    }
}

type Take<'a> = dyn FnMut(Bytes) + Send + 'a;

impl Upstream for Arc<Scripted> {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, Failure>> {
        Box::pin(async { Ok(1 << 20) })
    }

    fn pour<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        _: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(self.answer(blob, stored, take))
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }
}

fn blob() -> BlobId {
    "ab".parse().unwrap()
}

fn tiers(places: &[&Arc<Scripted>]) -> Tiers {
    let tier = |place: &&Arc<Scripted>| Tier { counts: Some(Arc::default()), ..Tier::new(Arc::clone(*place)) };
    Tiers::new(places.iter().map(tier).collect(), RetryPolicy::default(), Clock::default())
}

fn within(time: Duration) -> ReadCtx {
    ReadCtx { class: Class::OnDemand, deadline: Instant::now() + time, request: RequestId::NONE }
}

async fn read(tiers: &Tiers, range: ByteRange) -> Bytes {
    tiers.read(&blob(), range, within(Duration::from_secs(20))).await.unwrap()
}

fn wrong(tiers: &Tiers) -> Vec<u64> {
    tiers.tiers.iter().map(|tier| tier.counts.as_ref().unwrap().wrong.get()).collect()
}

#[tokio::test]
async fn of_places_that_lie_each_is_asked_once_and_last_from_then_on() {
    let (one, two, three) = (
        Scripted::new("one", &[(1, Act::Wrong)]),
        Scripted::new("two", &[(1, Act::Wrong)]),
        Scripted::new("three", &[(1, Act::Right)]),
    );
    let tiers = tiers(&[&one, &two, &three]);
    assert_eq!(tiers.places(), 3);
    for _ in 0..2 {
        assert_eq!(read(&tiers, READ).await, [0; 8][..]);
        tiers.judged(&blob(), READ, Verdict::Wrong);
    }
    assert_eq!(read(&tiers, READ).await, [1; 8][..]);
    assert_eq!(wrong(&tiers), [0, 0, 0], "the image might have been wrong");
    tiers.judged(&blob(), READ, Verdict::Right);

    assert_eq!(wrong(&tiers), [1, 1, 0]);
    assert_eq!(read(&tiers, ByteRange::new(100, 108).unwrap()).await, [1; 8][..]);
    assert_eq!((one.asked(), two.asked(), three.asked()), (1, 1, 2));
}

#[tokio::test]
async fn where_all_lie_all_are_asked_again_and_nobody_is_to_blame() {
    let (one, two) = (Scripted::new("one", &[(1, Act::Wrong)]), Scripted::new("two", &[(1, Act::Wrong)]));
    let tiers = tiers(&[&one, &two]);
    for _ in 0..4 {
        assert_eq!(read(&tiers, READ).await, [0; 8][..]);
        tiers.judged(&blob(), READ, Verdict::Wrong);
    }
    assert_eq!(wrong(&tiers), [0, 0]);
    assert!(one.asked() >= 1 && two.asked() == 1);
}

#[tokio::test]
async fn of_two_who_brought_one_wrong_range_neither_is_asked_for_it_again() {
    let (one, two, three) = (
        Scripted::new("one", &[(1, Act::Half)]),
        Scripted::new("two", &[(1, Act::Wrong)]),
        Scripted::new("three", &[(1, Act::Right)]),
    );
    let tiers = tiers(&[&one, &two, &three]);
    let mixed = tiers.read(&blob(), READ, within(Duration::from_millis(400))).await.unwrap();
    assert_eq!(mixed, [1, 1, 1, 1, 0, 0, 0, 0][..]);
    tiers.judged(&blob(), READ, Verdict::Wrong);

    assert_eq!(read(&tiers, READ).await, [1; 8][..]);
    tiers.judged(&blob(), READ, Verdict::Right);
    assert_eq!((one.asked(), two.asked(), three.asked()), (1, 1, 1));
    assert_eq!(wrong(&tiers), [0, 0, 0], "nobody can tell whose half was wrong");
}

/// Has the first place answer so often that it is known what is usual.
async fn get_to_know(tiers: &Tiers) {
    for at in 0..40 {
        read(tiers, ByteRange::at(1000 + 8 * at, 8).unwrap()).await;
    }
}

#[tokio::test]
async fn another_place_is_asked_beside_one_that_does_not_begin() {
    let slow = Scripted::new("slow", &[(40, Act::Right), (1, Act::Hang)]);
    let other = Scripted::new("other", &[(1, Act::Right)]);
    let tiers = tiers(&[&slow, &other]);
    get_to_know(&tiers).await;
    assert_eq!((slow.asked(), other.asked()), (40, 0));

    assert_eq!(read(&tiers, READ).await, [1; 8][..]);
    assert_eq!((slow.asked(), other.asked()), (41, 1));
    assert_eq!(tiers.counts.hedges.get(), 1);
}

#[tokio::test]
async fn who_lied_is_not_asked_beside_the_one_that_is_asked_instead() {
    let liar = Scripted::new("liar", &[(1, Act::Wrong)]);
    let slow = Scripted::new("slow", &[(1, Act::Hang)]);
    let tiers = tiers(&[&liar, &slow]);
    get_to_know(&tiers).await;
    (0..40).for_each(|_| tiers.tiers[1].health.took(Duration::from_millis(1)));
    read(&tiers, READ).await;
    tiers.judged(&blob(), READ, Verdict::Wrong);
    let asked = liar.asked();

    let late = tiers.read(&blob(), READ, within(Duration::from_millis(300))).await;

    assert!(matches!(late, Err(SourceError::Deadline { .. })), "{late:?}");
    assert_eq!((liar.asked(), slow.asked()), (asked, 1));
}

#[tokio::test]
async fn one_that_hangs_leaves_time_to_the_others_and_they_are_not_to_blame() {
    let hangs = Scripted::new("hangs", &[(1, Act::Hang)]);
    let lacks = Scripted::new("lacks", &[(1, Act::Missing)]);
    let has = Scripted::new("has", &[(1, Act::Right)]);
    let tiers = tiers(&[&hangs, &lacks, &has]);
    for _ in 0..3 {
        let got = tiers.read(&blob(), READ, within(Duration::from_millis(300))).await.unwrap();
        assert_eq!(got, [1; 8][..]);
    }
    assert_eq!((lacks.asked(), has.asked()), (3, 3));

    // Where there is nobody else, all of the time is its own, and the next one is asked in it or not at all.
    let (hangs, has) = (Scripted::new("hangs", &[(1, Act::Hang)]), Scripted::new("has", &[(1, Act::Hang)]));
    let alone = self::tiers(&[&hangs, &has]);
    let late = alone.read(&blob(), READ, within(Duration::from_millis(200))).await;
    assert!(matches!(late, Err(SourceError::Deadline { .. })), "{late:?}");
    let now = Instant::now();
    assert!(
        alone.tiers.iter().all(|tier| tier.health.standing(now) == Standing::Good),
        "a moment is too short to tell"
    );
}
