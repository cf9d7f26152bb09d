//! Addresses, links and routes of machines, and the proxy that follows them.

#![deny(unsafe_code)]

mod addresses;
mod lab;
mod links;
mod netlink;
mod netns;
pub mod proxy;
mod route;
mod switch;

pub use addresses::{MachineAddress, NotAMachine, Prefix, worker_prefix};
pub use lab::{LABS, Lab, LabError};
pub use links::{
    LinkError, MachineLink, ensure_machine_link, ensure_route, ensure_worker, remove_machine_link, remove_route,
};
pub use netlink::Counters;
pub use netns::NetNs;
pub use route::{ResolveError, Resolver, Route, RouteState};
pub use switch::Shape;
