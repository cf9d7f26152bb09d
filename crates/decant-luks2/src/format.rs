//! Making a header: for a new volume, or around a key that already encrypts one.

use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use zeroize::Zeroizing;

use crate::af::{self, SPLIT_BYTES, STRIPES};
use crate::binary::{self, BINARY_BYTES, Binary, HeaderCopy};
use crate::json::{Area, Config, Digest, KdfObject, Keyslot, Luks2Keyslot, Metadata, Objects, Segment, Splitter};
use crate::kdf::{Derivation, Hash, digest_of};
use crate::xts::SectorCipher;
use crate::{ALIGNMENT, Entropy, Error, Header, KEY_BYTES, Kdf, Limits, PAYLOAD_CIPHER, Passphrase, VolumeKey};

/// One copy of the header with its JSON area, cryptsetup's default.
const HEADER_BYTES: u64 = 0x4000;
/// A keyslot's area: 4000 stripes of 64 bytes, rounded up to 4096.
const SLOT_BYTES: u64 = (SPLIT_BYTES as u64).next_multiple_of(ALIGNMENT);
/// Salts are as long as cryptsetup's.
const SALT_BYTES: usize = 32;
/// Rounds of the digest over a random key of 512 bits, the least that cryptsetup accepts: there is nothing to guess.
const DIGEST_ROUNDS: u32 = 1000;

/// The shape of a header to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewHeader {
    /// Where the payload starts: 4 MiB or 16 MiB by custom, any multiple of 4096 that leaves room for a keyslot.
    pub payload_offset: u64,
    /// Bytes of payload, or to the device's end.
    pub payload_size: Option<u64>,
    /// 512 or 4096.
    pub sector_size: u32,
    /// Added to each sector's number, in 512-byte sectors; 0 for a new volume.
    pub iv_tweak: u64,
    /// Its UUID as text; `None` makes a random one.
    pub uuid: Option<String>,
    /// Its label: at most 47 bytes of printable ASCII.
    pub label: String,
    /// How the one keyslot derives its key.
    pub kdf: Kdf,
}

impl NewHeader {
    /// A header of this worker's own size around a volume that `source` describes: same sector size, tweak, UUID and label, so
    /// that the payload can be copied as it is.
    pub fn like(source: &Header, payload_offset: u64, kdf: Kdf) -> Self {
        let layout = source.layout();
        Self {
            payload_offset,
            payload_size: None,
            sector_size: layout.sector_size,
            iv_tweak: layout.iv_tweak,
            uuid: Some(source.uuid().to_owned()),
            label: source.label().to_owned(),
            kdf,
        }
    }

    /// The header area around `key`, to be written at byte 0: two copies and one keyslot, 290,816 bytes. What lies between its
    /// end and the payload is left to the caller (a hole).
    pub fn build(&self, key: &VolumeKey, passphrase: &Passphrase, entropy: &mut dyn Entropy) -> Result<Vec<u8>, Error> {
        self.check()?;
        let mut salt = |bytes: usize| -> Result<Vec<u8>, Error> {
            let mut salt = vec![0u8; bytes];
            entropy.fill(&mut salt)?;
            Ok(salt)
        };
        let (slot_salt, digest_salt) = (salt(SALT_BYTES)?, salt(SALT_BYTES)?);
        let (first_salt, second_salt, uuid) = (salt(64)?, salt(64)?, salt(16)?);

        let keyslot = self.keyslot(&slot_salt);
        let derivation = self.derivation(slot_salt)?;
        let material = seal_slot(&derivation, key, passphrase, entropy)?;
        let metadata = Metadata {
            keyslots: Objects::one(Keyslot::Luks2(Box::new(keyslot))),
            tokens: Objects::none(),
            segments: Objects::one(self.segment()),
            digests: Objects::one(digest(key, &digest_salt)?),
            config: Config {
                json_size: HEADER_BYTES - BINARY_BYTES,
                keyslots_size: self.payload_offset.min(2 * HEADER_BYTES + (128 << 20)) - 2 * HEADER_BYTES,
                flags: Vec::new(),
                requirements: None,
            },
        };
        let json = serde_json::to_vec(&metadata).map_err(Error::Json)?;
        let fields = Binary {
            header_bytes: HEADER_BYTES,
            seqid: 1,
            label: self.label.clone(),
            algorithm: "sha256".to_owned(),
            uuid: self.uuid.clone().unwrap_or_else(|| random_uuid(&uuid)),
            subsystem: String::new(),
            salt: [0; 64],
            offset: 0,
        };
        let copy = |copy, offset, salt: &[u8]| {
            let mut fields = Binary { offset, ..fields.clone() };
            fields.salt.copy_from_slice(salt);
            binary::encode(&fields, copy, &json)
        };
        let mut area = copy(HeaderCopy::Primary, 0, &first_salt);
        area.append(&mut copy(HeaderCopy::Secondary, HEADER_BYTES, &second_salt));
        area.extend_from_slice(&material);
        area.resize((2 * HEADER_BYTES + SLOT_BYTES) as usize, 0);
        Ok(area)
    }

