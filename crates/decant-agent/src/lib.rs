//! One agent per worker: event loop, timers, sockets, wiring.

#![forbid(unsafe_code)]

pub mod ca;
pub mod client;
pub mod config;
pub mod tls;
