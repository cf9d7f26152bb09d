//! Secrets and randomness. None of these types can be printed, cloned or compared by accident; all are erased on drop.

use zeroize::{Zeroize, Zeroizing};

use crate::Error;

/// Bytes of a volume key: two AES-256 keys.
pub const KEY_BYTES: usize = 64;
/// Longest passphrase: the most that cryptsetup lets a person type (its key files may be longer, and are then no business of a prompt).
pub const PASSPHRASE_BYTES: usize = 512;

/// Where random bytes come from: an argument everywhere, so that a test can repeat a header byte for byte.
pub trait Entropy {
    /// Fills `buffer`.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Error>;
}

/// The kernel's getrandom(2).
#[derive(Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        getrandom::fill(buffer).map_err(|error| {
            let errno = error.raw_os_error().map(std::io::Error::from_raw_os_error);
            Error::Entropy(errno.unwrap_or_else(|| std::io::ErrorKind::Unsupported.into()))
        })
    }
}

/// The key that encrypts a volume's payload, for the volume's life.
pub struct VolumeKey(Box<Zeroizing<[u8; KEY_BYTES]>>);

impl VolumeKey {
    /// A random key.
    pub fn generate(entropy: &mut dyn Entropy) -> Result<Self, Error> {
        Self::build(|bytes| entropy.fill(bytes))
    }

    /// The key with these bytes. Fails with [`Error::KeyBytes`] if they are not 64 and [`Error::WeakKey`] if both halves are equal.
    pub fn from_bytes(from: &[u8]) -> Result<Self, Error> {
        if from.len() != KEY_BYTES {
            return Err(Error::KeyBytes(u32::try_from(from.len()).unwrap_or(u32::MAX)));
        }
        Self::build(|bytes| {
            bytes.copy_from_slice(from);
            Ok(())
        })
    }

    /// Makes the key in its final place, so that no copy stays behind on the stack.
    pub(crate) fn build(fill: impl FnOnce(&mut [u8; KEY_BYTES]) -> Result<(), Error>) -> Result<Self, Error> {
        let mut key = Box::new(Zeroizing::new([0u8; KEY_BYTES]));
        fill(&mut key)?;
        let (first, second) = key.split_at(KEY_BYTES / 2);
        if first == second {
            return Err(Error::WeakKey);
        }
        Ok(Self(key))
    }

    /// The bytes, for the cipher and for handing over through secret memory; nothing else should ask.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

/// What opens a keyslot.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes the bytes over; the vector is erased when dropped. 1 to [`PASSPHRASE_BYTES`] bytes.
    pub fn new(mut bytes: Vec<u8>) -> Result<Self, Error> {
        let length = bytes.len();
        if !(1..=PASSPHRASE_BYTES).contains(&length) {
            bytes.zeroize();
            return Err(Error::PassphraseLength(length));
        }
        Ok(Self(Zeroizing::new(bytes)))
    }

    /// A random one of 256 bits, as 64 hexadecimal digits so that it survives editors, shells and `cryptsetup`'s prompt.
    /// Guessing it is as hard as guessing a key, so its keyslot needs no slow key derivation.
    pub fn generate(entropy: &mut dyn Entropy) -> Result<Self, Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut bits = Zeroizing::new([0u8; 32]);
        entropy.fill(bits.as_mut())?;
        let mut text = Zeroizing::new(Vec::with_capacity(64));
        for byte in bits.iter() {
            text.extend([byte >> 4, byte & 15].map(|nibble| DIGITS[usize::from(nibble)]));
        }
        Ok(Self(text))
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}
