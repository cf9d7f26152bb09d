//! What a handshake is about.

/// Flags that an export has ("Transmission flags"); a set of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransmissionFlags(pub u16);

impl TransmissionFlags {
    /// NBD_FLAG_HAS_FLAGS: always set.
    pub const HAS_FLAGS: Self = Self(1 << 0);
    /// NBD_FLAG_READ_ONLY.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// NBD_FLAG_SEND_FLUSH: FLUSH may be sent.
    pub const FLUSH: Self = Self(1 << 2);
    /// NBD_FLAG_SEND_FUA: the FUA flag is understood.
    pub const FUA: Self = Self(1 << 3);
    /// NBD_FLAG_SEND_TRIM: TRIM may be sent.
    pub const TRIM: Self = Self(1 << 5);
    /// NBD_FLAG_SEND_WRITE_ZEROES: WRITE_ZEROES may be sent.
    pub const WRITE_ZEROES: Self = Self(1 << 6);
    /// NBD_FLAG_SEND_DF: the DF flag is understood (structured replies only).
    pub const DF: Self = Self(1 << 7);
    /// NBD_FLAG_CAN_MULTI_CONN: a flush on one connection covers what others acknowledged.
    pub const MULTI_CONN: Self = Self(1 << 8);
    /// NBD_FLAG_SEND_FAST_ZERO: the FAST_ZERO flag is understood.
    pub const FAST_ZERO: Self = Self(1 << 11);

    /// What this server offers on a writable or a read-only export. DF is added by the machine where it is valid.
    pub fn offered(read_only: bool) -> Self {
        let common = Self::HAS_FLAGS | Self::FLUSH | Self::FUA | Self::MULTI_CONN;
        if read_only { common | Self::READ_ONLY } else { common | Self::TRIM | Self::WRITE_ZEROES | Self::FAST_ZERO }
    }

    /// Whether every bit of `other` is set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Without the bits of `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl std::ops::BitOr for TransmissionFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Block size constraints (NBD_INFO_BLOCK_SIZE), bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this; a power of two, at most 64 KiB.
    pub minimum: u32,
    /// Smaller requests are slow; a power of two.
    pub preferred: u32,
    /// Longest payload.
    pub maximum: u32,
}

impl BlockSizes {
    /// What a server that says nothing has to be taken for.
    pub const UNSAID: Self = Self { minimum: 512, preferred: 4096, maximum: crate::MAX_PAYLOAD };

    /// Whether the constraints make sense ("Block size constraints").
    pub(crate) fn are_sane(self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 64 * 1024
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum
            && self.maximum >= self.minimum
    }
}

/// An export, as the handshake describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name; at most [`crate::MAX_NAME`] bytes. The empty name is the default export.
    pub name: String,
    /// Bytes; at most `i64::MAX`.
    pub size: u64,
    /// What may be done with it.
    pub flags: TransmissionFlags,
    /// How requests must be shaped.
    pub blocks: BlockSizes,
}

/// A metadata context that BLOCK_STATUS can answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: flags bit 0 hole, bit 1 reads as zeros.
    Allocation,
    /// `decant:crc32c`, private to Decant: each descriptor is one 4 KiB block (the export's last may be shorter), and its
    /// flags are the CRC-32C of the block's bytes as this server served them, or of its medium if it has not yet.
    Digests,
}

impl Context {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Digests];
    /// Bit of `base:allocation` flags: nothing is allocated.
    pub const HOLE: u32 = 1;
    /// Bit of `base:allocation` flags: reads as zeros.
    pub const ZERO: u32 = 2;

    /// The name in the handshake.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Digests => "decant:crc32c",
        }
    }

    /// The id that this crate's server gives it.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Digests => 2,
        }
    }
}

/// A set of contexts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contexts {
    /// [`Context::Allocation`].
    pub allocation: bool,
    /// [`Context::Digests`].
    pub digests: bool,
}

impl Contexts {
    /// The empty set.
    pub const NONE: Self = Self { allocation: false, digests: false };
    /// Both.
    pub const ALL: Self = Self { allocation: true, digests: true };

    /// Whether it holds `context`.
    pub fn has(self, context: Context) -> bool {
        match context {
            Context::Allocation => self.allocation,
            Context::Digests => self.digests,
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(self) -> bool {
        self == Self::NONE
    }

    pub(crate) fn insert(&mut self, context: Context) {
        match context {
            Context::Allocation => self.allocation = true,
            Context::Digests => self.digests = true,
        }
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |context| self.has(*context))
    }
}
