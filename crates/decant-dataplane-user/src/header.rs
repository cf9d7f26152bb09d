//! The LUKS2 header of a `volume.img`: made for a new volume, opened at attach, handed to a peer at a move, and made anew around
//! a peer's volume key at the destination. All on a file descriptor; the caller syncs the directory and keeps `volume.json`.
//!
//! ```text
//! volume.img:  | header, 4 or 16 MiB of this worker's choice, mostly a hole | payload: ciphertext, holes are zeros |
//! ```
//! A header that comes from a peer is hostile until proven otherwise: it passes decant-luks2's allow-list with the peer's
//! limits on key derivation, must say exactly what the carried [`Geometry`] says, and only its volume key is used. No byte of
//! it is written here.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use decant_base::{Bytes, VolumeId};
use decant_dataplane::{Failure, FailureCode, Geometry};
use decant_luks2::{
    Header, KEY_BYTES, Kdf, Layout, Limits, NewHeader, PAYLOAD_CIPHER, Passphrase, ReadAt, SystemEntropy, VolumeKey,
};
use sha2::{Digest, Sha256};

use crate::keys::{KeyError, KeySource};

/// The smallest payload; less is no volume but a mistake.
const LEAST_PAYLOAD: u64 = 1 << 20;
/// The largest header area that is sent or taken: 32 keyslots of 256 KiB behind two headers stay below.
const MOST_AREA: u64 = 16 << 20;

/// An opened volume.
pub struct Unlocked {
    /// What must be the same on every worker.
    pub geometry: Geometry,
    /// Byte of the file where the payload starts.
    pub payload_offset: u64,
    /// The key of the payload.
    pub key: VolumeKey,
}

/// A header as it goes to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedHeader {
    /// The header area from byte 0 to the end of the last keyslot in use, base64.
    pub base64: String,
    /// [`digest`] of it.
    pub digest: String,
}

/// Why a header was not made, opened, sent or taken. `Display` is name, cause and fix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// This worker's header, passphrase or options.
    #[error("{}: {source}; {}", source.name(), source.fix())]
    Luks {
        /// What is wrong with it.
        #[source]
        source: decant_luks2::Error,
    },
    /// The header that the peer sent.
    #[error("peer-header: the header that the source sent is refused ({}: {source}); {}", source.name(), source.fix())]
    PeerLuks {
        /// What is wrong with it.
        #[source]
        source: decant_luks2::Error,
    },
    /// The passphrase here does not open what the source sent.
    #[error(
        "peer-passphrase: the passphrase that this worker has for the volume does not open the source's header ({source}); give both workers the same passphrase for it"
    )]
    PeerPassphrase {
        /// What was tried.
        #[source]
        source: decant_luks2::Error,
    },
    /// The header that the peer sent is no base64, or too long.
    #[error("peer-header: the header that the source sent is {0}; check that both workers run compatible versions")]
    PeerEncoding(&'static str),
    /// The header contradicts the geometry that came with it.
    #[error(
        "peer-geometry: the source announced {what} {carried}, its header says {header}; do not trust that worker before this is explained"
    )]
    Geometry {
        /// Which part of the geometry.
        what: &'static str,
        /// What was announced.
        carried: String,
        /// What the header says.
        header: String,
    },
    /// The announced geometry is impossible.
    #[error("peer-geometry: the announced volume is impossible: {0}; check that both workers run compatible versions")]
    Impossible(&'static str),
    /// No passphrase.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// There is already something in the file.
    #[error("image-not-empty: the volume's image already holds {0}; delete the volume first")]
    NotEmpty(Bytes),
    /// The file system says no.
    #[error("image-io: {action} failed: {source}; check the disk (df, dmesg)")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl HeaderError {
    /// What the plane's caller should do: what a peer sent or an operator configured is refused, a damaged header here needs a
    /// person, and a medium may be better the next time.
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::Io { source, .. } if source.kind() == ErrorKind::StorageFull => FailureCode::Refused,
            Self::Luks { source: decant_luks2::Error::Memory(_) | decant_luks2::Error::Library } | Self::Io { .. } => {
                FailureCode::Retry
            }
            Self::Key(KeyError::CommandFailed { .. } | KeyError::CommandSlow { .. }) => FailureCode::Retry,
            Self::Luks { source: decant_luks2::Error::Options(_) | decant_luks2::Error::SectorSize(_) } => {
                FailureCode::Refused
            }
            Self::Luks { .. } | Self::NotEmpty(_) => FailureCode::Stuck,
            _ => FailureCode::Refused,
        };
        Failure { code, message: self.to_string() }
    }
}

impl From<HeaderError> for Failure {
    fn from(error: HeaderError) -> Self {
        error.failure()
    }
}

fn luks(source: decant_luks2::Error) -> HeaderError {
    HeaderError::Luks { source }
}

