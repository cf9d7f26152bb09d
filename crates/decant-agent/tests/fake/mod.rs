//! A fleet of real agents over a fake world: volumes are a number that every start of the machine raises by one, and
//! the world itself watches that no machine runs twice and that no number is lost.

#![allow(dead_code, reason = "each test file uses its part")]

mod fleet;
mod world;

pub(crate) use fleet::{Fleet, id, retry_until};
pub(crate) use world::Hold;

/// A plane of an empty world.
pub(crate) fn plane(worker: &str) -> impl decant_dataplane::Plane {
    world::FakePlane { world: std::sync::Arc::default(), worker: worker.to_owned() }
}

/// A driver of an empty world.
pub(crate) fn machines(worker: &str) -> impl decant_agent::Machines {
    world::FakeMachines { world: std::sync::Arc::default(), worker: worker.to_owned() }
}
