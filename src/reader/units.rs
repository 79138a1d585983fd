//! Checked units of devices, fetched ahead of whoever wants them.
//!
//! The caller says beforehand which units it is going to want. Two lots of stored bytes are held:
//! the one in use, and the next one on its way. Decoding happens on the caller's thread.

use std::iter::Peekable;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::lot::{Fetcher, Lot};
use crate::base::{BlobId, ByteRange};
use crate::blob::{DecodeError, Decoder, Unit, UnitIndex, UnitMap};
use crate::image::ImageError;
use crate::source::{BlobSource, SourceError};

/// Reads that run at the same time.
const SLOTS: usize = 8;

/// One unit of one device of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnitRef {
    /// Position in [`Image::devices`](crate::image::Image::devices).
    pub device: usize,
    pub index: UnitIndex,
}

/// Why bytes of an image could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The bootstrap does not say where the bytes are.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The file leads to a part of a device that no chunk fills.
    #[error("no chunk of blob {blob} holds {decoded} of its decoded bytes")]
    NoUnit { blob: BlobId, decoded: ByteRange },
    /// The stored bytes could not be fetched.
    #[error("cannot read chunk {chunk} of blob {blob}")]
    Fetch {
        blob: BlobId,
        chunk: UnitIndex,
        #[source]
        cause: SourceError,
    },
    /// The stored bytes are not those that the image promises.
    #[error("chunk {chunk} of blob {blob} is damaged")]
    Damaged {
        blob: BlobId,
        chunk: UnitIndex,
        #[source]
        cause: DecodeError,
    },
}

/// Gives out the checked bytes of one unit after the other.
///
/// Holds at most 64 MiB: two lots of stored bytes and one decoded unit. Blocks; must not be used
/// on a thread of the runtime it fetches on.
pub struct UnitReader<'a> {
    maps: &'a [UnitMap],
    fetcher: Fetcher,
    coming: Peekable<Box<dyn Iterator<Item = UnitRef> + 'a>>,
    current: Lot,
    next: Lot,
    /// The unit decoded last, whole blocks.
    held: Option<UnitRef>,
    plain: Vec<u8>,
    /// What it was decoded from.
    stored: bytes::Bytes,
    /// Remembers what it decoded last, of this device only: another one may have units at the same place.
    decoder: Option<(usize, Decoder)>,
}

impl std::fmt::Debug for UnitReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UnitReader").field("held", &self.held).finish_non_exhaustive()
    }
}

impl<'a> UnitReader<'a> {
    /// A reader of the devices that `maps` are the maps of. `coming` says what will be asked for, in that order;
    /// whatever else is asked for costs a read of its own.
    pub fn new(
        maps: &'a [UnitMap],
        source: Arc<dyn BlobSource>,
        runtime: Handle,
        coming: Box<dyn Iterator<Item = UnitRef> + 'a>,
    ) -> Self {
        let fetcher = Fetcher { source, runtime, slots: Arc::new(Semaphore::new(SLOTS)) };
        let mut coming = coming.peekable();
        let next = Lot::start(&mut coming, maps, &fetcher);
        Self {
            maps,
            fetcher,
            coming,
            current: Lot::default(),
            next,
            held: None,
            plain: Vec::new(),
            stored: bytes::Bytes::new(),
            decoder: None,
        }
    }

    /// The bytes of `unit` as they belong in its device: whole blocks, zeros behind the end.
    /// Damaged bytes are fetched a second time before they are an error.
    ///
    /// # Errors
    /// [`ReadError::Fetch`] or [`ReadError::Damaged`]; [`ReadError::NoUnit`] for a unit that the
    /// device does not have.
    pub fn unit(&mut self, unit: UnitRef) -> Result<&[u8], ReadError> {
        if self.held != Some(unit) {
            self.held = None;
            self.load(unit)?;
            self.held = Some(unit);
        }
        Ok(&self.plain)
    }

    /// The same as [`UnitReader::unit`], and the stored bytes that it was made from.
    pub fn unit_and_stored(&mut self, unit: UnitRef) -> Result<(&[u8], &[u8]), ReadError> {
        self.unit(unit)?;
        Ok((&self.plain, &self.stored))
    }

    /// The map that [`UnitRef::device`] stands for.
    pub fn map(&self, device: usize) -> &'a UnitMap {
        &self.maps[device]
    }

    fn load(&mut self, at: UnitRef) -> Result<(), ReadError> {
        let map = &self.maps[at.device];
        let unit = map.get(at.index);
        let unit = *unit.ok_or(ReadError::NoUnit { blob: map.blob().clone(), decoded: ByteRange::default() })?;
        self.stored = bytes::Bytes::new();
        if !self.current.has(at) && self.next.has(at) {
            // First the old lot goes, then the new one is started: never three at once.
            self.current = std::mem::take(&mut self.next);
            self.next = Lot::start(&mut self.coming, self.maps, &self.fetcher);
        }
        let ahead = self.current.stored(at, unit.stored, &self.fetcher.runtime);
        let was_ahead = ahead.is_some();
        match self.decode(at, &unit, ahead) {
            Err(ReadError::Damaged { .. }) if was_ahead => {
                // It remembers failures as well.
                self.decoder = None;
                self.decode(at, &unit, None)
            }
            other => other,
        }
    }

    /// Decodes `unit` from the bytes fetched `ahead`, or from bytes fetched now.
    fn decode(
        &mut self,
        at: UnitRef,
        unit: &Unit,
        ahead: Option<Result<bytes::Bytes, SourceError>>,
    ) -> Result<(), ReadError> {
        let map = &self.maps[at.device];
        let blob = map.blob();
        let stored = ahead.unwrap_or_else(|| self.fetcher.fetch(blob, unit.stored));
        let stored = stored.map_err(|cause| ReadError::Fetch { blob: blob.clone(), chunk: at.index, cause })?;
        self.plain.resize(usize::try_from(unit.blocks().len()).expect("a unit has at most 16 MiB"), 0);
        let decoder = match self.decoder.take() {
            Some(last) if last.0 == at.device => last,
            _ => (at.device, map.decoder()),
        };
        let decoded = self.decoder.insert(decoder).1.decode(map.key(), unit, &stored, &mut self.plain);
        decoded.map_err(|cause| ReadError::Damaged { blob: blob.clone(), chunk: at.index, cause })?;
        self.stored = stored;
        Ok(())
    }
}
