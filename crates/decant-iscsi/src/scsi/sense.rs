//! Sense data (SPC-4 4.5).

use crate::wire::SetFields;

/// SENSE KEY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SenseKey {
    /// NO SENSE, 0.
    NoSense,
    /// NOT READY, 2.
    NotReady,
    /// MEDIUM ERROR, 3.
    MediumError,
    /// HARDWARE ERROR, 4.
    HardwareError,
    /// ILLEGAL REQUEST, 5.
    IllegalRequest,
    /// UNIT ATTENTION, 6.
    UnitAttention,
    /// DATA PROTECT, 7.
    DataProtect,
    /// ABORTED COMMAND, 0Bh.
    AbortedCommand,
    /// MISCOMPARE, 0Eh.
    Miscompare,
}

impl SenseKey {
    /// The value on the wire.
    pub fn raw(self) -> u8 {
        match self {
            Self::NoSense => 0,
            Self::NotReady => 2,
            Self::MediumError => 3,
            Self::HardwareError => 4,
            Self::IllegalRequest => 5,
            Self::UnitAttention => 6,
            Self::DataProtect => 7,
            Self::AbortedCommand => 0x0b,
            Self::Miscompare => 0x0e,
        }
    }
}

/// Additional sense codes with their qualifiers, code in the high byte.
pub mod asc {
    /// NO ADDITIONAL SENSE INFORMATION.
    pub const NONE: u16 = 0x0000;
    /// LOGICAL UNIT NOT READY, CAUSE NOT REPORTABLE.
    pub const NOT_READY: u16 = 0x0400;
    /// WRITE ERROR.
    pub const WRITE_ERROR: u16 = 0x0c00;
    /// INVALID FIELD IN COMMAND INFORMATION UNIT.
    pub const INVALID_INFORMATION_UNIT: u16 = 0x0e03;
    /// UNRECOVERED READ ERROR.
    pub const READ_ERROR: u16 = 0x1100;
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LIST_LENGTH: u16 = 0x1a00;
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: u16 = 0x1d00;
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPERATION_CODE: u16 = 0x2000;
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: u16 = 0x2100;
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD_IN_CDB: u16 = 0x2400;
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const LUN_NOT_SUPPORTED: u16 = 0x2500;
    /// INVALID FIELD IN PARAMETER LIST.
    pub const INVALID_FIELD_IN_LIST: u16 = 0x2600;
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: u16 = 0x2700;
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const NO_SPACE: u16 = 0x2707;
    /// POWER ON OCCURRED.
    pub const POWER_ON: u16 = 0x2901;
    /// BUS DEVICE RESET FUNCTION OCCURRED.
    pub const RESET: u16 = 0x2903;
    /// I_T NEXUS LOSS OCCURRED.
    pub const NEXUS_LOSS: u16 = 0x2907;
    /// MODE PARAMETERS CHANGED.
    pub const MODE_CHANGED: u16 = 0x2a01;
    /// CAPACITY DATA HAS CHANGED.
    pub const CAPACITY_CHANGED: u16 = 0x2a09;
    /// COMMANDS CLEARED BY ANOTHER INITIATOR.
    pub const CLEARED_BY_OTHER: u16 = 0x2f00;
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const NO_SAVING: u16 = 0x3900;
    /// INTERNAL TARGET FAILURE.
    pub const TARGET_FAILURE: u16 = 0x4400;
    /// PROTOCOL SERVICE CRC ERROR.
    pub const CRC_ERROR: u16 = 0x4705;
    /// INQUIRY DATA HAS CHANGED.
    pub const INQUIRY_CHANGED: u16 = 0x3f03;
    /// DEVICE IDENTIFIER CHANGED.
    pub const IDENTIFIER_CHANGED: u16 = 0x3f05;
    /// REPORTED LUNS DATA HAS CHANGED.
    pub const LUNS_CHANGED: u16 = 0x3f0e;
    /// OVERLAPPED COMMANDS ATTEMPTED.
    pub const OVERLAPPED: u16 = 0x4e00;
}

