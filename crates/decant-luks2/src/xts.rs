//! AES-256-XTS over whole sectors, in place. The only module with unsafe code: it calls AWS-LC's EVP interface, which has no
//! safe wrapper for XTS and is three to seventeen times as fast as the alternatives.

#![allow(unsafe_code)]

use std::ptr;
use std::sync::{Mutex, PoisonError};

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_copy, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CipherInit_ex, EVP_CipherUpdate,
    EVP_aes_256_xts,
};

use crate::{Error, VolumeKey};

/// Contexts kept for reuse per direction: more than the I/O threads of one volume.
const IDLE_CONTEXTS: usize = 64;
/// The unit in which `plain64` counts, whatever the encryption sector: dm-crypt steps its IV by
/// `sector_size >> SECTOR_SHIFT` unless `iv_large_sectors` is set, which LUKS2 never does (drivers/md/dm-crypt.c).
const IV_UNIT: u64 = 512;

/// Which way a context works.
#[derive(Clone, Copy)]
enum Direction {
    Encrypt = 1,
    Decrypt = 0,
}

/// One keyed EVP context, owned.
struct Context(*mut EVP_CIPHER_CTX);

// SAFETY: an EVP context is plain memory without thread affinity; `Context` is its only owner and is used by one thread at
// a time, because every operation on it takes it by value or by `&mut`.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the pointer came from EVP_CIPHER_CTX_new and is freed once, here. AWS-LC cleanses the key schedule as it frees.
        unsafe { EVP_CIPHER_CTX_free(self.0) }
    }
}

impl Context {
    fn blank() -> Result<Self, Error> {
        // SAFETY: takes no arguments; a null return is out of memory.
        let raw = unsafe { EVP_CIPHER_CTX_new() };
        if raw.is_null() { Err(Error::Library) } else { Ok(Self(raw)) }
    }

    fn keyed(key: &[u8; 64], direction: Direction) -> Result<Self, Error> {
        let context = Self::blank()?;
        // SAFETY: `context.0` is a fresh context; the cipher is a static of the library; the key has the 64 bytes that
        // AES-256-XTS reads; null engine and IV mean "none" and "set later".
        let ok = unsafe {
            EVP_CipherInit_ex(
                context.0,
                EVP_aes_256_xts(),
                ptr::null_mut(),
                key.as_ptr(),
                ptr::null(),
                direction as std::os::raw::c_int,
            )
        };
        if ok == 1 { Ok(context) } else { Err(Error::Library) }
    }

    /// A second context with the same key, for another thread.
    fn duplicate(&self) -> Result<Self, Error> {
        let copy = Self::blank()?;
        // SAFETY: both are live contexts, `copy` holds no cipher yet; the library copies the key schedule and repoints into it.
        let ok = unsafe { EVP_CIPHER_CTX_copy(copy.0, self.0) };
        if ok == 1 { Ok(copy) } else { Err(Error::Library) }
    }

    /// Works on one sector, at most 2^20 AES blocks, a multiple of 16 bytes.
    fn sector(&mut self, iv: u64, data: &mut [u8]) -> bool {
        let mut tweak = [0u8; 16];
        tweak[..8].copy_from_slice(&iv.to_le_bytes());
        let length = data.len() as std::os::raw::c_int;
        let mut written = 0;
        // SAFETY: the context is keyed; null cipher, engine and key keep what it has, -1 keeps its direction; the IV has
        // the 16 bytes that XTS reads. Input and output are the same `length` bytes, which the library allows for XTS.
        unsafe {
            EVP_CipherInit_ex(self.0, ptr::null(), ptr::null_mut(), ptr::null(), tweak.as_ptr(), -1) == 1
                && EVP_CipherUpdate(self.0, data.as_mut_ptr(), &mut written, data.as_ptr(), length) == 1
                && written == length
        }
    }
}

/// Contexts of one direction: one that is only copied from, and idle copies.
struct Pool(Mutex<(Context, Vec<Context>)>);

impl Pool {
    fn new(key: &[u8; 64], direction: Direction) -> Result<Self, Error> {
        let first = Context::keyed(key, direction)?;
        let copy = first.duplicate()?;
        let mut idle = Vec::with_capacity(IDLE_CONTEXTS);
        idle.push(copy);
        Ok(Self(Mutex::new((first, idle))))
    }

    /// Runs `work` with a context of its own. The lock is held for a pop and a push only.
    fn with(&self, work: impl FnOnce(&mut Context)) {
        let mut context = {
            let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match pool.1.pop() {
                Some(context) => context,
                None => pool.0.duplicate().expect("a few hundred bytes for one more cipher context"),
            }
        };
        work(&mut context);
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.1.len() < IDLE_CONTEXTS {
            pool.1.push(context);
        }
    }
}

