//! What a data plane can be told and what it answers.
//!
//! A plane does the block work of one worker: it makes encrypted volumes, attaches them as block devices, serves a
//! sealed one to another worker, and fills a clone from there. [`Command`]s are idempotent: the agent journals a step
//! first and performs its commands after, perhaps more than once. Two planes speak this vocabulary, the userspace one
//! and later the kernel's; [`Promises`] says what each can keep.

#![forbid(unsafe_code)]

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use decant_base::{Bytes, Epoch, ExtentSet, MigrationId, VolumeId};
use serde::{Deserialize, Serialize};

/// The shape of an encrypted volume that must be the same on every worker it lives on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Bytes of payload, the size of the device the file system sees. A multiple of `sector_size`, at least 1 MiB.
    pub size: Bytes,
    /// Encryption sector and logical sector of the device: 512 or 4096, fixed for the volume's life.
    pub sector_size: u32,
    /// The cipher as LUKS2 names it; only `aes-xts-plain64` is allowed.
    pub cipher: String,
    /// Bytes of volume key: 64 for AES-256-XTS.
    pub key_bytes: u32,
    /// Added to a sector's number to make its tweak (LUKS2 `iv_tweak`), in 512-byte sectors.
    pub iv_tweak: u64,
}

/// What the source hands over at the seal. Blocks are 4 KiB of the payload.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// Blocks that hold data; every other block reads as plaintext zeros and need not be moved.
    pub live: ExtentSet,
    /// SHA-256, hex, of the LUKS2 header as the source sent it in [`Outcome::ExportOpened`].
    pub header_digest: String,
}

/// What a clone's missing blocks travel over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// NBD over mutual TLS: on any network.
    #[default]
    Nbd,
    /// iSCSI in the clear. CHAP authenticates the login and nothing after it, so both workers must trust the network between them.
    Iscsi,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nbd => "nbd",
            Self::Iscsi => "iscsi",
        })
    }
}

/// The one peer that may read an export.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reader {
    /// SHA-256 fingerprint, hex, of its certificate: the only one that an NBD export lets in.
    pub certificate: String,
    /// Where it connects from: the only address that an iSCSI export lets in.
    pub address: IpAddr,
    /// What it speaks.
    pub protocol: Protocol,
}

/// A secret that opens one export and ends with it. It is drawn for one migration, lies in files of root's alone, and opens
/// ciphertext, no key; it shows itself in no log.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExportSecret(String);

impl ExportSecret {
    /// Bytes of randomness, half of them for each direction of mutual CHAP.
    pub const RANDOM_BYTES: usize = 32;

    /// From fresh random bytes.
    pub fn new(random: [u8; Self::RANDOM_BYTES]) -> Self {
        Self(random.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// What the reader proves itself with, 32 hex digits; `None` if a peer sent something else.
    pub fn of_reader(&self) -> Option<&str> {
        self.halves().map(|(reader, _)| reader)
    }

    /// What the export proves itself with, 32 hex digits; `None` if a peer sent something else.
    pub fn of_export(&self) -> Option<&str> {
        self.halves().map(|(_, export)| export)
    }

    fn halves(&self) -> Option<(&str, &str)> {
        let is_whole = self.0.len() == 2 * Self::RANDOM_BYTES && self.0.bytes().all(|byte| byte.is_ascii_hexdigit());
        self.0.split_at_checked(Self::RANDOM_BYTES).filter(|_| is_whole)
    }
}

impl fmt::Debug for ExportSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExportSecret(..)")
    }
}

/// How reader and export know each other.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "protocol")]
pub enum Access {
    /// NBD over mutual TLS.
    Nbd {
        /// SHA-256 fingerprint, hex, of the certificate the server must show.
        certificate: String,
    },
    /// iSCSI with mutual CHAP.
    Iscsi {
        /// Of this export alone.
        secret: ExportSecret,
    },
}

impl Access {
    /// What is spoken.
    pub fn protocol(&self) -> Protocol {
        match self {
            Self::Nbd { .. } => Protocol::Nbd,
            Self::Iscsi { .. } => Protocol::Iscsi,
        }
    }
}

/// Where a clone's missing blocks come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Where the source's volume process listens.
    pub address: SocketAddr,
    /// The NBD export name, or the iSCSI target name (IQN).
    pub export: String,
    /// How it is opened.
    pub access: Access,
}