/// What else there is to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Information {
    /// Nothing.
    #[default]
    None,
    /// INFORMATION: an LBA, or an offset.
    Value(u64),
    /// SENSE KEY SPECIFIC: a byte of the CDB is wrong, and if given, the most significant bit of the field.
    Cdb(u16, Option<u8>),
    /// SENSE KEY SPECIFIC: a byte of the parameter list is wrong.
    List(u16),
}

/// The sense data of one CHECK CONDITION.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// SENSE KEY.
    pub key: SenseKey,
    /// One of [`asc`].
    pub asc: u16,
    /// What else.
    pub information: Information,
}

impl Sense {
    /// With nothing else to say.
    pub fn new(key: SenseKey, asc: u16) -> Self {
        Self { key, asc, information: Information::None }
    }

    /// ILLEGAL REQUEST.
    pub fn illegal(asc: u16) -> Self {
        Self::new(SenseKey::IllegalRequest, asc)
    }

    /// INVALID FIELD IN CDB, in this byte.
    pub fn invalid_field(byte: u16) -> Self {
        Self { information: Information::Cdb(byte, None), ..Self::illegal(asc::INVALID_FIELD_IN_CDB) }
    }

    /// INVALID FIELD IN PARAMETER LIST, in this byte.
    pub fn invalid_parameter(byte: u16) -> Self {
        Self { information: Information::List(byte), ..Self::illegal(asc::INVALID_FIELD_IN_LIST) }
    }

    /// LOGICAL BLOCK ADDRESS OUT OF RANGE, at this one.
    pub fn out_of_range(lba: u64) -> Self {
        Self { information: Information::Value(lba), ..Self::illegal(asc::LBA_OUT_OF_RANGE) }
    }

    /// UNIT ATTENTION.
    pub fn attention(asc: u16) -> Self {
        Self::new(SenseKey::UnitAttention, asc)
    }

    /// In descriptor or fixed format.
    pub fn encode(&self, descriptor: bool) -> Vec<u8> {
        let [code, qualifier] = self.asc.to_be_bytes();
        let specific = match self.information {
            Information::Cdb(byte, bit) => {
                let [high, low] = byte.to_be_bytes();
                Some([0xc0 | bit.map_or(0, |bit| 0x08 | (bit & 7)), high, low])
            }
            Information::List(byte) => {
                let [high, low] = byte.to_be_bytes();
                Some([0x80, high, low])
            }
            _ => None,
        };
        let value = if let Information::Value(value) = self.information { Some(value) } else { None };
        if !descriptor {
            let mut fixed = [0u8; 18];
            fixed.set_u8(0, 0x70);
            // A value that needs more than 32 bits cannot be said in this format.
            if let Some(value) = value.and_then(|value| u32::try_from(value).ok()) {
                fixed.set_u8(0, 0xf0);
                fixed.set_u32(3, value);
            }
            fixed.set(2, &[self.key.raw()]);
            fixed.set(7, &[10]);
            fixed.set(12, &[code, qualifier]);
            if let Some(specific) = specific {
                fixed.set(15, &specific);
            }
            return fixed.to_vec();
        }
        let mut bytes = vec![0x72, self.key.raw(), code, qualifier, 0, 0, 0, 0];
        if let Some(value) = value {
            bytes.extend_from_slice(&[0x00, 0x0a, 0x80, 0]);
            bytes.extend_from_slice(&value.to_be_bytes());
        }
        if let Some([a, b, c]) = specific {
            bytes.extend_from_slice(&[0x02, 0x06, 0, 0, a, b, c, 0]);
        }
        let length = u8::try_from(bytes.len().saturating_sub(8)).unwrap_or_default();
        bytes.set_u8(7, length);
        bytes
    }
}