/// Encrypts and decrypts a volume's payload by whole sectors, from any number of threads at once.
///
/// The tweak of a sector is the number of its first 512-byte unit in the payload plus `iv_tweak`, little-endian in the low
/// 64 bits (`plain64`), also when sectors are 4096 bytes: as dm-crypt and cryptsetup count.
pub struct SectorCipher {
    encrypt: Pool,
    decrypt: Pool,
    sector_size: usize,
    iv_tweak: u64,
}

impl SectorCipher {
    /// Keys the cipher. `sector_size` is 512 or 4096; `iv_tweak` counts 512-byte sectors.
    pub fn new(key: &VolumeKey, sector_size: u32, iv_tweak: u64) -> Result<Self, Error> {
        Self::raw(key.expose(), sector_size, iv_tweak)
    }

    /// With a key that is no volume key: a keyslot's.
    pub(crate) fn raw(key: &[u8; 64], sector_size: u32, iv_tweak: u64) -> Result<Self, Error> {
        if !matches!(sector_size, 512 | 4096) {
            return Err(Error::SectorSize(sector_size));
        }
        if key[..32] == key[32..] {
            return Err(Error::WeakKey);
        }
        Ok(Self {
            encrypt: Pool::new(key, Direction::Encrypt)?,
            decrypt: Pool::new(key, Direction::Decrypt)?,
            sector_size: sector_size as usize,
            iv_tweak,
        })
    }

    /// Bytes of an encryption sector: 512 or 4096.
    pub fn sector_size(&self) -> usize {
        self.sector_size
    }

    /// Encrypts `data`, which lies at byte `offset` of the payload, in place.
    ///
    /// Sectors of plaintext zeros are encrypted like any other; whoever wants a hole discards. That a sector's *ciphertext*
    /// comes out as all zeros, and so would read back as zeros instead of what was written, has probability 2^-4096 (512-byte
    /// sectors) for each write, and aiming at it means decrypting zeros without the key.
    ///
    /// # Panics
    /// If `offset` or the length is no multiple of the sector size, which is a bug of the caller.
    pub fn encrypt(&self, offset: u64, data: &mut [u8]) {
        self.check(offset, data);
        self.encrypt.with(|context| {
            let mut iv = self.first_iv(offset);
            for sector in data.chunks_exact_mut(self.sector_size) {
                // Going on would put plaintext on the medium.
                assert!(context.sector(iv, sector), "AES-XTS failed on a keyed context");
                iv = iv.wrapping_add(self.sector_size as u64 / IV_UNIT);
            }
        });
    }

    /// Decrypts `data`, which lies at byte `offset` of the payload, in place; a sector of all-zero ciphertext becomes zeros.
    ///
    /// Why zeros: a discarded block is a hole in the file, a hole reads as zero bytes, and the kernel's loop driver sends
    /// discard and write-zeroes as the same hole, after which ext4 counts on reading zeros. So below this cipher a zero
    /// sector *means* plaintext zeros. dm-crypt would decrypt it to noise, which is why an export to it must not be sparse.
    ///
    /// # Panics
    /// If `offset` or the length is no multiple of the sector size, which is a bug of the caller.
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) {
        self.decrypt_sectors(offset, data, true);
    }

    /// Decrypts as dm-crypt does, zero sectors included.
    pub(crate) fn decrypt_all(&self, offset: u64, data: &mut [u8]) {
        self.decrypt_sectors(offset, data, false);
    }

    fn decrypt_sectors(&self, offset: u64, data: &mut [u8], holes: bool) {
        self.check(offset, data);
        self.decrypt.with(|context| {
            let mut iv = self.first_iv(offset);
            for sector in data.chunks_exact_mut(self.sector_size) {
                if !(holes && is_zero(sector)) {
                    assert!(context.sector(iv, sector), "AES-XTS failed on a keyed context");
                }
                iv = iv.wrapping_add(self.sector_size as u64 / IV_UNIT);
            }
        });
    }

    fn check(&self, offset: u64, data: &[u8]) {
        let size = self.sector_size;
        assert!(
            offset.is_multiple_of(size as u64) && data.len().is_multiple_of(size),
            "{} bytes at {offset} are no whole sectors of {size}",
            data.len()
        );
    }

    /// dm-crypt adds in 64 bits and wraps.
    fn first_iv(&self, offset: u64) -> u64 {
        (offset / IV_UNIT).wrapping_add(self.iv_tweak)
    }
}

/// Whether all bytes are zero. Leaves at the first 64 bytes that are not, so ciphertext costs next to nothing.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| {
        let (words, _) = chunk.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    }) && chunks.remainder().iter().all(|byte| *byte == 0)
}
