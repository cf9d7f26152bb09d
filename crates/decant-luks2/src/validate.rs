//! From a decoded header to one that may be opened: everything that a hostile header could say is checked here, before any
//! key derivation. An allow-list, not a list of known attacks.

use std::num::NonZeroU32;

use argon2::Params;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::af::{SPLIT_BYTES, STRIPES};
use crate::binary::BINARY_BYTES;
use crate::json::{Config, Digest, Keyslot, Luks2Keyslot, Metadata, Objects, Segment, parse_decimal};
use crate::kdf::{Derivation, Hash};
use crate::{ALIGNMENT, Error, KEY_BYTES, Layout, Limits, PAYLOAD_CIPHER};

/// The numbers of objects that LUKS2 allows (cryptsetup lib/luks2/luks2.h).
const MOST_KEYSLOTS: usize = 32;
const MOST_DIGESTS: usize = 8;
const MOST_TOKENS: usize = 32;
/// A payload may not start later than this: the largest header cryptsetup can make is 4 MiB twice and 128 MiB of keyslots,
/// and alignment to RAID stripes stays far below. It also bounds the sparse file a peer could make us create.
const MOST_PAYLOAD_OFFSET: u64 = 1 << 30;
/// Longest salt: cryptsetup writes 32 bytes.
const MOST_SALT: usize = 1024;

/// A keyslot that may be tried.
pub(crate) struct Slot {
    pub(crate) preferred: bool,
    pub(crate) area_offset: u64,
    pub(crate) splitter: Hash,
    pub(crate) derivation: Derivation,
}

/// What says whether a volume key is the right one.
pub(crate) struct KeyDigest {
    pub(crate) hash: Hash,
    pub(crate) rounds: NonZeroU32,
    pub(crate) salt: Vec<u8>,
    pub(crate) digest: Vec<u8>,
}

/// What is left of the metadata when it passed.
pub(crate) struct Valid {
    pub(crate) layout: Layout,
    pub(crate) slots: Vec<Slot>,
    pub(crate) digest: KeyDigest,
    pub(crate) areas_end: u64,
}

/// Checks all of it. `header_bytes` is one copy's size.
pub(crate) fn validate(metadata: &Metadata, header_bytes: u64, limits: &Limits) -> Result<Valid, Error> {
    count("keyslots", &metadata.keyslots, MOST_KEYSLOTS)?;
    count("digests", &metadata.digests, MOST_DIGESTS)?;
    count("tokens", &metadata.tokens, MOST_TOKENS)?;
    requirements(&metadata.config)?;
    let keyslots_end = areas(&metadata.config, header_bytes)?;
    let (number, layout) = segment(&metadata.segments, keyslots_end)?;
    let (digest, members) = digest(&metadata.digests, number, limits)?;

    let mut taken: Vec<(u64, u64)> = Vec::new();
    let mut slots = Vec::new();
    for (number, keyslot) in &metadata.keyslots.0 {
        let keyslot = match keyslot {
            Keyslot::Luks2(keyslot) => keyslot,
            Keyslot::Unknown(value) if value.get("type").and_then(|kind| kind.as_str()) == Some("reencrypt") => {
                return Err(Error::Reencryption("a reencrypt keyslot"));
            }
            // A kind from the future: not read, not written, not counted.
            Keyslot::Unknown(_) => continue,
        };
        let slot = luks2_keyslot(number, keyslot, limits)?;
        area(number, keyslot, 2 * header_bytes, keyslots_end, &mut taken)?;
        // Priority 0 means "never without being asked for"; a slot of another digest opens something else.
        if members.contains(number) && keyslot.priority != Some(0) {
            slots.push(slot);
        }
    }
    if slots.is_empty() {
        return Err(Error::NoKeyslot);
    }
    let areas_end = taken.iter().map(|(_, end)| *end).max().unwrap_or(2 * header_bytes);
    Ok(Valid { layout, slots, digest, areas_end })
}

fn count<T>(what: &'static str, objects: &Objects<T>, most: usize) -> Result<(), Error> {
    let count = objects.0.len();
    if count > most { Err(Error::TooMany { what, count, most }) } else { Ok(()) }
}

/// `requirements` is how newer formats tell older readers to keep away; `online-reencrypt` is one (CVE-2021-4122).
fn requirements(config: &Config) -> Result<(), Error> {
    let Some(requirements) = &config.requirements else { return Ok(()) };
    let refuse = |text: &str| Err(Error::Requirement(text.chars().take(64).collect()));
    let Some(object) = requirements.as_object() else { return refuse("something that is no object") };
    for (kind, value) in object {
        match value.as_array().map(Vec::as_slice) {
            Some([]) => {}
            Some([first, ..]) => return refuse(first.as_str().unwrap_or(kind)),
            None => return refuse(kind),
        }
    }
    Ok(())
}

