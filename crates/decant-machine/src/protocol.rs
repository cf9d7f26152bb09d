//! What a driver and a shim say to each other on `shim.sock`: one JSON object per line, one answer per request, in order.

use decant_base::{Epoch, MachineId};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

use crate::spec::MachineSpec;
use crate::status::Status;

/// Longest request. Far above any that a driver makes.
pub(crate) const MAX_LINE: usize = 4096;

/// What a shim is started with: the file `shim.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShimConfig {
    /// What it runs.
    pub(crate) spec: MachineSpec,
    /// For which claim.
    pub(crate) epoch: Epoch,
    /// The machine's network namespace.
    pub(crate) netns: PathBuf,
    /// `run_dir/machines/<machine>`.
    pub(crate) run: PathBuf,
    /// Where the log is.
    pub(crate) logs: PathBuf,
    /// The machine's cgroup; `shim` and `program` are below it.
    pub(crate) cgroup: PathBuf,
}

/// A block device, as a shim needs to know it: it sees none of the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Device {
    /// Its path on the host, for messages.
    pub(crate) path: PathBuf,
    /// Major number.
    pub(crate) major: u32,
    /// Minor number.
    pub(crate) minor: u32,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// How does it stand?
    Status,
    /// Mount the device at /data and execute the program. Answered when it is executed.
    Go {
        /// For a machine with a volume.
        device: Option<Device>,
    },
    /// Write /data's dirty pages back. Answered when they are.
    Sync,
    /// Trim /data. Answered when it is.
    Trim,
    /// Stop signal, then unmount. Answered when stopped.
    Stop,
    /// SIGKILL, then unmount. Answered when stopped.
    Kill,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// Done, or had been done before.
    Done {
        /// How the machine stands now.
        status: Status,
        /// For a trim.
        trimmed_bytes: u64,
    },
    /// Not done.
    Refused {
        /// Why.
        reason: String,
        /// How the machine stands now.
        status: Status,
    },
}

/// What a starting shim says on its standard output, one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Hello {
    /// It waits for `go`.
    Ready(MachineId),
    /// It could not make the machine.
    Failed(String),
}
