//! placeholder
#[derive(Debug)]
pub struct BlobTables;
#[derive(Debug)]
pub struct TablesError;
