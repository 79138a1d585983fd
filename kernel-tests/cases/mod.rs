//! Cases that run the daemon, and the facts it rests on.

pub(crate) mod events;
pub(crate) mod faults;
mod fixture;
pub(crate) mod images;
pub(crate) mod interop;
pub(crate) mod lifecycle;
pub(crate) mod reading;
pub(crate) mod sharing;
pub(crate) mod space;
