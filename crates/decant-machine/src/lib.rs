//! Machine drivers: the process driver and its shim.

mod driver;
pub mod shim;
mod spec;
mod status;

pub use driver::{Change, DriverConfig, MachineError, Prepare, ProcessDriver, Survivor};
pub use spec::{Bind, HealthCheck, Limits, MachineSpec, RestartPolicy};
pub use status::{Exit, State, Status, Timings};
