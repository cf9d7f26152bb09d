//! What can be wrong with a LUKS2 header, a key or a passphrase: one variant per refusal.

/// Why a header was refused, not made, or not opened. `Display` is the cause; [`Error::name`] is stable, [`Error::fix`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The header area could not be read.
    #[error("reading {length} bytes of header at byte {offset} failed")]
    Read {
        /// Byte offset of the read.
        offset: u64,
        /// Its length.
        length: usize,
        /// The medium's error.
        #[source]
        source: std::io::Error,
    },
    /// Neither copy carries the magic.
    #[error("there is no LUKS2 header: neither copy starts with its magic")]
    NotLuks,
    /// LUKS1, or something newer.
    #[error("the header says LUKS version {0}, only 2 is known")]
    Version(u16),
    /// Both copies carry the magic, none is whole.
    #[error("both copies of the header are damaged (first: {primary}; second: {secondary})")]
    Damaged {
        /// What is wrong with the copy at byte 0.
        primary: Damage,
        /// What is wrong with the copy behind it.
        secondary: Damage,
    },
    /// The JSON area is no JSON of the expected form.
    #[error("the header's JSON area does not parse")]
    Json(#[source] serde_json::Error),
    /// `config` contradicts the binary header or the payload's place.
    #[error("the header's areas do not fit together: {0}")]
    Areas(&'static str),
    /// More objects than LUKS2 allows.
    #[error("the header lists {count} {what}, at most {most} are allowed")]
    TooMany {
        /// keyslots, segments, digests or tokens.
        what: &'static str,
        /// How many it lists.
        count: usize,
        /// How many may be.
        most: usize,
    },
    /// `config.requirements` asks for something.
    #[error("the header demands {0:?}, which is not supported")]
    Requirement(String),
    /// A re-encryption is under way, or says it is.
    #[error("the header describes a re-encryption in progress ({0})")]
    Reencryption(&'static str),
    /// Not exactly one segment.
    #[error("the header has {0} segments, exactly one is allowed")]
    Segments(usize),
    /// The segment is not a plain `crypt` one.
    #[error("the segment is of type {0:?}, only \"crypt\" is allowed")]
    SegmentType(String),
    /// The segment has fields that change what it means: integrity, flags, hardware encryption.
    #[error("the segment carries {0:?}, which changes what its bytes mean")]
    SegmentField(String),
    /// The payload's cipher is not allowed; `cipher_null` above all.
    #[error("the segment's cipher is {0:?}, only \"aes-xts-plain64\" is allowed")]
    Cipher(String),
    /// A keyslot's own cipher is not allowed: its passphrase would protect nothing.
    #[error(
        "keyslot {keyslot} is encrypted with {cipher:?} and a key of {key_bytes} bytes, only \"aes-xts-plain64\" with 64 is allowed"
    )]
    KeyslotCipher {
        /// Which keyslot.
        keyslot: String,
        /// Its cipher.
        cipher: String,
        /// Its key size.
        key_bytes: u32,
    },
    /// The volume key has not 64 bytes.
    #[error("the volume key has {0} bytes, only 64 (AES-256-XTS) is allowed")]
    KeyBytes(u32),
    /// Neither 512 nor 4096.
    #[error("the encryption sector is {0} bytes, only 512 and 4096 are allowed")]
    SectorSize(u32),
    /// The payload starts inside the header, unaligned or absurdly far.
    #[error("the payload starts at byte {offset}: {cause}")]
    PayloadOffset {
        /// Where it starts.
        offset: u64,
        /// What is wrong with that.
        cause: &'static str,
    },
    /// The payload's size does not fit.
    #[error("the payload's size does not fit: {0}")]
    PayloadSize(&'static str),
    /// A keyslot's area lies outside the keyslots area, over another, or is too small.
    #[error("the area of keyslot {keyslot} is wrong: {cause}")]
    KeyslotArea {
        /// Which keyslot.
        keyslot: String,
        /// What is wrong with it.
        cause: &'static str,
    },
    /// A keyslot's anti-forensic splitter is none we know.
    #[error("keyslot {0} does not use the luks1 splitter with 4000 stripes")]
    Splitter(String),
    /// A hash that is not allowed.
    #[error("{place} uses the hash {hash:?}, only sha256, sha384 and sha512 are allowed")]
    Hash {
        /// Where it is named.
        place: &'static str,
        /// Its name.
        hash: String,
    },
    /// A key derivation function that is none of the three.
    #[error("keyslot {keyslot} derives its key with {kdf:?}, only pbkdf2, argon2i and argon2id are known")]
    Kdf {
        /// Which keyslot.
        keyslot: String,
        /// The function's name.
        kdf: String,
    },
    /// Opening would cost too much: a header can ask for hours and for all memory.
    #[error("{place} asks for {asked} {unit}, the limit is {limit}")]
    Cost {
        /// Which keyslot or digest.
        place: String,
        /// What it asks.
        asked: u64,
        /// What it may ask.
        limit: u64,
        /// In what.
        unit: &'static str,
    },
    /// A salt or digest has an impossible length or is no base64.
    #[error("{place} has a salt or digest that is not usable")]
    Salt {
        /// Where.
        place: String,
    },
    /// There is not exactly one digest for the segment, or its kind is unknown.
    #[error("the volume key cannot be checked: {0}")]
    Digest(&'static str),
    /// No keyslot could open it at all.
    #[error("the header has no keyslot of type luks2 that belongs to its segment")]
    NoKeyslot,
    /// The passphrase opens no keyslot.
    #[error("the passphrase opens none of the {tried} keyslots tried")]
    WrongPassphrase {
        /// How many were tried.
        tried: usize,
    },
    /// The keyslots together cost too much to try them all.
    #[error(
        "the passphrase opened none of the {tried} cheapest keyslots; trying the other {left} would exceed the limit on work"
    )]
    Budget {
        /// How many were tried.
        tried: usize,
        /// How many were not.
        left: usize,
    },
    /// The two halves of the key are equal: XTS would not hide the position of equal blocks.
    #[error("the two halves of the AES-XTS key are equal")]
    WeakKey,
    /// An empty or overlong passphrase.
    #[error("the passphrase is {0} bytes long, 1 to 512 are allowed")]
    PassphraseLength(usize),
    /// The options for a new header make no sense.
    #[error("no header can be made like that: {0}")]
    Options(&'static str),
    /// Memory for the key derivation is not there.
    #[error("there is no memory for argon2 ({0} KiB)")]
    Memory(u32),
    /// The kernel gives no randomness.
    #[error("the kernel gives no random bytes")]
    Entropy(#[source] std::io::Error),
    /// The cipher library refused; out of memory is the only known reason.
    #[error("the cipher library failed to set up AES-256-XTS")]
    Library,
}

/// What is wrong with one copy of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// No magic, or too short to have one.
    #[error("no magic")]
    Magic,
    /// Unknown version.
    #[error("unknown version")]
    Version,
    /// A size that LUKS2 does not allow, or cut short.
    #[error("impossible size")]
    Size,
    /// It says it lies elsewhere.
    #[error("wrong position")]
    Position,
    /// Unknown checksum algorithm.
    #[error("unknown checksum algorithm")]
    Algorithm,
    /// The checksum does not match.
    #[error("checksum mismatch")]
    Checksum,
}

impl Error {
    /// A stable name for scripts and searches.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "luks2-read",
            Self::NotLuks => "luks2-not-luks",
            Self::Version(_) => "luks2-version",
            Self::Damaged { .. } => "luks2-damaged",
            Self::Json(_) => "luks2-json",
            Self::Areas(_) => "luks2-areas",
            Self::TooMany { .. } => "luks2-too-many",
            Self::Requirement(_) => "luks2-requirement",
            Self::Reencryption(_) => "luks2-reencryption",
            Self::Segments(_) => "luks2-segments",
            Self::SegmentType(_) => "luks2-segment-type",
            Self::SegmentField(_) => "luks2-segment-field",
            Self::Cipher(_) => "luks2-cipher",
            Self::KeyslotCipher { .. } => "luks2-keyslot-cipher",
            Self::KeyBytes(_) => "luks2-key-bytes",
            Self::SectorSize(_) => "luks2-sector-size",
            Self::PayloadOffset { .. } => "luks2-payload-offset",
            Self::PayloadSize(_) => "luks2-payload-size",
            Self::KeyslotArea { .. } => "luks2-keyslot-area",
            Self::Splitter(_) => "luks2-splitter",
            Self::Hash { .. } => "luks2-hash",
            Self::Kdf { .. } => "luks2-kdf",
            Self::Cost { .. } => "luks2-cost",
            Self::Salt { .. } => "luks2-salt",
            Self::Digest(_) => "luks2-digest",
            Self::NoKeyslot => "luks2-no-keyslot",
            Self::WrongPassphrase { .. } => "luks2-wrong-passphrase",
            Self::Budget { .. } => "luks2-budget",
            Self::WeakKey => "luks2-weak-key",
            Self::PassphraseLength(_) => "luks2-passphrase-length",
            Self::Options(_) => "luks2-options",
            Self::Memory(_) => "luks2-memory",
            Self::Entropy(_) => "luks2-entropy",
            Self::Library => "luks2-library",
        }
    }

    /// What a person can do about it.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Read { .. } => {
                "check the medium (dmesg, smartctl) and restore the header from a backup if it is gone"
            }
            Self::NotLuks => {
                "check that this is the right file; restore the header with `cryptsetup luksHeaderRestore`"
            }
            Self::Version(_) => "convert it with `cryptsetup convert --type luks2`",
            Self::Json(_) | Self::Areas(_) | Self::TooMany { .. } => {
                "look at it with `cryptsetup luksDump`; if it came from a peer, do not trust that peer"
            }
            Self::Damaged { .. } => "restore the header from a backup with `cryptsetup luksHeaderRestore`",
            Self::Requirement(_) | Self::Reencryption(_) => {
                "finish or undo it with `cryptsetup reencrypt`; if nobody started one, the header was tampered with"
            }
            Self::Segments(_) | Self::SegmentType(_) | Self::SegmentField(_) => {
                "make the volume anew with one plain crypt segment; if it came from a peer, do not trust that peer"
            }
            Self::Cipher(_) | Self::KeyslotCipher { .. } | Self::KeyBytes(_) => {
                "if it came from a peer, do not trust that peer; else re-encrypt it with `cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512`"
            }
            Self::SectorSize(_) => "make the volume anew with --sector-size 512 or 4096",
            Self::PayloadOffset { .. } | Self::PayloadSize(_) | Self::KeyslotArea { .. } => {
                "compare with a header backup; if it came from a peer, do not trust that peer"
            }
            Self::Splitter(_) | Self::Hash { .. } | Self::Kdf { .. } | Self::Salt { .. } | Self::NoKeyslot => {
                "add a keyslot with `cryptsetup luksAddKey --pbkdf argon2id --hash sha256` and remove this one"
            }
            Self::Cost { .. } | Self::Budget { .. } => {
                "lower it with `cryptsetup luksConvertKey --pbkdf-memory … --pbkdf-force-iterations …`; if it came from a peer, do not trust that peer"
            }
            Self::Digest(_) => "restore the header from a backup with `cryptsetup luksHeaderRestore`",
            Self::WrongPassphrase { .. } => {
                "check that the key source gives this volume's passphrase, without a newline at its end"
            }
            Self::WeakKey => "such a key is never made by accident; make the volume anew",
            Self::PassphraseLength(_) => "check the key source",
            Self::Options(_) => "correct the option named",
            Self::Memory(_) => "free memory, or use a keyslot with a smaller cost",
            Self::Entropy(_) => "check that getrandom(2) is allowed here (seccomp)",
            Self::Library => "free memory and try again",
        }
    }
}
