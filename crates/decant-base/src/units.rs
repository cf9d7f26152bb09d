//! Units as types: a length that is not yet checked cannot be added to one that is.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a sector as NBD, iSCSI and LUKS2 headers count them.
pub const SECTOR: u64 = 512;
/// Bytes in a block, the grain of the clone's map: the page size and the sector size of new volumes.
pub const BLOCK: u64 = 4096;

/// A computation on units left the range of 64 bits, or a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Sum or product above 2^64 - 1, or a difference below zero.
    #[error("size out of range")]
    OutOfRange,
    /// Not a size as a person writes it.
    #[error("{0:?} is not a size: write a number with KiB, MiB, GiB or TiB, e.g. 4GiB")]
    NotASize(String),
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Zero bytes.
    pub const ZERO: Self = Self(0);

    /// `n` binary megabytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` binary gigabytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The sum, or an error above 2^64 - 1.
    pub fn checked_add(self, other: Self) -> Result<Self, UnitError> {
        self.0.checked_add(other.0).map(Self).ok_or(UnitError::OutOfRange)
    }

    /// The difference, or an error below zero.
    pub fn checked_sub(self, other: Self) -> Result<Self, UnitError> {
        self.0.checked_sub(other.0).map(Self).ok_or(UnitError::OutOfRange)
    }

    /// Reads `512`, `64KiB`, `4GiB`, `1T`; binary multiples, a fraction is refused.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        let fail = || UnitError::NotASize(text.chars().take(40).collect());
        let digits = text.trim().find(|c: char| !c.is_ascii_digit()).unwrap_or(text.trim().len());
        let (number, unit) = text.trim().split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(fail()),
        };
        let number: u64 = number.parse().map_err(|_| fail())?;
        number.checked_mul(1 << shift).map(Self).ok_or(UnitError::OutOfRange)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if value >= 100.0 || value.fract() == 0.0 { 0 } else { 1 };
        f.pad(&format!("{value:.digits$} {}", UNITS[unit]))
    }
}

/// The fencing number of a claim. It grows by one with every change of owner; the highest wins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    ///
    /// # Panics
    /// After 2^64 - 1 changes of owner, which no machine lives to see.
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("an epoch counts moves and cannot overflow"))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, want) in [("512", 512), ("4KiB", 4096), ("4 GiB", 4 << 30), ("1t", 1 << 40), ("16M", 16 << 20)] {
            assert_eq!(Bytes::parse(text), Ok(Bytes(want)), "{text}");
        }
        for text in ["", "GiB", "1.5GiB", "-1", "4 GB!", "99999999999T"] {
            assert!(Bytes::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_short() {
        for (bytes, want) in [(0, "0 B"), (4096, "4 KiB"), (212 << 20, "212 MiB"), (1536 << 20, "1.5 GiB")] {
            assert_eq!(Bytes(bytes).to_string(), want);
        }
    }
}
