//! Machine drivers: the process driver and its shim.

mod spec;

pub use spec::{Bind, HealthCheck, MachineSpec, RestartPolicy};
