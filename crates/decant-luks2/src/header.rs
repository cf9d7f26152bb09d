//! Reading, opening and repairing a header.

use zeroize::Zeroizing;

use crate::af::{self, SPLIT_BYTES};
use crate::binary::{self, BINARY_BYTES, Binary, HeaderCopy, SIZES};
use crate::error::Damage;
use crate::json::Metadata;
use crate::kdf::digest_of;
use crate::validate::{KeyDigest, Slot, Valid, validate};
use crate::xts::SectorCipher;
use crate::{ALIGNMENT, Entropy, Error, Limits, Passphrase, VolumeKey};

/// Somewhere a header area can be read from: a byte slice, or whatever the caller wraps.
pub trait ReadAt {
    /// Fills `buffer` from byte `offset`; [`std::io::ErrorKind::UnexpectedEof`] if there is less.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()>;
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.get(at..)).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Where the payload lies and how it is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Byte where the payload starts, a multiple of 4096, at most 1 GiB.
    pub payload_offset: u64,
    /// Bytes of payload; `None` is "to the end of the device" (`dynamic`).
    pub payload_size: Option<u64>,
    /// Encryption sector: 512 or 4096.
    pub sector_size: u32,
    /// Added to each sector's number, in 512-byte sectors.
    pub iv_tweak: u64,
}

impl Layout {
    /// Bytes of payload on a device of `device_bytes`. Fails with [`Error::PayloadSize`] if they do not fit, are none, or are
    /// no multiple of the sector size.
    pub fn payload_bytes(&self, device_bytes: u64) -> Result<u64, Error> {
        let room = device_bytes
            .checked_sub(self.payload_offset)
            .filter(|room| *room > 0)
            .ok_or(Error::PayloadSize("the device ends before the payload starts"))?;
        let size = match self.payload_size {
            None => room,
            Some(size) if size <= room => size,
            Some(_) => return Err(Error::PayloadSize("the segment is larger than the device")),
        };
        if !size.is_multiple_of(u64::from(self.sector_size)) {
            return Err(Error::PayloadSize("the device ends inside a sector"));
        }
        Ok(size)
    }
}

/// A header that passed every check and may be opened.
pub struct Header {
    fields: Binary,
    json: Vec<u8>,
    valid: Valid,
    stale: Option<HeaderCopy>,
    limits: Limits,
}

impl Header {
    /// Reads both copies, takes the newer whole one, and checks all it says against the allow-list and `limits`. No key
    /// derivation happens here; the cost is two checksums.
    pub fn read(source: &(impl ReadAt + ?Sized), limits: &Limits) -> Result<Self, Error> {
        let (fields, json, stale) = newest(source)?;
        let metadata: Metadata = serde_json::from_slice(text_of(&json)?).map_err(Error::Json)?;
        let valid = validate(&metadata, fields.header_bytes, limits)?;
        Ok(Self { fields, json, valid, stale, limits: *limits })
    }

    /// Where the payload lies and how it is encrypted.
    pub fn layout(&self) -> &Layout {
        &self.valid.layout
    }

    /// The volume's UUID as text.
    pub fn uuid(&self) -> &str {
        &self.fields.uuid
    }

    /// The label, possibly empty; printable ASCII.
    pub fn label(&self) -> &str {
        &self.fields.label
    }

    /// The number that grows with each update of the header.
    pub fn seqid(&self) -> u64 {
        self.fields.seqid
    }

    /// Bytes from the start to the end of the last keyslot in use: what a peer needs to open it. The rest, up to the payload,
    /// is unused room for keyslots.
    pub fn area_bytes(&self) -> u64 {
        self.valid.areas_end
    }

    /// The copy that is damaged or older than the other, if one is; [`Header::repair`] makes it anew.
    pub fn stale_copy(&self) -> Option<HeaderCopy> {
        self.stale
    }

    /// The bytes that bring the stale copy up to date, and where they belong. The caller writes and syncs them.
    pub fn repair(&self, entropy: &mut dyn Entropy) -> Result<Option<(u64, Vec<u8>)>, Error> {
        let Some(copy) = self.stale else { return Ok(None) };
        let mut fields = self.fields.clone();
        fields.offset = match copy {
            HeaderCopy::Primary => 0,
            HeaderCopy::Secondary => fields.header_bytes,
        };
        entropy.fill(&mut fields.salt)?;
        Ok(Some((fields.offset, binary::encode(&fields, copy, &self.json))))
    }

    /// The volume key, if `passphrase` opens one of the keyslots. Preferred slots are tried first, then the cheapest, within
    /// [`Limits::attempts`] times the limit of one.
    pub fn unlock(&self, source: &(impl ReadAt + ?Sized), passphrase: &Passphrase) -> Result<VolumeKey, Error> {
        let mut slots: Vec<(&Slot, f64)> =
            self.valid.slots.iter().map(|slot| (slot, slot.derivation.cost(&self.limits))).collect();
        slots.sort_by(|(a, a_cost), (b, b_cost)| b.preferred.cmp(&a.preferred).then(a_cost.total_cmp(b_cost)));
        let digest_cost = f64::from(self.valid.digest.rounds.get()) / f64::from(self.limits.pbkdf2_rounds);
        let mut spent = 0.0;
        for (tried, (slot, cost)) in slots.iter().enumerate() {
            spent += cost + digest_cost;
            // The first is always tried: on its own it keeps the limit of a keyslot and that of a digest.
            if tried > 0 && spent > f64::from(self.limits.attempts) {
                return Err(Error::Budget { tried, left: slots.len() - tried });
            }
            if let Some(key) = open_slot(source, slot, &self.valid.digest, passphrase)? {
                return Ok(key);
            }
        }
        Err(Error::WrongPassphrase { tried: slots.len() })
    }
}

