//! Chunks for the rewriting of images, read through the image's own tables.

use crate::blob::Recipe;
use crate::build::{BuildError, ChunkBytes, ChunkPlace, ChunkSource};
use crate::format::rafs::Algorithm;
use crate::reader::{Files, ReadError, UnitRef};

impl ChunkSource for Files {
    fn read_each(
        &self,
        places: &[ChunkPlace],
        visit: &mut dyn FnMut(ChunkBytes<'_>) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let failed = |error: ReadError| BuildError::Chunk(Box::new(error));
        let units = places.iter().map(|place| unit(self, place)).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let mut reader = self.units(Box::new(units.clone().into_iter()));
        for (place, at) in places.iter().zip(units) {
            let unit = self.maps()[at.device].get(at.index).expect("found in the map");
            let (blocks, stored) = reader.unit_and_stored(at).map_err(failed)?;
            let plain = &blocks[..usize::try_from(place.decoded.len()).expect("a chunk has at most 16 MiB")];
            let alone = unit.part.is_none() && !unit.encrypted;
            let stored = algorithm(unit.recipe).filter(|_| alone).map(|algorithm| (algorithm, stored));
            visit(ChunkBytes { plain, stored })?;
        }
        Ok(())
    }
}

/// The unit that is exactly the chunk at `place`.
fn unit(files: &Files, place: &ChunkPlace) -> Result<UnitRef, ReadError> {
    let map = &files.maps()[place.device];
    let units = map.covering(place.decoded).unwrap_or(0..0);
    let index = units.start;
    let found = map.get(index).filter(|unit| units.len() == 1 && unit.decoded == place.decoded);
    let missing = || ReadError::NoUnit { blob: map.blob().clone(), decoded: place.decoded };
    found.map(|_| UnitRef { device: place.device, index }).ok_or_else(missing)
}

/// What the format calls the way in which a unit is stored, if it stands for itself.
fn algorithm(recipe: Recipe) -> Option<Algorithm> {
    match recipe {
        Recipe::Plain => Some(Algorithm::None),
        Recipe::Lz4Block => Some(Algorithm::Lz4Block),
        Recipe::Zstd => Some(Algorithm::Zstd),
        Recipe::Gzip => Some(Algorithm::Gzip),
        Recipe::GzipWindow => None,
    }
}