/// An order to the plane. Each is idempotent: performing it again changes nothing and gives the same outcome.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum Command {
    /// Makes an encrypted volume of `size` with a fresh volume key, this worker's own header size, and ext4 inside. `Done`.
    Create {
        /// Its id.
        volume: VolumeId,
        /// Payload bytes.
        size: Bytes,
        /// 512 or 4096.
        sector_size: u32,
    },
    /// Removes a volume and all its files, detached first. `Done`, also if there was none.
    Delete {
        /// Which.
        volume: VolumeId,
    },
    /// Makes the volume's device appear, a plain volume or a clone that [`Command::Begin`] has begun. `Attached`.
    Attach {
        /// Which.
        volume: VolumeId,
    },
    /// Takes the device away; its last user is gone. A clone stops filling. `Done`.
    Detach {
        /// Which.
        volume: VolumeId,
    },
    /// Source, prepare: opens the export for one migration and one peer. Requests are parked until the seal. `ExportOpened`.
    OpenExport {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
        /// Who may connect, and how.
        reader: Reader,
    },
    /// Source: no write lands from here on; what was written is durable; the export answers. `Sealed`.
    /// Fails if anybody still has the device open. After a restart of the host it opens the export again on the same port.
    Seal {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
        /// Who may connect, and how.
        reader: Reader,
    },
    /// Source: closes the export of `migration`, whatever its state; a sealed volume may be attached again. `Done`.
    CloseExport {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
    },
    /// Destination, prepare: proves room and the key, and makes the volume with the carried geometry. `Done`.
    Prepare {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
        /// As the source has it.
        geometry: Geometry,
        /// The source's LUKS2 header area, binary header to end of keyslots, base64.
        header: String,
        /// Bytes that must be free here, the source's allocated payload.
        room: Bytes,
    },
    /// Destination, prepare: connects to the origin and makes the clone's device appear; nothing is read before `Begin`. `Attached`.
    Assemble {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
        /// Whence.
        origin: Origin,
    },
    /// Destination, after the grant: writes the clone's map durably and lets I/O flow. Assembles first if need be. `Attached`.
    Begin {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
        /// The new owner's epoch, mirrored in the volume's metadata.
        epoch: Epoch,
        /// Whence.
        origin: Origin,
        /// What is live.
        seal: Seal,
    },
    /// Destination: removes what `Prepare` and `Assemble` made, unless the volume was begun. `Done`.
    Abandon {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
    },
    /// Re-reads fetched blocks from the medium, compares them with the origin's digests, then durably drops the map.
    /// `Verified`; fails with `NotYet` while blocks are missing.
    Verify {
        /// Which.
        volume: VolumeId,
        /// For.
        migration: MigrationId,
    },
    /// Limits hydration, or lifts the limit. `Done`.
    Limit {
        /// Which.
        volume: VolumeId,
        /// Bytes per second; `None` is no limit.
        rate: Option<Bytes>,
    },
    /// What to do with reads of missing blocks while the origin is away. `Done`.
    Policy {
        /// Which.
        volume: VolumeId,
        /// The policy.
        policy: MissingPolicy,
    },
    /// Source, after retention: discards the payload of a sealed copy. `Done`.
    Free {
        /// Which.
        volume: VolumeId,
    },
    /// How the volume stands. `Status`.
    Status {
        /// Which.
        volume: VolumeId,
    },
}

impl Command {
    /// The volume the command is about.
    pub fn volume(&self) -> &VolumeId {
        match self {
            Self::Create { volume, .. }
            | Self::Delete { volume }
            | Self::Attach { volume }
            | Self::Detach { volume }
            | Self::OpenExport { volume, .. }
            | Self::Seal { volume, .. }
            | Self::CloseExport { volume, .. }
            | Self::Prepare { volume, .. }
            | Self::Assemble { volume, .. }
            | Self::Begin { volume, .. }
            | Self::Abandon { volume, .. }
            | Self::Verify { volume, .. }
            | Self::Limit { volume, .. }
            | Self::Policy { volume, .. }
            | Self::Free { volume }
            | Self::Status { volume } => volume,
        }
    }
}

/// What a read of a missing block gets while the origin cannot be reached. It never gets invented bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MissingPolicy {
    /// It waits; of more than 96 at once, those that came last fail once nothing came from the origin for 10 s, so that writes go on.
    #[default]
    Wait,
    /// It fails with EIO at once.
    Eio,
}

