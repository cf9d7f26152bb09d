//! What a machine is: the part of it that moves between workers unchanged.

use std::collections::BTreeMap;
use std::path::PathBuf;

use decant_base::{MachineId, VolumeId};
use serde::{Deserialize, Serialize};

/// A machine of the process driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Its name, unique in the fleet.
    pub id: MachineId,
    /// Program and arguments, as seen inside the machine's root. The program is an absolute path.
    pub command: Vec<String>,
    /// Added to the environment; nothing is inherited from the host but a plain PATH.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// User id the program runs as.
    #[serde(default = "nobody")]
    pub uid: u32,
    /// Group id the program runs as.
    #[serde(default = "nobody")]
    pub gid: u32,
    /// Its volume, mounted at `/data`; a machine without one is stateless.
    #[serde(default)]
    pub volume: Option<VolumeId>,
    /// Host files or directories bound read-only into the root besides /usr and /etc, e.g. the program. They must exist on every
    /// worker the machine may move to; prepare checks.
    #[serde(default)]
    pub binds: Vec<Bind>,
    /// Stop signal by number; 15 (SIGTERM) unless said.
    #[serde(default = "sigterm")]
    pub stop_signal: i32,
    /// How long the stop signal may take before SIGKILL, in milliseconds.
    #[serde(default = "ten_seconds")]
    pub stop_timeout_ms: u64,
    /// What happens when the program ends by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// When the machine counts as serving.
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// What it may use of the host; only where the host delegates cgroup2 controllers.
    #[serde(default)]
    pub limits: Limits,
    /// Its index in addresses: the `machine` field of its /112, unique in the fleet, never 0.
    pub address_index: u32,
    /// Machines of one group are not drained at the same time.
    #[serde(default)]
    pub group: Option<String>,
    /// Labels that a worker must have to be chosen for it; workers that know nothing of them never see an empty map.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub needs: BTreeMap<String, String>,
}

/// What a machine may use of its host. Where a cgroup2 controller is not delegated, its limit does not hold and the driver says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory (`memory.max`).
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Hundredths of one processor (`cpu.max`): 150 is one and a half.
    #[serde(default)]
    pub cpu_percent: Option<u32>,
    /// Processes and threads (`pids.max`).
    #[serde(default)]
    pub pids: Option<u32>,
}

/// One read-only bind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// Inside the machine.
    pub target: PathBuf,
}

/// What happens when the program ends by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// It is started again, with a growing pause of at most 10 s.
    #[default]
    Always,
    /// Only after a non-zero exit status or a signal.
    OnFailure,
    /// It stays down.
    Never,
}

/// A TCP connection to `port` of the machine's address must be accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// TCP port inside the machine.
    pub port: u16,
    /// An HTTP path that must answer 2xx; without one, accepting is enough.
    #[serde(default)]
    pub http_path: Option<String>,
}

fn nobody() -> u32 {
    65534
}

fn sigterm() -> i32 {
    15
}

fn ten_seconds() -> u64 {
    10_000
}
