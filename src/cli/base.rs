//! Flags of commands that put trees over others.

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::build::{Base, Layer, Whiteouts};
use crate::reader::{LoadError, bootstrap};

/// What an image is built upon.
#[derive(Debug, clap::Args)]
pub(super) struct BaseArgs {
    /// Bootstrap of an image that the source is put over; what is in its blobs is not stored again
    #[arg(long, value_name = "BOOTSTRAP")]
    parent: Option<PathBuf>,

    /// Bootstrap of an image whose chunks are not stored again; needs its blobs to be served as well
    #[arg(long, value_name = "BOOTSTRAP")]
    chunk_dict: Option<PathBuf>,

    /// How the source says that something below it is gone. With a parent or several sources, what
    /// is gone goes, and if not given this is oci. Else whiteouts of a directory are left out, and if
    /// not given they are ordinary files; an archive keeps its own, for rafsd merge
    #[arg(long, value_enum, value_name = "HOW")]
    whiteouts: Option<WhiteoutArg>,
}

impl BaseArgs {
    /// Which whiteouts of a directory nobody will need.
    pub(super) fn dropped_whiteouts(&self) -> Whiteouts {
        let given = self.whiteouts.filter(|_| self.parent.is_none());
        given.map_or(Whiteouts::None, Whiteouts::from)
    }

    /// Opens the images.
    pub(super) fn open(&self) -> Result<Base, LoadError> {
        Ok(Base {
            parent: self.parent.as_deref().map(layer).transpose()?,
            whiteouts: self.whiteouts.unwrap_or(WhiteoutArg::Oci).into(),
            dictionary: self.chunk_dict.as_deref().map(layer).transpose()?,
        })
    }
}

/// The image at `path` under its own name.
pub(super) fn layer(path: &Path) -> Result<Layer, LoadError> {
    Ok(Layer { name: path.to_owned(), image: bootstrap::open(path)?, id: None })
}

/// [`Whiteouts`] as people write them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum WhiteoutArg {
    /// Files named .wh.NAME, as in container layers
    Oci,
    /// Character devices 0/0 and opaque xattrs, as in a directory that overlayfs wrote to
    Overlayfs,
    /// Nothing is ever removed
    None,
}

impl From<WhiteoutArg> for Whiteouts {
    fn from(arg: WhiteoutArg) -> Self {
        match arg {
            WhiteoutArg::Oci => Self::Oci,
            WhiteoutArg::Overlayfs => Self::Overlayfs,
            WhiteoutArg::None => Self::None,
        }
    }
}
