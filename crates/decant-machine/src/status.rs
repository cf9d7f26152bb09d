//! How a machine stands, in the shim's words: in `status.json` and on `shim.sock`.

use decant_base::{Epoch, MachineId};
use serde::{Deserialize, Serialize};

/// How a machine stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Which.
    pub machine: MachineId,
    /// The claim it was prepared for.
    pub epoch: Epoch,
    /// Its state.
    pub state: State,
    /// What it waits for or what went wrong, in words; `None` when there is nothing to say.
    #[serde(default)]
    pub reason: Option<String>,
    /// Whether writing /data back failed when it was stopped: what the program wrote last may not be on the device.
    #[serde(default)]
    pub unclean: bool,
    /// Times the program was started again since `go`.
    pub restarts: u32,
    /// How the program ended last.
    #[serde(default)]
    pub last_exit: Option<Exit>,
    /// Unix milliseconds of the last change of `state`.
    pub since_ms: u64,
    /// The program's process id on the host; only while it runs, and only for people to look at.
    #[serde(default)]
    pub pid: Option<u32>,
    /// What the steps cost.
    #[serde(default)]
    pub timings: Timings,
}

/// A machine's state under its shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Prepared: everything is made, nothing is mounted, the program is not executed.
    Waiting,
    /// `go` was said; /data is being mounted.
    Mounting,
    /// The program runs.
    Running,
    /// The program ended and will be started again after a pause.
    Restarting,
    /// The program ended and its restart policy keeps it down; /data is still mounted.
    Exited,
    /// It is being stopped.
    Stopping,
    /// No process, no mount. The shim is about to end.
    Stopped,
    /// It cannot go on; `reason` says why. Stop clears it.
    Failed,
    /// Its shim is gone without having stopped it: killed, and all of the machine with it, or the host was restarted. Only a
    /// driver says this.
    Lost,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// With this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Microseconds that the steps took, 0 where not taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Shim start to waiting for `go`.
    pub prepare_us: u64,
    /// `mount` of /data, journal replay included.
    pub mount_us: u64,
    /// `go` to the program's `execve`.
    pub start_us: u64,
    /// Stop signal to an empty cgroup.
    pub end_us: u64,
    /// Write-back and `umount` of /data.
    pub unmount_us: u64,
}
