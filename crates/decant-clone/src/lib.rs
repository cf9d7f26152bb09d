//! Which blocks of a clone are here, what to fetch next, what may be acknowledged, and the map that says so.
//!
//! Sans-I/O: nothing here opens a file, reads a clock or starts a thread. The volume process owns the image, the map file,
//! the marks file and the origin, and asks this crate what to do with them:
//!
//! | module | owns |
//! |---|---|
//! | [`shape`] | sizes: blocks, sectors, map pages |
//! | [`blocks`] | the state of each block, in memory |
//! | [`format`](mod@format) | the map file's bytes, as docs/clone-map.md has them |
//! | [`file`](mod@file) | which slot holds what; commits and superblock updates as lists of writes |
//! | [`marks`] | the marks file, which carries acknowledged writes over the death of the process |
//! | [`core`](mod@core) | reads, writes, fetches and stores against each other |
//! | [`demand`] | parked reads and read-ahead |
//! | [`pace`] | how much may be in flight, and the rate limit |
//! | [`progress`] | counters, rate, and the word for what hinders |
//! | [`verify`] | the comparison before the origin is let go |
//!
//! Invariants, each with a test that breaks when it does:
//! - a block is read locally only if its bytes are here; a missing one is never answered with what the file happens to hold;
//! - fetched bytes are never stored over a byte that the guest wrote or discarded;
//! - a mark that reaches the medium has its bytes on the medium already;
//! - a block is not asked for while it is in flight or here.

#![forbid(unsafe_code)]

pub mod blocks;
pub mod core;
pub mod demand;
pub mod file;
pub mod format;
pub mod marks;
pub mod pace;
pub mod progress;
pub mod shape;
pub mod verify;

pub use crate::blocks::{BlockMap, Entry, State};
pub use crate::core::{Arrival, Begin, Came, Class, CloneCore, Kind, Plan, WriteId};
pub use crate::file::{Commit, Identity, MapError, MapFile, Scope, SyncedWrite};
pub use crate::shape::{Shape, ShapeError};
