//! HTTP, once for everybody who needs it.
//!
//! [`client()`] builds the one kind of client there is: bounded in time and in redirects, with TLS by
//! *ring* and the system's trust roots. [`RetryPolicy`] decides whether and when to ask again, as
//! plain arithmetic on times that are passed in. [`server`] is the other end: a small static server
//! with ranges, for the demo, the tests and the benches, that can also misbehave on request.
//!
//! Nothing here knows what a blob is for.

mod address;
pub mod auth;
mod client;
mod clock;
mod endpoint;
mod health;
pub mod hosts;
mod limit;
mod outlet;
mod pace;
pub mod proxy;
mod redirects;
mod registry;
mod retry;
pub mod server;

pub(crate) use address::is_special;
pub use address::{Lookup, Names};
pub use client::{ClientError, ClientOptions, IdentityFiles, Proxy, client, install_tls};
pub use clock::{Clock, Elapsed, Timekeeper};
pub(crate) use endpoint::sorted;
pub use endpoint::{Ask, Authorize, AuthorizeFuture, Endpoint, EndpointOptions, Reply, SendError, without_secrets};
pub use health::{Health, Standing};
pub use limit::{Rate, Slot, Slots};
pub use pace::{HostLimits, HostPace, Passage};
pub use registry::{DOCKER, canonical};
pub use retry::{Attempt, RetryPolicy, retry_after};
