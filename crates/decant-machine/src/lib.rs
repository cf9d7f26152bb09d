//! Machine drivers: the process driver and its shim.

#![deny(unsafe_code)]

mod cgroup;
mod driver;
mod protocol;
pub mod shim;
mod spec;
mod status;
#[allow(unsafe_code)]
mod sys;

pub use driver::{Change, DeviceBusy, DriverConfig, MachineError, Prepare, ProcessDriver, Survivor, probe_exclusive};
pub use spec::{Bind, HealthCheck, Limits, MachineSpec, RestartPolicy};
pub use status::{Exit, State, Status, Timings};