/// What came of a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// It is done.
    Done,
    /// The device is there.
    Attached {
        /// A block device, e.g. `/dev/loop3`.
        device: PathBuf,
    },
    /// The export listens.
    ExportOpened {
        /// Where the peer connects.
        origin: Origin,
        /// What the peer must make its volume like.
        geometry: Geometry,
        /// The LUKS2 header area, base64.
        header: String,
        /// Allocated payload bytes, the room the peer needs at most.
        room: Bytes,
    },
    /// No write lands any more.
    Sealed(Seal),
    /// Every block is here and was compared.
    Verified(Verification),
    /// How it stands.
    Status(Box<VolumeStatus>),
}

/// What the verification before the origin is let go found, in 4 KiB blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Verification {
    /// Re-read from the medium and equal to the origin's digest.
    pub compared: u64,
    /// Not compared: overwritten here since.
    pub overwritten: u64,
    /// Not compared: discarded here, or never live.
    pub discarded: u64,
    /// Differed, fetched again, then equal.
    pub repaired: u64,
}

/// How a volume stands on this worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Which.
    pub volume: VolumeId,
    /// What it is now.
    pub state: VolumeState,
    /// Its shape.
    pub geometry: Geometry,
    /// Bytes of LUKS2 header before the payload on this worker.
    pub header_bytes: Bytes,
    /// Bytes allocated on this worker for the payload.
    pub allocated: Bytes,
    /// The epoch mirrored in its metadata.
    pub epoch: Epoch,
    /// The block device while attached.
    pub device: Option<PathBuf>,
    /// How far a clone is.
    pub clone: Option<CloneStatus>,
    /// Why the volume acknowledges nothing any more, e.g. a failed fsync.
    pub failed: Option<String>,
}

/// What a volume is on this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Whole, not attached.
    Detached,
    /// Whole, attached.
    Attached,
    /// Made by `Prepare`, not begun.
    Prepared,
    /// A clone that is still filling.
    Hydrating,
    /// Sealed: read by its new owner, written by nobody.
    Sealed,
    /// Freed: the payload is discarded.
    Freed,
}

/// How far a clone is. Exact at any moment; bytes of payload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CloneStatus {
    /// Bytes that were live at the seal.
    pub bytes_total: u64,
    /// Fetched from the origin and not overwritten or discarded since.
    pub bytes_filled: u64,
    /// Of what was live, written here, fetched before or not.
    pub bytes_written: u64,
    /// Of what was live, discarded here, fetched before or not.
    pub bytes_discarded: u64,
    /// The exposure: bytes that exist only at the origin.
    pub bytes_missing: u64,
    /// Bytes read from the origin, repeats and read-ahead included.
    pub bytes_fetched: u64,
    /// Fetch rate over the last few seconds.
    pub rate_bytes_per_s: u64,
    /// Reads that wait for the origin now.
    pub parked_reads: u64,
    /// The origin: where, and whether it answers.
    pub origin: String,
    /// Whether a session to the origin is up.
    pub connected: bool,
    /// SLOW, THROTTLED, STALLED or why else it does not progress; empty when it does.
    pub hindrance: String,
    /// The first missing ranges in bytes, at most 1,000 runs.
    pub missing: ExtentSet,
}

/// Why a command failed. `code` is stable; `message` is for people, with cause and fix.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind.
    pub code: FailureCode,
    /// Name, cause, fix.
    pub message: String,
}

/// What the caller should do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// Passing: try again with backoff.
    Retry,
    /// Not ready, e.g. `Verify` while hydrating: ask again later.
    NotYet,
    /// The command cannot succeed here as things are: unwind.
    Refused,
    /// A person is needed: damaged map, failed fsync, wrong state on disk.
    Stuck,
}

/// What a plane can keep; the API names what it cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Promises {
    /// A fetched read is kept and never fetched again.
    pub reads_are_kept: bool,
    /// A write never waits for the network.
    pub writes_never_wait: bool,
    /// Blocks are compared from the medium before the origin is let go.
    pub verifies_from_medium: bool,
}

/// A data plane. `perform` may block for as long as the command takes; the agent calls it off its event loop,
/// at most one command per volume at a time (except `Status`, `Limit` and `Policy`, which may come at any moment).
pub trait Plane: Send + Sync {
    /// Does what `command` says, or says why not.
    fn perform(&self, command: &Command) -> Result<Outcome, Failure>;

    /// The volumes that this worker has files of.
    fn volumes(&self) -> Result<Vec<VolumeId>, Failure>;

    /// What this plane keeps.
    fn promises(&self) -> Promises;
}
