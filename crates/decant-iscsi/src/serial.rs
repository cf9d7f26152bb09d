//! Serial numbers that wrap: CmdSN, StatSN, DataSN (4.2.2.1, RFC 1982).

/// A 32-bit serial number. There is no order on serial numbers, only "is before", which holds between numbers less than
/// 2^31 apart; two that are exactly 2^31 apart are neither before nor after each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Serial(pub u32);

impl Serial {
    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Self {
        self.plus(1)
    }

    /// The number `n` further on; `n` below 2^31.
    #[must_use]
    pub fn plus(self, n: u32) -> Self {
        Self(self.0.wrapping_add(n))
    }

    /// The number `n` back; `n` below 2^31.
    #[must_use]
    pub fn minus(self, n: u32) -> Self {
        Self(self.0.wrapping_sub(n))
    }

    /// Whether this comes before `other`.
    pub fn is_before(self, other: Self) -> bool {
        let distance = other.0.wrapping_sub(self.0);
        distance != 0 && distance < 1 << 31
    }

    /// Whether this is `other` or comes before it.
    pub fn is_at_most(self, other: Self) -> bool {
        self == other || self.is_before(other)
    }

    /// How many steps lead from `earlier` to this; 0 if it is not earlier.
    pub fn since(self, earlier: Self) -> u32 {
        if earlier.is_before(self) { self.0.wrapping_sub(earlier.0) } else { 0 }
    }
}

impl std::fmt::Display for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
