//! From a passphrase to a keyslot's key: PBKDF2 and Argon2, and what they may cost.

use std::num::NonZeroU32;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use aws_lc_rs::{digest, pbkdf2};
use zeroize::{Zeroize, Zeroizing};

use crate::Error;

/// A hash that LUKS2 headers may name. SHA-1 and the exotic ones are refused.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    pub(crate) fn parse(name: &str, place: &'static str) -> Result<Self, Error> {
        match name {
            "sha256" => Ok(Self::Sha256),
            "sha384" => Ok(Self::Sha384),
            "sha512" => Ok(Self::Sha512),
            _ => Err(Error::Hash { place, hash: name.chars().take(32).collect() }),
        }
    }

    pub(crate) fn digest(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }

    fn pbkdf2(self) -> pbkdf2::Algorithm {
        match self {
            Self::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
            Self::Sha384 => pbkdf2::PBKDF2_HMAC_SHA384,
            Self::Sha512 => pbkdf2::PBKDF2_HMAC_SHA512,
        }
    }
}

/// What opening a header may cost. A header is input: it can ask for 2^32 rounds, or for all memory, 32 times over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// PBKDF2 rounds of one keyslot or digest.
    pub pbkdf2_rounds: u32,
    /// Argon2 memory of one keyslot.
    pub argon2_memory_kib: u32,
    /// Argon2 memory times passes of one keyslot: about a second of one core for each GiB.
    pub argon2_memory_passes_kib: u64,
    /// Argon2 lanes; cryptsetup allows 4.
    pub argon2_lanes: u32,
    /// How many times one keyslot's limit may be spent on all the keyslots that one passphrase is tried on.
    pub attempts: u32,
}

impl Limits {
    /// For a header that lies on this worker. cryptsetup's defaults (2 s, at most 1 GiB, 4 lanes) stay below, on any machine:
    /// about 20 s at the very worst for each keyslot.
    pub const OWN: Self = Self {
        pbkdf2_rounds: 50_000_000,
        argon2_memory_kib: 1 << 20,
        argon2_memory_passes_kib: 16 << 20,
        argon2_lanes: 4,
        attempts: 4,
    };

    /// For a header that a peer sent: one attempt, 1 GiB and about 8 s. What cryptsetup makes by default for a person to type
    /// (2 s on the machine it was made on) passes.
    pub const PEER: Self = Self {
        pbkdf2_rounds: 10_000_000,
        argon2_memory_kib: 1 << 20,
        argon2_memory_passes_kib: 8 << 20,
        argon2_lanes: 4,
        attempts: 1,
    };
}

/// How a keyslot's key is derived from its passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kdf {
    /// PBKDF2 with HMAC-SHA-256.
    Pbkdf2 {
        /// Rounds, at least 1000 (the least that cryptsetup accepts).
        rounds: u32,
    },
    /// Argon2id, version 1.3.
    Argon2id {
        /// Passes, at least 1; cryptsetup wants 4.
        passes: u32,
        /// Memory in KiB, at least 32.
        memory_kib: u32,
        /// Lanes, 1 to 4.
        lanes: u32,
    },
}

impl Kdf {
    /// For a random passphrase of 256 bits: 1000 rounds of PBKDF2. No key derivation makes guessing 2^256 harder.
    pub const RANDOM_PASSPHRASE: Self = Self::Pbkdf2 { rounds: 1000 };
    /// For a passphrase that a person typed: the second recommended choice of RFC 9106 §4 (64 MiB) with one pass more.
    pub const TYPED_PASSPHRASE: Self = Self::Argon2id { passes: 4, memory_kib: 64 << 10, lanes: 4 };
}

/// A checked derivation as read from a header.
#[derive(Clone)]
pub(crate) enum Derivation {
    Pbkdf2 { hash: Hash, rounds: NonZeroU32, salt: Vec<u8> },
    Argon2 { id: bool, params: Params, salt: Vec<u8> },
}

impl Derivation {
    /// Work in units of one keyslot's limit, for ordering and budgets.
    pub(crate) fn cost(&self, limits: &Limits) -> f64 {
        match self {
            Self::Pbkdf2 { rounds, .. } => f64::from(rounds.get()) / f64::from(limits.pbkdf2_rounds),
            Self::Argon2 { params, .. } => {
                f64::from(params.m_cost()) * f64::from(params.t_cost()) / limits.argon2_memory_passes_kib as f64
            }
        }
    }

    /// Fills `key`.
    pub(crate) fn derive(&self, passphrase: &[u8], key: &mut [u8; 64]) -> Result<(), Error> {
        match self {
            Self::Pbkdf2 { hash, rounds, salt } => {
                pbkdf2::derive(hash.pbkdf2(), *rounds, salt, passphrase, key);
                Ok(())
            }
            Self::Argon2 { id, params, salt } => {
                let memory = params.m_cost();
                let mut blocks = Erased::new(params.block_count()).ok_or(Error::Memory(memory))?;
                let algorithm = if *id { Algorithm::Argon2id } else { Algorithm::Argon2i };
                Argon2::new(algorithm, Version::V0x13, params.clone())
                    .hash_password_into_with_memory(passphrase, salt, key, &mut blocks.0[..])
                    .map_err(|_| Error::Memory(memory))
            }
        }
    }
}

/// Argon2's working memory, erased on drop.
struct Erased(Vec<Block>);

impl Erased {
    /// `None` when the memory cannot be had; an unchecked allocation would abort.
    fn new(count: usize) -> Option<Self> {
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(count).ok()?;
        blocks.resize(count, Block::default());
        Some(Self(blocks))
    }
}

impl Drop for Erased {
    fn drop(&mut self) {
        for block in &mut self.0 {
            block.as_mut().zeroize();
        }
    }
}

/// PBKDF2 for a digest: `length` bytes.
pub(crate) fn digest_of(hash: Hash, rounds: NonZeroU32, salt: &[u8], key: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(vec![0u8; hash.digest().output_len()]);
    pbkdf2::derive(hash.pbkdf2(), rounds, salt, key, &mut out);
    out
}