fn open_slot(
    source: &(impl ReadAt + ?Sized),
    slot: &Slot,
    digest: &KeyDigest,
    passphrase: &Passphrase,
) -> Result<Option<VolumeKey>, Error> {
    let mut slot_key = Zeroizing::new([0u8; 64]);
    slot.derivation.derive(passphrase.expose(), &mut slot_key)?;
    let mut material = Zeroizing::new(vec![0u8; SPLIT_BYTES]);
    read(source, slot.area_offset, &mut material)?;
    SectorCipher::raw(&slot_key, 512, 0)?.decrypt_all(0, &mut material);
    let mut candidate = Zeroizing::new([0u8; 64]);
    af::merge(&material, slot.splitter, &mut candidate);
    let found = digest_of(digest.hash, digest.rounds, &digest.salt, candidate.as_ref());
    if aws_lc_rs::constant_time::verify_slices_are_equal(&found, &digest.digest).is_err() {
        return Ok(None);
    }
    VolumeKey::from_bytes(candidate.as_ref()).map(Some)
}

/// The newer of the copies that are whole, its JSON area, and which copy lags behind it.
fn newest(source: &(impl ReadAt + ?Sized)) -> Result<(Binary, Vec<u8>, Option<HeaderCopy>), Error> {
    let primary = load(source, HeaderCopy::Primary, 0)?;
    // Where the second copy lies only a whole first one knows for certain.
    let places: &[u64] = match &primary {
        Ok((fields, _)) => &[fields.header_bytes],
        Err(_) => &SIZES,
    };
    let mut secondary = Err(Damage::Magic);
    for at in places {
        match load(source, HeaderCopy::Secondary, *at)? {
            Err(Damage::Magic) => {}
            other => secondary = other,
        }
        if secondary.is_ok() {
            break;
        }
    }
    match (primary, secondary) {
        (Ok(first), Ok(second)) if second.0.seqid > first.0.seqid => {
            Ok((second.0, second.1, Some(HeaderCopy::Primary)))
        }
        (Ok(first), Ok(second)) if second.0.seqid == first.0.seqid => Ok((first.0, first.1, None)),
        (Ok(first), _) => Ok((first.0, first.1, Some(HeaderCopy::Secondary))),
        (Err(_), Ok(second)) => Ok((second.0, second.1, Some(HeaderCopy::Primary))),
        (Err(Damage::Magic), Err(Damage::Magic)) => Err(Error::NotLuks),
        (Err(Damage::Version), Err(Damage::Magic)) => Err(Error::Version(version(source)?)),
        (Err(primary), Err(secondary)) => Err(Error::Damaged { primary, secondary }),
    }
}

type Loaded = Result<(Binary, Vec<u8>), Damage>;

/// One copy: the outer error is the medium's, the inner one says that the copy is not usable.
fn load(source: &(impl ReadAt + ?Sized), copy: HeaderCopy, at: u64) -> Result<Loaded, Error> {
    let mut start = [0u8; 512];
    match read(source, at, &mut start) {
        Err(Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Ok(Err(Damage::Magic));
        }
        other => other?,
    }
    let size = match binary::peek(&start, copy, at) {
        Ok(size) => size,
        Err(damage) => return Ok(Err(damage)),
    };
    // At most 4 MiB: `peek` allows no other size.
    let mut bytes = vec![0u8; size as usize];
    match read(source, at, &mut bytes) {
        Err(Error::Read { source, .. }) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Ok(Err(Damage::Size));
        }
        other => other?,
    }
    Ok(binary::decode(&bytes, copy, at).map(|fields| {
        let json = bytes.split_off(BINARY_BYTES as usize);
        (fields, json)
    }))
}

fn version(source: &(impl ReadAt + ?Sized)) -> Result<u16, Error> {
    let mut version = [0u8; 2];
    read(source, 6, &mut version)?;
    Ok(u16::from_be_bytes(version))
}

/// The JSON text: it ends at the first NUL, and nothing but NUL may follow (format 1.1 §2.3).
fn text_of(area: &[u8]) -> Result<&[u8], Error> {
    let end = area.iter().position(|byte| *byte == 0).ok_or(Error::Areas("the JSON area is not terminated"))?;
    let (text, rest) = area.split_at_checked(end).unwrap_or((area, &[]));
    if rest.iter().any(|byte| *byte != 0) {
        return Err(Error::Areas("something follows the JSON text"));
    }
    Ok(text)
}

fn read(source: &(impl ReadAt + ?Sized), offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
    let length = buffer.len();
    source.read_at(offset, buffer).map_err(|source| Error::Read { offset, length, source })
}

const _: () = assert!(SPLIT_BYTES.is_multiple_of(512) && ALIGNMENT.is_multiple_of(512));
