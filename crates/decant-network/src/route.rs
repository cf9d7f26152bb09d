//! Where a machine is reached, and who a proxy asks.

use std::future::Future;
use std::net::Ipv6Addr;
use std::time::Duration;

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
    /// Its address there, once known. While it is [`RouteState::Moving`] this is where it will be: proxies try it at once,
    /// so that the first connection succeeds with the listening socket and not with the next answer.
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

impl Route {
    /// Whether connections made by `self` still lead to the machine when `newer` is the latest answer. A machine on its way
    /// still closes its own connections; once it runs at another address, or nobody knows it, they are dead.
    pub fn still_leads(&self, newer: &Route) -> bool {
        match newer.state {
            RouteState::Here | RouteState::Moved => self.address == newer.address,
            RouteState::Moving => true,
            RouteState::Unknown => false,
        }
    }
}

/// Why a route could not be learnt.
#[derive(Debug, thiserror::Error)]
#[error("cannot learn where machine {machine} runs: {cause}")]
pub struct ResolveError {
    /// Which.
    pub machine: MachineId,
    /// What the resolver said.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Who knows where machines run; in the product the agent of this worker.
pub trait Resolver: Send + Sync + 'static {
    /// Where `machine` runs. With `known`, the answer may be held back for up to `wait` as long as it would equal `known`;
    /// an answer equal to `known` before `wait` has passed is allowed but costs a request every few milliseconds.
    fn route(
        &self,
        machine: &MachineId,
        known: Option<&Route>,
        wait: Duration,
    ) -> impl Future<Output = Result<Route, ResolveError>> + Send;
}
