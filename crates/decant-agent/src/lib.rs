//! One agent per worker: event loop, timers, sockets, wiring.
//!
//! What to open first: [`Running::start`] (what an agent is made of), then `core` (the one owner of all rows), then
//! `server` (the API) and `peers` (messages). No byte of a volume and no client's connection passes through here: an
//! agent may be killed at any time while machines run on.

#![forbid(unsafe_code)]

mod agent;
pub mod ca;
pub mod client;
mod clock;
pub mod config;
mod core;
mod errands;
mod machines;
mod peers;
mod routes;
mod run;
mod server;
mod statuses;
pub mod tls;
mod view;
mod watch;

pub use agent::{Deps, Running, StartError};
/// The crash points that agents pass, for whoever kills one at each.
pub use decant_drain::{MESSAGE_POINTS, POINTS};
pub use machines::{Machines, Processes};
pub use run::{FUSE, RunError, fuse, proxy_main, run};
