//! New blobs, read back through the bootstrap that was made for them before either has its name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::blobwriter::FinishedBlob;
use crate::base::{BlobId, ByteRange};
use crate::blob::{BlobTables, DecodeError, Decoder, TablesError};
use crate::image::{Image, ImageError};

/// What is wrong with an image that was just written.
#[derive(Debug, thiserror::Error)]
pub enum RecheckError {
    #[error("the bootstrap cannot be read")]
    Image(#[from] ImageError),
    #[error("the bootstrap does not name blob {0}")]
    Unnamed(BlobId),
    #[error("blob {blob} cannot be read")]
    Read {
        blob: BlobId,
        #[source]
        cause: io::Error,
    },
    #[error("the tables of a blob cannot be used")]
    Tables(#[from] TablesError),
    #[error("chunk {chunk} of blob {blob} is damaged")]
    Chunk {
        blob: BlobId,
        chunk: usize,
        #[source]
        cause: DecodeError,
    },
}

/// Reads `bootstrap` as a reader would, and through it every chunk of these blobs.
pub(super) fn image(bootstrap: &[u8], blobs: &[FinishedBlob]) -> Result<(), RecheckError> {
    let image = Image::parse(bootstrap.to_vec())?;
    blobs.iter().try_for_each(|blob| chunks(&image, blob))
}

fn chunks(image: &Image, blob: &FinishedBlob) -> Result<(), RecheckError> {
    let device = image.devices().iter().find(|device| device.blob == blob.id);
    let device = device.ok_or_else(|| RecheckError::Unnamed(blob.id.clone()))?;
    let failed = |cause| RecheckError::Read { blob: blob.id.clone(), cause };
    let file = File::open(blob.temporary_path()).map_err(failed)?;
    let read = |range: ByteRange, into: &mut Vec<u8>| {
        into.resize(usize::try_from(range.len()).expect("a table or a chunk that was in memory"), 0);
        file.read_exact_at(into, range.start()).map_err(failed)
    };
    let tables = BlobTables::new(&device.entry)?;
    let (mut stored, mut plain, mut decoder) = (Vec::new(), Vec::new(), Decoder::new());
    read(tables.stored(), &mut stored)?;
    let map = tables.with_digests(&tables.geometry(&stored)?, image.chunk_records().iter())?;
    for (chunk, unit) in map.units().iter().enumerate() {
        read(unit.stored, &mut stored)?;
        plain.resize(usize::try_from(unit.blocks().len()).expect("a unit has at most 16 MiB"), 0);
        let decoded = decoder.decode(map.key(), unit, &stored, &mut plain);
        decoded.map_err(|cause| RecheckError::Chunk { blob: blob.id.clone(), chunk, cause })?;
    }
    Ok(())
}