fn io(action: &'static str) -> impl FnOnce(std::io::Error) -> HeaderError {
    move |source| HeaderError::Io { action, source }
}

/// The file as decant-luks2 reads it.
struct Image<'a>(&'a File);

impl ReadAt for Image<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

/// The key derivation that a passphrase needs: 64 hexadecimal digits are taken for 256 random bits, as
/// [`KeySource::provide`] makes them, and need none to speak of; anything else may be a person's.
fn derivation(passphrase: &Passphrase) -> Kdf {
    let bytes = passphrase.expose();
    let random = bytes.len() == 64 && bytes.iter().all(u8::is_ascii_hexdigit);
    if random { Kdf::RANDOM_PASSPHRASE } else { Kdf::TYPED_PASSPHRASE }
}

/// Makes an encrypted volume of `size` in the empty file `file`: its length (sparse), and a header of `payload_offset` bytes
/// around a fresh random key. Durable when this returns.
///
/// # Errors
/// See [`HeaderError`]; the file is then to be removed. [`HeaderError::NotEmpty`] touches nothing.
pub fn create(
    file: &File,
    payload_offset: Bytes,
    size: Bytes,
    sector_size: u32,
    passphrase: &Passphrase,
) -> Result<Unlocked, HeaderError> {
    let geometry =
        Geometry { size, sector_size, cipher: PAYLOAD_CIPHER.into(), key_bytes: KEY_BYTES as u32, iv_tweak: 0 };
    plausible(&geometry).map_err(|cause| luks(decant_luks2::Error::Options(cause)))?;
    let new = NewHeader {
        payload_offset: payload_offset.0,
        payload_size: None,
        sector_size,
        iv_tweak: 0,
        uuid: None,
        label: String::new(),
        kdf: derivation(passphrase),
    };
    let key = VolumeKey::generate(&mut SystemEntropy).map_err(luks)?;
    write(file, &new, &geometry, &key, passphrase)?;
    Ok(Unlocked { geometry, payload_offset: payload_offset.0, key })
}

/// The destination's half of a move: takes the volume key out of the source's `header` with the passphrase that this worker
/// has, and makes `file`, which must be empty, a volume of the same geometry around it, with this worker's own header size.
///
/// `header` is what [`export_header`] gave on the source and is treated as hostile.
///
/// # Errors
/// See [`HeaderError`]; the file is then to be removed.
pub fn rewrap(
    file: &File,
    header: &str,
    carried: &Geometry,
    payload_offset: Bytes,
    passphrase: &Passphrase,
) -> Result<Unlocked, HeaderError> {
    plausible(carried).map_err(HeaderError::Impossible)?;
    if header.len() as u64 > MOST_AREA.div_ceil(3) * 4 {
        return Err(HeaderError::PeerEncoding("longer than 16 MiB"));
    }
    let area = BASE64.decode(header).map_err(|_| HeaderError::PeerEncoding("no base64"))?;
    let source = Header::read(&area[..], &Limits::PEER).map_err(|source| HeaderError::PeerLuks { source })?;
    compare(source.layout(), carried)?;
    let key = source.unlock(&area[..], passphrase).map_err(|source| match source {
        decant_luks2::Error::WrongPassphrase { .. } | decant_luks2::Error::Budget { .. } => {
            HeaderError::PeerPassphrase { source }
        }
        source => HeaderError::PeerLuks { source },
    })?;
    let new = NewHeader::like(&source, payload_offset.0, derivation(passphrase));
    write(file, &new, carried, &key, passphrase)?;
    Ok(Unlocked { geometry: carried.clone(), payload_offset: payload_offset.0, key })
}

/// Opens the volume with the passphrase that `keys` has for it. A damaged copy of the header is repaired from the other one,
/// if the file is open for writing.
///
/// # Errors
/// See [`HeaderError`].
pub fn unlock(file: &File, keys: &KeySource, volume: &VolumeId) -> Result<Unlocked, HeaderError> {
    // The header is judged before anybody is asked for a secret.
    let (header, geometry) = read(file)?;
    let passphrase = keys.passphrase(volume)?;
    let key = header.unlock(&Image(file), &passphrase).map_err(luks)?;
    drop(passphrase);
    if let Some(copy) = header.stale_copy() {
        match repair(file, &header) {
            Ok(()) => {
                tracing::warn!(%volume, ?copy, "a copy of the LUKS2 header was damaged or old; made anew from the other")
            }
            Err(error) => {
                tracing::error!(%volume, ?copy, %error, "a copy of the LUKS2 header is damaged and cannot be repaired")
            }
        }
    }
    Ok(Unlocked { geometry, payload_offset: header.layout().payload_offset, key })
}

