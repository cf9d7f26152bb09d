//! Addresses, links and routes of machines, and the proxy that follows them.

mod addresses;
mod links;
pub mod proxy;
mod route;

pub use addresses::{MachineAddress, NotAMachine, Prefix, worker_prefix};
pub use links::{LinkError, MachineLink, ensure_machine_link, ensure_route, ensure_worker, remove_machine_link};
pub use route::{ResolveError, Resolver, Route, RouteState};