/// Where the keyslots area ends.
fn areas(config: &Config, header_bytes: u64) -> Result<u64, Error> {
    if config.json_size.checked_add(BINARY_BYTES) != Some(header_bytes) {
        return Err(Error::Areas("json_size contradicts the binary header"));
    }
    if !config.keyslots_size.is_multiple_of(ALIGNMENT) {
        return Err(Error::Areas("keyslots_size is no multiple of 4096"));
    }
    // cryptsetup's limit, LUKS2_MAX_KEYSLOTS_SIZE.
    if config.keyslots_size > 128 << 20 {
        return Err(Error::Areas("keyslots_size is above 128 MiB"));
    }
    Ok(2 * header_bytes + config.keyslots_size)
}

fn segment(segments: &Objects<Segment>, keyslots_end: u64) -> Result<(&str, Layout), Error> {
    let mut all = segments.0.iter();
    let (Some((number, segment)), None) = (all.next(), all.next()) else {
        return Err(Error::Segments(segments.0.len()));
    };
    if segment.kind != "crypt" {
        return Err(Error::SegmentType(segment.kind.chars().take(32).collect()));
    }
    if let Some(name) = segment.extra.keys().next() {
        let reencrypting = segment.extra.get("flags").is_some_and(|flags| flags.to_string().contains("reencrypt"));
        return Err(if reencrypting {
            Error::Reencryption("a flag of the segment")
        } else {
            Error::SegmentField(name.chars().take(32).collect())
        });
    }
    match segment.encryption.as_deref() {
        Some(PAYLOAD_CIPHER) => {}
        other => return Err(Error::Cipher(other.unwrap_or_default().chars().take(32).collect())),
    }
    let sector_size = segment.sector_size.unwrap_or(0);
    if !matches!(sector_size, 512 | 4096) {
        return Err(Error::SectorSize(sector_size));
    }
    let payload_offset = payload_offset(segment.offset, keyslots_end)?;
    let payload_size = match segment.size.as_str() {
        "dynamic" => None,
        text => Some(parse_decimal(text).ok_or(Error::PayloadSize("it is no number"))?),
    };
    if payload_size.is_some_and(|size| size == 0 || !size.is_multiple_of(u64::from(sector_size))) {
        return Err(Error::PayloadSize("it is not a positive multiple of the sector size"));
    }
    if payload_size.is_some_and(|size| payload_offset.checked_add(size).is_none_or(|end| end > i64::MAX as u64)) {
        return Err(Error::PayloadSize("its end is beyond what a file can hold"));
    }
    let iv_tweak = segment.iv_tweak.unwrap_or(0);
    Ok((number, Layout { payload_offset, payload_size, sector_size, iv_tweak }))
}

fn payload_offset(offset: u64, keyslots_end: u64) -> Result<u64, Error> {
    let cause = if offset < keyslots_end {
        "that is inside the header"
    } else if !offset.is_multiple_of(ALIGNMENT) {
        "that is no multiple of 4096"
    } else if offset > MOST_PAYLOAD_OFFSET {
        "that is beyond 1 GiB"
    } else {
        return Ok(offset);
    };
    Err(Error::PayloadOffset { offset, cause })
}

/// The one digest of the segment, and the numbers of the keyslots that hold its key.
fn digest<'a>(
    digests: &'a Objects<Digest>,
    segment: &str,
    limits: &Limits,
) -> Result<(KeyDigest, &'a [String]), Error> {
    let mut all = digests.0.iter().filter(|(_, digest)| digest.segments.iter().any(|s| s == segment));
    let (number, digest) = all.next().ok_or(Error::Digest("no digest belongs to the segment"))?;
    if all.next().is_some() {
        return Err(Error::Digest("several digests belong to the segment"));
    }
    if digest.kind != "pbkdf2" {
        return Err(Error::Digest("its digest is not of type pbkdf2"));
    }
    let place = || format!("digest {number}");
    let hash = Hash::parse(&digest.hash, "the digest")?;
    let rounds = rounds(digest.iterations, limits, place)?;
    let salt = salt(&digest.salt, place)?;
    let value = BASE64.decode(&digest.digest).map_err(|_| Error::Salt { place: place() })?;
    // A short digest would accept wrong keys; cryptsetup writes the hash's whole length.
    if value.len() != hash.digest().output_len() {
        return Err(Error::Salt { place: place() });
    }
    Ok((KeyDigest { hash, rounds, salt, digest: value }, &digest.keyslots))
}

