use std::collections::VecDeque;

use super::users::Readers;

/// Things that wait for their turn, in a lane per device and for readers of each image.
///
/// Lanes take turns and each keeps its own order, so a device with thousands of things waiting
/// delays another one's by one at most, and looking for a turn costs no more than there are
/// lanes. Whoever waits for the limits of an image stands in nobody's way who need not.
#[derive(Debug)]
pub(super) struct Lanes<T>(VecDeque<Lane<T>>);

/// Which lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LaneKey {
    pub(super) device: u64,
    /// Whose limits count; nobody's where there are none.
    pub(super) readers: Readers,
}

#[derive(Debug)]
struct Lane<T> {
    key: LaneKey,
    /// Not empty.
    waiting: VecDeque<T>,
}

impl<T> Lanes<T> {
    pub(super) fn new() -> Self {
        Self(VecDeque::new())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether anything of `device` waits.
    pub(super) fn has(&self, device: u64) -> bool {
        self.0.iter().any(|lane| lane.key.device == device)
    }

    pub(super) fn push(&mut self, key: LaneKey, thing: T) {
        match self.0.iter_mut().find(|lane| lane.key == key) {
            Some(lane) => lane.waiting.push_back(thing),
            None => self.0.push_back(Lane { key, waiting: VecDeque::from([thing]) }),
        }
    }

    /// The first lane, in order of turns, whose next thing is `wanted`, and that thing.
    pub(super) fn find(&self, mut wanted: impl FnMut(u64, &T) -> bool) -> Option<(&LaneKey, &T)> {
        let mut next = self.0.iter().filter_map(|lane| Some((&lane.key, lane.waiting.front()?)));
        next.find(|(key, thing)| wanted(key.device, thing))
    }

    /// Whether something that waits, at any place, is `wanted`.
    pub(super) fn any(&self, wanted: impl Fn(&T) -> bool) -> bool {
        self.0.iter().any(|lane| lane.waiting.iter().any(&wanted))
    }

    /// Takes the next thing of a lane, whose next turn then comes after everybody else's.
    pub(super) fn take(&mut self, key: &LaneKey) -> Option<T> {
        let at = self.0.iter().position(|lane| lane.key == *key)?;
        let mut lane = self.0.remove(at)?;
        let thing = lane.waiting.pop_front();
        if !lane.waiting.is_empty() {
            self.0.push_back(lane);
        }
        thing
    }

    /// Takes the first thing of `device`, at any place, that is `wanted`.
    pub(super) fn pick(&mut self, device: u64, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let mut lanes = self.0.iter_mut().filter(|lane| lane.key.device == device);
        let thing = lanes.find_map(|lane| lane.waiting.remove(lane.waiting.iter().position(&wanted)?));
        self.0.retain(|lane| !lane.waiting.is_empty());
        thing
    }

    /// Takes everything of `device`.
    pub(super) fn remove(&mut self, device: u64) -> VecDeque<T> {
        let (gone, kept) = std::mem::take(&mut self.0).into_iter().partition(|lane| lane.key.device == device);
        self.0 = kept;
        let gone: VecDeque<Lane<T>> = gone;
        gone.into_iter().flat_map(|lane| lane.waiting).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::ImageKey;

    fn of(device: u64) -> LaneKey {
        LaneKey { device, readers: Readers::default() }
    }

    fn order(lanes: &mut Lanes<u32>, mut wanted: impl FnMut(u64) -> bool) -> Vec<(u64, u32)> {
        let mut order = Vec::new();
        while let Some((key, &thing)) = lanes.find(|device, _| wanted(device)) {
            let key = key.clone();
            assert_eq!(lanes.take(&key), Some(thing));
            order.push((key.device, thing));
        }
        order
    }

    fn lanes(things: &[(u64, u32)]) -> Lanes<u32> {
        let mut lanes = Lanes::new();
        things.iter().for_each(|&(device, thing)| lanes.push(of(device), thing));
        lanes
    }

    #[test]
    fn devices_take_turns_and_each_keeps_its_order() {
        let mut lanes = lanes(&[(1, 10), (1, 11), (1, 12), (2, 20), (3, 30), (2, 21)]);
        assert_eq!(order(&mut lanes, |_| true), [(1, 10), (2, 20), (3, 30), (1, 11), (2, 21), (1, 12)]);
        assert!(lanes.is_empty());
    }

    #[test]
    fn a_device_that_may_not_go_holds_up_nobody_and_loses_no_place() {
        let mut lanes = lanes(&[(1, 10), (2, 20), (2, 21)]);
        assert_eq!(order(&mut lanes, |device| device != 1), [(2, 20), (2, 21)]);
        lanes.push(of(3), 30);
        assert_eq!(order(&mut lanes, |_| true), [(1, 10), (3, 30)]);
    }

    #[test]
    fn nothing_is_left_of_a_removed_device() {
        let mut lanes = lanes(&[(1, 10), (2, 20), (1, 11)]);
        assert_eq!(lanes.remove(1), [10, 11]);
        assert!(!lanes.has(1) && lanes.has(2));
        assert_eq!((lanes.remove(1), lanes.take(&of(1))), (VecDeque::new(), None));
        assert_eq!(order(&mut lanes, |_| true), [(2, 20)]);
    }

    #[test]
    fn readers_of_one_image_are_not_in_the_way_of_anothers() {
        let mut readers = [Readers::default(), Readers::default()];
        readers[0].add(Some(ImageKey(1)));
        readers[1].add(Some(ImageKey(2)));
        let [one, other] = readers.map(|readers| LaneKey { device: 1, readers });
        let mut lanes = Lanes::new();
        let things = [(&one, 10), (&one, 11), (&other, 20), (&one, 12)];
        things.into_iter().for_each(|(key, thing)| lanes.push(key.clone(), thing));

        assert_eq!(lanes.find(|_, thing| *thing >= 20), Some((&other, &20)), "the other lane has its own first");
        assert_eq!(lanes.pick(2, |_| true), None);
        assert_eq!((lanes.pick(1, |thing| *thing == 11), lanes.pick(1, |thing| *thing == 20)), (Some(11), Some(20)));
        assert_eq!(lanes.remove(1), [10, 12]);
        assert!(lanes.is_empty());
    }
}
