//! LUKS2 on-disk format 1.1: the header with its JSON area and keyslots, and the cipher of the payload's sectors.
//!
//! No I/O happens here: a header is read through [`ReadAt`] and made as bytes; writing and syncing them is the caller's.
//! Randomness is an argument ([`Entropy`]). Where keys are kept is not known here.
//!
//! A header is *input*, also one's own: a peer sends it, or whoever can write the medium. cryptsetup opens a header that was
//! rewritten to `cipher_null-ecb` with a fresh checksum; [`Header::read`] opens only what is on its allow-list: one `crypt`
//! segment, `aes-xts-plain64` with 64 bytes of key in segment and keyslots, sectors of 512 or 4096 bytes, no requirements,
//! no re-encryption, key derivation within [`Limits`]. docs/luks2.md says why for each.

#![deny(unsafe_code)]

mod af;
mod binary;
mod error;
mod format;
mod header;
mod json;
mod kdf;
mod key;
mod validate;
mod xts;

pub use binary::HeaderCopy;
pub use error::{Damage, Error};
pub use format::NewHeader;
pub use header::{Header, Layout, ReadAt};
pub use kdf::{Kdf, Limits};
pub use key::{Entropy, KEY_BYTES, PASSPHRASE_BYTES, Passphrase, SystemEntropy, VolumeKey};
pub use xts::{SectorCipher, is_zero};

/// The only cipher, for payload and keyslots: AES-256-XTS with the sector number as tweak.
pub const PAYLOAD_CIPHER: &str = "aes-xts-plain64";
/// The payload offset that cryptsetup chose before 2.1.0.
pub const HEADER_4_MIB: u64 = 4 << 20;
/// The payload offset that cryptsetup chooses since 2.1.0.
pub const HEADER_16_MIB: u64 = 16 << 20;
/// Payload and keyslot areas start at multiples of this.
pub(crate) const ALIGNMENT: u64 = 4096;

#[cfg(test)]
mod tests;