fn luks2_keyslot(number: &str, keyslot: &Luks2Keyslot, limits: &Limits) -> Result<Slot, Error> {
    let area = &keyslot.area;
    if keyslot.key_size as usize != KEY_BYTES {
        return Err(Error::KeyBytes(keyslot.key_size));
    }
    if area.encryption != PAYLOAD_CIPHER || area.key_size as usize != KEY_BYTES {
        return Err(Error::KeyslotCipher {
            keyslot: number.to_owned(),
            cipher: area.encryption.chars().take(32).collect(),
            key_bytes: area.key_size,
        });
    }
    if keyslot.af.kind != "luks1" || keyslot.af.stripes as usize != STRIPES {
        return Err(Error::Splitter(number.to_owned()));
    }
    Ok(Slot {
        preferred: keyslot.priority == Some(2),
        area_offset: area.offset,
        splitter: Hash::parse(&keyslot.af.hash, "a keyslot's splitter")?,
        derivation: derivation(number, keyslot, limits)?,
    })
}

fn derivation(number: &str, keyslot: &Luks2Keyslot, limits: &Limits) -> Result<Derivation, Error> {
    let kdf = &keyslot.kdf;
    let place = || format!("keyslot {number}");
    let unknown = || Error::Kdf { keyslot: number.to_owned(), kdf: kdf.kind.chars().take(32).collect() };
    let salt = salt(&kdf.salt, place)?;
    match kdf.kind.as_str() {
        "pbkdf2" => {
            let hash = Hash::parse(kdf.hash.as_deref().unwrap_or_default(), "a keyslot's pbkdf2")?;
            Ok(Derivation::Pbkdf2 { hash, rounds: rounds(kdf.iterations.unwrap_or(0), limits, place)?, salt })
        }
        "argon2i" | "argon2id" => {
            let (Some(time), Some(memory), Some(lanes)) = (kdf.time, kdf.memory, kdf.cpus) else {
                return Err(unknown());
            };
            within(u64::from(memory), u64::from(limits.argon2_memory_kib), "KiB of argon2 memory", place)?;
            within(u64::from(lanes), u64::from(limits.argon2_lanes), "argon2 lanes", place)?;
            // 32 bits times 32 bits does not overflow.
            let work = u64::from(time) * u64::from(memory);
            within(work, limits.argon2_memory_passes_kib, "KiB of argon2 memory times passes", place)?;
            let params = Params::new(memory, time, lanes, Some(KEY_BYTES)).map_err(|_| unknown())?;
            Ok(Derivation::Argon2 { id: kdf.kind == "argon2id", params, salt })
        }
        _ => Err(unknown()),
    }
}

/// Checks that an area lies in the keyslots area, holds the split key, and overlaps none in `taken`.
fn area(number: &str, keyslot: &Luks2Keyslot, start: u64, end: u64, taken: &mut Vec<(u64, u64)>) -> Result<(), Error> {
    let area = &keyslot.area;
    let wrong = |cause| Err(Error::KeyslotArea { keyslot: number.to_owned(), cause });
    if area.kind != "raw" {
        return wrong("it is not of type raw");
    }
    let Some(area_end) = area.offset.checked_add(area.size) else { return wrong("its end overflows") };
    if area.offset < start || area_end > end {
        return wrong("it lies outside the keyslots area");
    }
    if !area.offset.is_multiple_of(ALIGNMENT) {
        return wrong("it does not start at a multiple of 4096");
    }
    if area.size < SPLIT_BYTES as u64 {
        return wrong("it is too small for 4000 stripes of the key");
    }
    if taken.iter().any(|(from, to)| area.offset < *to && *from < area_end) {
        return wrong("it overlaps another keyslot's");
    }
    taken.push((area.offset, area_end));
    Ok(())
}

fn rounds(asked: u32, limits: &Limits, place: impl Fn() -> String + Copy) -> Result<NonZeroU32, Error> {
    within(u64::from(asked), u64::from(limits.pbkdf2_rounds), "rounds of pbkdf2", place)?;
    NonZeroU32::new(asked).ok_or_else(|| Error::Salt { place: place() })
}

fn within(asked: u64, limit: u64, unit: &'static str, place: impl Fn() -> String) -> Result<(), Error> {
    if asked > limit { Err(Error::Cost { place: place(), asked, limit, unit }) } else { Ok(()) }
}

fn salt(text: &str, place: impl Fn() -> String) -> Result<Vec<u8>, Error> {
    let salt = BASE64.decode(text).map_err(|_| Error::Salt { place: place() })?;
    // 8 is the least that Argon2 takes.
    if (8..=MOST_SALT).contains(&salt.len()) { Ok(salt) } else { Err(Error::Salt { place: place() }) }
}
