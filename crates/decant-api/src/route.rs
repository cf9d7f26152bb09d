//! Where a machine is reached, for proxies.

use std::net::Ipv6Addr;

use decant_base::{Epoch, MachineId, WorkerId};
use serde::{Deserialize, Serialize};

/// The answer to "where does this machine run?".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Which.
    pub machine: MachineId,
    /// Where it stands.
    pub state: RouteState,
    /// The worker that owns it, or that it is on its way to.
    #[serde(default)]
    pub worker: Option<WorkerId>,
    /// Its address there, once known.
    #[serde(default)]
    pub address: Option<Ipv6Addr>,
    /// The epoch of the claim; of two answers the higher is right.
    pub epoch: Epoch,
}

/// Where a machine stands, as a proxy needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteState {
    /// It runs on the worker asked.
    Here,
    /// It runs on `worker`.
    Moved,
    /// It is between two workers, or starting: hold the connection and ask again.
    Moving,
    /// Nobody asked knows it.
    Unknown,
}
