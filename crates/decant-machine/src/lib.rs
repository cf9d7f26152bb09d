//! Machine drivers: the process driver and its shim.

#![deny(unsafe_code)]

mod cgroup;
mod driver;
mod inside;
mod protocol;
pub mod shim;
mod spec;
mod status;
#[allow(unsafe_code)]
mod sys;

pub use driver::{Change, DeviceBusy, DriverConfig, MachineError, Prepare, ProcessDriver, Survivor, probe_exclusive};
pub use inside::inside;
pub use spec::{Bind, HealthCheck, Limits, MachineSpec, RestartPolicy};
pub use status::{Exit, State, Status, Timings};

/// The control group of a worker's machines, for whoever clears up after a worker that is gone.
///
/// # Errors
/// When no cgroup2 is mounted.
pub fn worker_cgroup(worker: &str, run_dir: &std::path::Path) -> std::io::Result<std::path::PathBuf> {
    Ok(cgroup::of_worker(&cgroup::mount_point()?, worker, run_dir))
}
