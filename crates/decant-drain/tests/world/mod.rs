//! A fake worker for tests of the protocol: a plane and a machine's driver over a few bytes of state.

#![allow(dead_code, reason = "each test file uses its part")]

use decant_base::{Bytes, ExtentSet, MachineId, MigrationId, VolumeId, WorkerId};
use decant_dataplane::{
    Access, Command, Failure, FailureCode, Geometry, Origin, Outcome, Protocol, Reader, Seal, Verification,
};
use decant_drain::migration::Limits;
use decant_drain::{MachineCommand, Move};

/// What a worker's volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Kind {
    /// No files of it.
    #[default]
    None,
    /// Made by `Prepare`.
    Prepared,
    /// Whole.
    Plain,
    /// Some blocks are only at the origin.
    Clone,
    /// Every block was fetched, nothing compared yet.
    Filled,
    /// Read by its new owner.
    Sealed,
}

/// A worker's hardware: what survives its agent, and in part a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Site {
    /// Its volume.
    pub kind: Kind,
    /// How many acknowledged writes the volume, with its origin, holds.
    pub version: u8,
    /// The export is up.
    pub export: bool,
    /// The device is there.
    pub attached: bool,
    /// The machine runs here.
    pub running: bool,
    /// It was told to do something that no correct agent would.
    pub wrong: bool,
}

fn refused(message: &str) -> Failure {
    Failure { code: FailureCode::Refused, message: message.to_owned() }
}

impl Site {
    /// Performs a plane's command. `origin` is what a clone begun now reads from: the version of a sealed, exported copy.
    pub fn plane(&mut self, command: &Command, origin: Option<u8>) -> Result<Outcome, Failure> {
        match (command, self.kind) {
            (Command::OpenExport { .. }, Kind::Plain) => {
                self.export = true;
                Ok(opened())
            }
            (Command::Seal { .. }, Kind::Plain | Kind::Sealed) => {
                if self.running {
                    return Err(Failure { code: FailureCode::Retry, message: "the device is in use".to_owned() });
                }
                self.kind = Kind::Sealed;
                self.export = true;
                self.attached = false;
                Ok(Outcome::Sealed(seal()))
            }
            (Command::CloseExport { .. }, _) => {
                self.export = false;
                Ok(Outcome::Done)
            }
            (Command::Attach { .. }, Kind::Plain | Kind::Clone | Kind::Filled | Kind::Sealed) => {
                if self.kind == Kind::Sealed {
                    if self.export {
                        return Err(refused("the volume is sealed and exported"));
                    }
                    self.kind = Kind::Plain;
                }
                self.attached = true;
                Ok(device())
            }
            (Command::Detach { .. }, _) => {
                self.wrong |= self.running;
                self.attached = false;
                Ok(Outcome::Done)
            }
            (Command::Prepare { .. }, Kind::None | Kind::Prepared) => {
                self.kind = Kind::Prepared;
                Ok(Outcome::Done)
            }
            (Command::Assemble { .. }, Kind::Prepared) => Ok(device()),
            (Command::Begin { .. }, Kind::Prepared) => {
                let Some(version) = origin else {
                    self.wrong = true;
                    return Err(refused("the origin is not sealed"));
                };
                *self = Self { kind: Kind::Clone, version, attached: true, ..*self };
                Ok(device())
            }
            (Command::Begin { .. }, Kind::Clone | Kind::Filled | Kind::Plain) => {
                self.attached = true;
                Ok(device())
            }
            (Command::Abandon { .. }, kind) => {
                if kind == Kind::Prepared {
                    *self = Self { running: self.running, wrong: self.wrong, ..Self::default() };
                }
                Ok(Outcome::Done)
            }
            (Command::Verify { .. }, Kind::Filled | Kind::Plain) => {
                self.kind = Kind::Plain;
                Ok(Outcome::Verified(Verification::default()))
            }
            (Command::Verify { .. }, Kind::Clone) => {
                Err(Failure { code: FailureCode::NotYet, message: "blocks are missing".to_owned() })
            }
            (Command::Free { .. }, _) => Ok(Outcome::Done),
            (Command::Delete { .. }, _) => {
                self.wrong |= self.running || self.export;
                *self = Self { running: self.running, wrong: self.wrong, ..Self::default() };
                Ok(Outcome::Done)
            }
            (command, kind) => Err(refused(&format!("{command:?} on a volume that is {kind:?}"))),
        }
    }

    /// Performs a driver's command.
    pub fn machine(&mut self, command: &MachineCommand, stateless: bool) -> Result<(), Failure> {
        match command {
            MachineCommand::Start { .. } => {
                if !stateless && !self.attached {
                    return Err(Failure { code: FailureCode::Retry, message: "no device".to_owned() });
                }
                self.running = true;
            }
            MachineCommand::Stop { .. } | MachineCommand::Discard { .. } => self.running = false,
            MachineCommand::Prepare { .. } | MachineCommand::Trim { .. } => {}
        }
        Ok(())
    }

    /// The power fails.
    pub fn power_cut(&mut self) {
        (self.export, self.attached, self.running) = (false, false, false);
    }
}

pub fn machine() -> MachineId {
    MachineId::new("orders").expect("an id")
}

pub fn volume() -> VolumeId {
    VolumeId::new("orders-data").expect("an id")
}

pub fn worker(index: usize) -> WorkerId {
    WorkerId::new(format!("worker-{}", index + 1)).expect("an id")
}

pub fn index_of(worker: &WorkerId) -> usize {
    worker.as_str().trim_start_matches("worker-").parse::<usize>().expect("a worker of the test") - 1
}

pub fn migration(number: usize) -> MigrationId {
    MigrationId::new(format!("m-{number}")).expect("an id")
}

/// Deadlines that never come, and a copy that expires at once: tests decide when time passes.
pub const LIMITS: Limits = Limits { prepare_ms: u64::MAX / 4, stop_ms: u64::MAX / 4, retention_ms: 0 };

pub fn move_to(number: usize, to: usize) -> Move {
    Move {
        migration: migration(number),
        to: worker(to),
        reader: Reader {
            certificate: format!("{to:064x}"),
            address: std::net::IpAddr::from([127, 0, 0, 1]),
            protocol: Protocol::Nbd,
        },
        reason: "test".to_owned(),
        drain: None,
        limits: LIMITS,
        program: Some("ab12".to_owned()),
    }
}

pub fn seal() -> Seal {
    Seal { live: ExtentSet::from_iter([(0, 8).into()]), header_digest: "d1".to_owned() }
}

fn device() -> Outcome {
    Outcome::Attached { device: "/dev/loop0".into() }
}

pub fn opened() -> Outcome {
    Outcome::ExportOpened {
        origin: Origin {
            address: "[fdde::1]:10809".parse().expect("an address"),
            export: "m".to_owned(),
            access: Access::Nbd { certificate: "c1".to_owned() },
        },
        geometry: Geometry {
            size: Bytes::gib(4),
            sector_size: 4096,
            cipher: "aes-xts-plain64".to_owned(),
            key_bytes: 64,
            iv_tweak: 0,
        },
        header: "aGVhZGVy".to_owned(),
        room: Bytes::mib(200),
    }
}