    fn check(&self) -> Result<(), Error> {
        let fail = |cause| Err(Error::Options(cause));
        if !self.payload_offset.is_multiple_of(ALIGNMENT) || self.payload_offset > 1 << 30 {
            return fail("the payload must start at a multiple of 4096, at most 1 GiB");
        }
        if self.payload_offset < 2 * HEADER_BYTES + SLOT_BYTES {
            return fail("the payload must leave room for two headers and a keyslot, 290816 bytes");
        }
        if !matches!(self.sector_size, 512 | 4096) {
            return Err(Error::SectorSize(self.sector_size));
        }
        if self.payload_size.is_some_and(|size| size == 0 || !size.is_multiple_of(u64::from(self.sector_size))) {
            return fail("the payload's size must be a positive multiple of the sector size");
        }
        if self.label.len() > 47 || !self.label.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
            return fail("the label must be at most 47 bytes of printable ASCII");
        }
        let uuid = self.uuid.as_deref().unwrap_or_default();
        if uuid.len() > 39 || !uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
            return fail("the UUID is none");
        }
        match self.kdf {
            Kdf::Pbkdf2 { rounds } if rounds < 1000 => fail("pbkdf2 needs at least 1000 rounds"),
            Kdf::Argon2id { passes, memory_kib, lanes }
                if passes == 0 || memory_kib < 32 || !(1..=Limits::OWN.argon2_lanes).contains(&lanes) =>
            {
                fail("argon2id needs at least 1 pass, 32 KiB and 1 to 4 lanes")
            }
            // What is made here must open here.
            Kdf::Pbkdf2 { rounds } if rounds > Limits::OWN.pbkdf2_rounds => fail("too many rounds of pbkdf2"),
            Kdf::Argon2id { passes, memory_kib, .. }
                if memory_kib > Limits::OWN.argon2_memory_kib
                    || u64::from(memory_kib) * u64::from(passes) > Limits::OWN.argon2_memory_passes_kib =>
            {
                fail("too much argon2id memory or too many passes")
            }
            _ => Ok(()),
        }
    }

    fn derivation(&self, salt: Vec<u8>) -> Result<Derivation, Error> {
        Ok(match self.kdf {
            Kdf::Pbkdf2 { rounds } => Derivation::Pbkdf2 {
                hash: Hash::Sha256,
                rounds: NonZeroU32::new(rounds).ok_or(Error::Options("pbkdf2 needs rounds"))?,
                salt,
            },
            Kdf::Argon2id { passes, memory_kib, lanes } => Derivation::Argon2 {
                id: true,
                params: argon2::Params::new(memory_kib, passes, lanes, Some(KEY_BYTES))
                    .map_err(|_| Error::Options("argon2id refuses these costs"))?,
                salt,
            },
        })
    }

    fn keyslot(&self, salt: &[u8]) -> Luks2Keyslot {
        let salt = BASE64.encode(salt);
        let none =
            KdfObject { kind: String::new(), hash: None, iterations: None, time: None, memory: None, cpus: None, salt };
        let kdf = match self.kdf {
            Kdf::Pbkdf2 { rounds } => {
                KdfObject { kind: "pbkdf2".into(), hash: Some("sha256".into()), iterations: Some(rounds), ..none }
            }
            Kdf::Argon2id { passes, memory_kib, lanes } => KdfObject {
                kind: "argon2id".into(),
                time: Some(passes),
                memory: Some(memory_kib),
                cpus: Some(lanes),
                ..none
            },
        };
        Luks2Keyslot {
            kind: "luks2".into(),
            key_size: KEY_BYTES as u32,
            priority: None,
            af: Splitter { kind: "luks1".into(), stripes: STRIPES as u32, hash: "sha256".into() },
            area: Area {
                kind: "raw".into(),
                offset: 2 * HEADER_BYTES,
                size: SLOT_BYTES,
                encryption: PAYLOAD_CIPHER.into(),
                key_size: KEY_BYTES as u32,
            },
            kdf,
        }
    }

    fn segment(&self) -> Segment {
        Segment {
            kind: "crypt".into(),
            offset: self.payload_offset,
            size: self.payload_size.map_or_else(|| "dynamic".into(), |size| size.to_string()),
            iv_tweak: Some(self.iv_tweak),
            encryption: Some(PAYLOAD_CIPHER.into()),
            sector_size: Some(self.sector_size),
            extra: Default::default(),
        }
    }
}

/// The keyslot's bytes: the key, split, encrypted with what the passphrase derives.
fn seal_slot(
    derivation: &Derivation,
    key: &VolumeKey,
    passphrase: &Passphrase,
    entropy: &mut dyn Entropy,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    let mut slot_key = Zeroizing::new([0u8; 64]);
    derivation.derive(passphrase.expose(), &mut slot_key)?;
    let mut material = af::split(key.expose(), Hash::Sha256, entropy)?;
    SectorCipher::raw(&slot_key, 512, 0)?.encrypt(0, &mut material);
    Ok(material)
}

fn digest(key: &VolumeKey, salt: &[u8]) -> Result<Digest, Error> {
    let rounds = NonZeroU32::new(DIGEST_ROUNDS).ok_or(Error::Options("a digest needs rounds"))?;
    let value = digest_of(Hash::Sha256, rounds, salt, key.expose());
    Ok(Digest {
        kind: "pbkdf2".into(),
        keyslots: vec!["0".into()],
        segments: vec!["0".into()],
        hash: "sha256".into(),
        iterations: DIGEST_ROUNDS,
        salt: BASE64.encode(salt),
        digest: BASE64.encode(&value),
    })
}

/// RFC 9562 version 4.
fn random_uuid(random: &[u8]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in random.iter().take(16).enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let byte = match at {
            6 => (byte & 0x0f) | 0x40,
            8 => (byte & 0x3f) | 0x80,
            _ => *byte,
        };
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
