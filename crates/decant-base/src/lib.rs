//! Identifiers, epochs, units and extent sets: the words every other crate speaks.
//!
//! Nothing here does I/O, with one exception that exists for tests: [`crash`].

#![forbid(unsafe_code)]

pub mod cgroup;
pub mod crash;
mod extents;
mod ids;
mod units;

pub use extents::{Extent, ExtentSet};
pub use ids::{DrainId, InvalidId, MachineId, MigrationId, VolumeId, WorkerId};
pub use units::{BLOCK, Bytes, Epoch, SECTOR, UnitError};