/// The geometry and payload offset of a volume, without opening it.
///
/// # Errors
/// See [`HeaderError`].
pub fn inspect(file: &File) -> Result<(Geometry, u64), HeaderError> {
    let (header, geometry) = read(file)?;
    Ok((geometry, header.layout().payload_offset))
}

/// The header as the destination needs it: 284 KiB for a volume with one keyslot.
///
/// # Errors
/// See [`HeaderError`].
pub fn export_header(file: &File) -> Result<ExportedHeader, HeaderError> {
    let (header, _) = read(file)?;
    let length = header.area_bytes();
    if length > MOST_AREA {
        return Err(luks(decant_luks2::Error::Areas("its keyslots reach beyond 16 MiB")));
    }
    let mut area = vec![0; length as usize];
    file.read_exact_at(&mut area, 0).map_err(io("reading the header"))?;
    let base64 = BASE64.encode(&area);
    Ok(ExportedHeader { digest: digest(&base64), base64 })
}

/// SHA-256, hex, of a header as it is sent, in base64: the source puts it into the seal, the destination compares it with what
/// it prepared from.
pub fn digest(header: &str) -> String {
    Sha256::digest(header.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(file: &File) -> Result<(Header, Geometry), HeaderError> {
    let header = Header::read(&Image(file), &Limits::OWN).map_err(luks)?;
    let length = file.metadata().map_err(io("examining the image"))?.len();
    let layout = header.layout();
    let size = layout.payload_bytes(length).map_err(luks)?;
    let geometry = Geometry {
        size: Bytes(size),
        sector_size: layout.sector_size,
        cipher: PAYLOAD_CIPHER.into(),
        key_bytes: KEY_BYTES as u32,
        iv_tweak: layout.iv_tweak,
    };
    Ok((header, geometry))
}

fn repair(file: &File, header: &Header) -> Result<(), HeaderError> {
    // What the other copy says must be on the medium before this one is touched; it is: it was just read as the newer one.
    if let Some((offset, bytes)) = header.repair(&mut SystemEntropy).map_err(luks)? {
        file.write_all_at(&bytes, offset).map_err(io("repairing the header"))?;
        file.sync_data().map_err(io("syncing the header"))?;
    }
    Ok(())
}

/// What no honest worker announces. A `&'static str` says what.
fn plausible(geometry: &Geometry) -> Result<(), &'static str> {
    if geometry.cipher != PAYLOAD_CIPHER || geometry.key_bytes as usize != KEY_BYTES {
        return Err("its cipher is not aes-xts-plain64 with a key of 64 bytes");
    }
    if !matches!(geometry.sector_size, 512 | 4096) {
        return Err("its sectors are neither 512 nor 4096 bytes");
    }
    if geometry.size.0 < LEAST_PAYLOAD || !geometry.size.0.is_multiple_of(u64::from(geometry.sector_size)) {
        return Err("its size is below 1 MiB or no multiple of the sector size");
    }
    // An image is one file: off_t, less the largest header.
    if geometry.size.0 > i64::MAX as u64 - (1 << 30) {
        return Err("its size is beyond what a file can hold");
    }
    Ok(())
}

fn compare(header: &Layout, carried: &Geometry) -> Result<(), HeaderError> {
    let differ = |what, carried: u64, header: u64| -> Result<(), HeaderError> {
        let (carried, header) = (carried.to_string(), header.to_string());
        if carried == header { Ok(()) } else { Err(HeaderError::Geometry { what, carried, header }) }
    };
    differ("the sector size", u64::from(carried.sector_size), u64::from(header.sector_size))?;
    differ("the iv_tweak", carried.iv_tweak, header.iv_tweak)?;
    match header.payload_size {
        Some(size) => differ("the size", carried.size.0, size),
        // To the end of the source's device, which only the source sees.
        None => Ok(()),
    }
}

/// Length first, then the header: a crash between leaves a file without magic, which is no volume.
fn write(
    file: &File,
    new: &NewHeader,
    geometry: &Geometry,
    key: &VolumeKey,
    passphrase: &Passphrase,
) -> Result<(), HeaderError> {
    let length = file.metadata().map_err(io("examining the image"))?.len();
    if length != 0 {
        return Err(HeaderError::NotEmpty(Bytes(length)));
    }
    let area = new.build(key, passphrase, &mut SystemEntropy).map_err(luks)?;
    file.set_len(new.payload_offset + geometry.size.0).map_err(io("setting the image's length"))?;
    file.write_all_at(&area, 0).map_err(io("writing the header"))?;
    file.sync_all().map_err(io("syncing the header"))?;
    // What was written opens, from the medium's point of view: a volume whose key cannot be had again must not be used.
    let written = Header::read(&Image(file), &Limits::OWN).map_err(luks)?;
    if written.unlock(&Image(file), passphrase).map_err(luks)?.expose() != key.expose() {
        return Err(luks(decant_luks2::Error::Digest("the key just written came back as another")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
