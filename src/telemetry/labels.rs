//! The values that labels can have: closed sets, so that each has its place in an array.

use crate::base::Class;

/// A label with a fixed set of values.
pub trait Label: Copy + 'static {
    /// Its name in the exposition.
    const NAME: &'static str;
    /// All its values, each at its [`Label::index`].
    const ALL: &'static [Self];

    /// The place of this value in [`Label::ALL`].
    fn index(self) -> usize;

    /// This value in the exposition and in messages.
    fn text(self) -> &'static str;
}

/// A set of values that are declared with their texts.
macro_rules! label {
    ($(#[$doc:meta])* $type:ident as $name:literal { $($(#[$about:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $type { $($(#[$about])* $value,)+ }

        impl Label for $type {
            const NAME: &'static str = $name;
            const ALL: &'static [Self] = &[$(Self::$value,)+];

            fn index(self) -> usize {
                self as usize
            }

            fn text(self) -> &'static str {
                match self { $(Self::$value => $text,)+ }
            }
        }
    };
}

label! {
    /// How reads reach us.
    Backend as "backend" {
        Fanotify = "fanotify",
        Cachefiles = "cachefiles",
        FuseDevice = "fuse-device",
        FuseTree = "fuse-tree",
        Blobfs = "blobfs",
    }
}

label! {
    /// What a reader was told.
    Answer as "answer" {
        /// Everything was there.
        AtOnce = "at_once",
        /// It waited, and its data came.
        Filled = "filled",
        /// An error.
        Denied = "denied",
    }
}

label! {
    /// Why a unit did not come.
    Cause as "cause" {
        /// The source has it not, or cannot be reached.
        Source = "source",
        /// What came is not what the image promised.
        Corrupt = "corrupt",
        /// The cache's disk is full.
        NoSpace = "no_space",
        /// The cache's disk failed.
        Io = "io",
        /// Its turn did not come in time, by a limit of its image.
        Limit = "limit",
        /// The image has nothing there.
        Unmapped = "unmapped",
        /// Nobody wanted it any more.
        Cancelled = "cancelled",
    }
}

label! {
    /// How one read of a source ended.
    Outcome as "outcome" {
        Ok = "ok",
        /// The source does not have the blob, or does not hand it out.
        Refused = "refused",
        /// It cannot be reached, or broke off.
        Unavailable = "unavailable",
        /// It was not done when the reader's time was over.
        Late = "late",
        /// It answered something else than was asked for, or cannot be trusted.
        Improper = "improper",
        /// The local disk or network stack failed.
        Io = "io",
        /// Nobody wanted the bytes any more.
        Cancelled = "cancelled",
    }
}

impl Label for Class {
    const NAME: &'static str = "class";
    const ALL: &'static [Self] = &[Self::OnDemand, Self::Prefetch];

    fn index(self) -> usize {
        match self {
            Self::OnDemand => 0,
            Self::Prefetch => 1,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::OnDemand => "on_demand",
            Self::Prefetch => "prefetch",
        }
    }
}
