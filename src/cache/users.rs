//! Which images have a device open, and which of them the readers of a unit are of.

use std::sync::{Arc, Mutex, Weak};

use super::engine::Engine;
use super::{Device, Fill, Request};
use crate::base::ByteRange;

/// An image, as far as limits are concerned: a number that its daemon gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageKey(pub u64);

/// The images that have a device open, and how often each has.
#[derive(Debug, Default)]
pub struct Users(Mutex<Vec<(ImageKey, usize)>>);

impl Users {
    /// Those of them that `readers` are of; all, if that is not known of one, or nobody reads yet.
    pub(super) fn of(&self, readers: &Readers) -> Vec<ImageKey> {
        let users = self.0.lock().unwrap();
        let all = || users.iter().map(|(image, _)| *image);
        let known: Vec<_> = all().filter(|image| !readers.has_unknown && readers.known.contains(image)).collect();
        // Where an image has gone whose reader is left, it is nobody's any more.
        if known.is_empty() { all().collect() } else { known }
    }
}

/// The use that one image makes of a device, until it is dropped.
#[derive(Debug)]
#[must_use = "the use ends when it is dropped"]
pub struct ImageUse {
    users: Arc<Users>,
    image: ImageKey,
    engine: Weak<Engine>,
}

impl ImageUse {
    pub(super) fn new(users: &Arc<Users>, image: ImageKey, engine: &Arc<Engine>) -> Self {
        let mut all = users.0.lock().unwrap();
        match all.iter_mut().find(|(user, _)| *user == image) {
            Some((_, times)) => *times += 1,
            None => all.push((image, 1)),
        }
        drop(all);
        // It may bring what others have used up.
        engine.fetcher.look_at_limits();
        Self { users: Arc::clone(users), image, engine: Arc::downgrade(engine) }
    }
}

impl Drop for ImageUse {
    fn drop(&mut self) {
        let mut users = self.users.0.lock().unwrap();
        if let Some((_, times)) = users.iter_mut().find(|(user, _)| *user == self.image) {
            *times -= 1;
        }
        users.retain(|(_, times)| *times > 0);
        drop(users);
        if let Some(engine) = self.engine.upgrade() {
            engine.fetcher.look_at_limits();
        }
    }
}

/// The images whose readers wait for a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Readers {
    known: Vec<ImageKey>,
    /// Whether one waits of whom it is not known.
    has_unknown: bool,
}

impl Readers {
    /// Adds one who waits; tells whether that is news.
    pub(super) fn add(&mut self, image: Option<ImageKey>) -> bool {
        match image {
            Some(image) if self.known.contains(&image) => false,
            Some(image) => {
                self.known.push(image);
                true
            }
            None => !std::mem::replace(&mut self.has_unknown, true),
        }
    }

    /// Adds all who wait for another unit.
    pub(super) fn add_all(&mut self, other: &Self) {
        for image in &other.known {
            self.add(Some(*image));
        }
        self.has_unknown |= other.has_unknown;
    }
}

/// A device as one image reads it, for backends that know through which mount a read came: reads are charged to this
/// image.
#[derive(Clone, Debug)]
pub struct DeviceOfImage {
    device: Arc<Device>,
    image: ImageKey,
}

impl DeviceOfImage {
    /// `device` as `image` reads it.
    pub fn new(device: Arc<Device>, image: ImageKey) -> Self {
        Self { device, image }
    }

    /// The device itself.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Fill for DeviceOfImage {
    fn decoded_len(&self) -> u64 {
        self.device.decoded_len()
    }

    fn present(&self, decoded: ByteRange) -> bool {
        self.device.present(decoded)
    }

    fn fill_for(&self, request: Request, decoded: ByteRange, done: super::Completion) {
        self.device.fill_for(request.of(self.image), decoded, done);
    }

    fn read_given(&self, request: &Request, decoded: ByteRange, into: &mut [u8]) -> std::io::Result<()> {
        self.device.read_given(request, decoded, into)
    }

    fn touched(&self, decoded: ByteRange) {
        self.device.touched_by(Some(self.image), decoded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ImageKey = ImageKey(1);
    const OTHER: ImageKey = ImageKey(2);

    fn readers(images: &[Option<ImageKey>]) -> Readers {
        let mut readers = Readers::default();
        for image in images {
            readers.add(*image);
        }
        readers
    }

    #[test]
    fn those_pay_who_wait_and_anybody_where_nobody_knows_who_that_is() {
        let users = Users(Mutex::new(vec![(ONE, 1), (OTHER, 2)]));
        for (waiting, may_pay) in [
            (vec![Some(ONE)], vec![ONE]),
            (vec![Some(OTHER), Some(ONE)], vec![ONE, OTHER]),
            (vec![Some(OTHER), None], vec![ONE, OTHER]),
            (vec![None], vec![ONE, OTHER]),
            (vec![], vec![ONE, OTHER]),
            (vec![Some(ImageKey(3))], vec![ONE, OTHER]),
        ] {
            assert_eq!(users.of(&readers(&waiting)), may_pay, "{waiting:?}");
        }
    }

    #[test]
    fn each_reader_is_news_once_and_all_are_added_up() {
        let mut all = readers(&[Some(ONE)]);
        assert!(!all.add(Some(ONE)) && all.add(None) && !all.add(None) && all.add(Some(OTHER)));

        let mut sum = Readers::default();
        sum.add_all(&readers(&[Some(OTHER)]));
        assert_eq!(Users(Mutex::new(vec![(ONE, 1), (OTHER, 1)])).of(&sum), [OTHER]);
        sum.add_all(&all);
        assert_eq!((sum.known, sum.has_unknown), (vec![OTHER, ONE], true));
    }
}
