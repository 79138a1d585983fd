//! What was made of images that exist, read again before anything of it has its name.

use std::num::NonZeroUsize;
use std::thread;

use super::blobwriter::FinishedBlob;
use super::verify::{self, Expected, VerifyError};
use crate::base::BlobId;
use crate::format::rafs::DigestAlgorithm;
use crate::image::{Image, ImageError};

/// What is wrong with an image that was just written.
#[derive(Debug, thiserror::Error)]
pub enum RecheckError {
    #[error("the bootstrap cannot be read")]
    Image(#[from] ImageError),
    #[error("the bootstrap does not say what it was made from")]
    Metadata(#[source] VerifyError),
    #[error("the bootstrap does not name blob {0}")]
    Unnamed(BlobId),
    #[error("blob {blob} cannot be used")]
    Blob {
        blob: BlobId,
        #[source]
        cause: VerifyError,
    },
}

/// Reads `bytes` as a reader would, and compares what they say with what they were made from.
pub(super) fn bootstrap(bytes: Vec<u8>, expected: &Expected<'_>) -> Result<Image, RecheckError> {
    let image = Image::parse(bytes)?;
    verify::metadata(&image, expected).map_err(RecheckError::Metadata)?;
    Ok(image)
}

/// The same, and reads every chunk of these blobs through the bootstrap. Each blob keeps the digest
/// of its own row.
pub(super) fn image(bytes: Vec<u8>, expected: &Expected<'_>, blobs: &[FinishedBlob]) -> Result<Image, RecheckError> {
    let image = bootstrap(bytes, expected)?;
    let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    for blob in blobs {
        let device = image.devices().iter().find(|device| device.blob == blob.id);
        let device = device.ok_or_else(|| RecheckError::Unnamed(blob.id.clone()))?;
        let digest = DigestAlgorithm::from_number(device.entry.digest.get()).unwrap_or(expected.digest);
        let checked = verify::blob(&image, blob, digest, threads);
        checked.map_err(|cause| RecheckError::Blob { blob: blob.id.clone(), cause })?;
    }
    Ok(image)
}
