use std::collections::VecDeque;

/// Things that wait for their turn, in a lane per device.
///
/// Lanes take turns and each keeps its own order, so a device with thousands of things waiting
/// delays another one's by one at most, and looking for a turn costs no more than there are
/// devices.
#[derive(Debug)]
pub(super) struct Lanes<T>(VecDeque<Lane<T>>);

#[derive(Debug)]
struct Lane<T> {
    device: u64,
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
        self.0.iter().any(|lane| lane.device == device)
    }

    pub(super) fn push(&mut self, device: u64, thing: T) {
        match self.0.iter_mut().find(|lane| lane.device == device) {
            Some(lane) => lane.waiting.push_back(thing),
            None => self.0.push_back(Lane { device, waiting: VecDeque::from([thing]) }),
        }
    }

    /// The first device, in order of turns, whose next thing is `wanted`, and that thing.
    pub(super) fn find(&self, mut wanted: impl FnMut(u64, &T) -> bool) -> Option<(u64, &T)> {
        let mut next = self.0.iter().filter_map(|lane| Some((lane.device, lane.waiting.front()?)));
        next.find(|(device, thing)| wanted(*device, thing))
    }

    /// Whether something that waits, at any place, is `wanted`.
    pub(super) fn any(&self, wanted: impl Fn(&T) -> bool) -> bool {
        self.0.iter().any(|lane| lane.waiting.iter().any(&wanted))
    }

    /// Takes the next thing of `device`, whose next turn then comes after everybody else's.
    pub(super) fn take(&mut self, device: u64) -> Option<T> {
        let at = self.0.iter().position(|lane| lane.device == device)?;
        let mut lane = self.0.remove(at)?;
        let thing = lane.waiting.pop_front();
        if !lane.waiting.is_empty() {
            self.0.push_back(lane);
        }
        thing
    }

    /// Takes everything of `device`.
    pub(super) fn remove(&mut self, device: u64) -> VecDeque<T> {
        let at = self.0.iter().position(|lane| lane.device == device);
        at.and_then(|at| self.0.remove(at)).map(|lane| lane.waiting).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(lanes: &mut Lanes<u32>, mut wanted: impl FnMut(u64) -> bool) -> Vec<(u64, u32)> {
        let mut order = Vec::new();
        while let Some((device, &thing)) = lanes.find(|device, _| wanted(device)) {
            assert_eq!(lanes.take(device), Some(thing));
            order.push((device, thing));
        }
        order
    }

    fn lanes(things: &[(u64, u32)]) -> Lanes<u32> {
        let mut lanes = Lanes::new();
        things.iter().for_each(|&(device, thing)| lanes.push(device, thing));
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
        lanes.push(3, 30);
        assert_eq!(order(&mut lanes, |_| true), [(1, 10), (3, 30)]);
    }

    #[test]
    fn nothing_is_left_of_a_removed_device() {
        let mut lanes = lanes(&[(1, 10), (2, 20), (1, 11)]);
        assert_eq!(lanes.remove(1), [10, 11]);
        assert!(!lanes.has(1) && lanes.has(2));
        assert_eq!((lanes.remove(1), lanes.take(1)), (VecDeque::new(), None));
        assert_eq!(order(&mut lanes, |_| true), [(2, 20)]);
    }
}
