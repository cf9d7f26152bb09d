//! What a login agrees on: stages, status codes, and the keys of sections 12 and 13 as pure functions for both roles.

mod keys;

pub use keys::{DEFAULT_MAX_SEGMENT, DigestPolicy, Negotiation, Offer, Params, is_security};

use crate::error::Violation;

/// A stage of a login (CSG, NSG; 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// SecurityNegotiation, 0.
    Security,
    /// LoginOperationalNegotiation, 1.
    Operational,
    /// FullFeaturePhase, 3.
    FullFeature,
}

impl Stage {
    /// From the wire; 2 is reserved.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Security),
            1 => Some(Self::Operational),
            3 => Some(Self::FullFeature),
            _ => None,
        }
    }

    /// The value on the wire.
    pub fn raw(self) -> u8 {
        match self {
            Self::Security => 0,
            Self::Operational => 1,
            Self::FullFeature => 3,
        }
    }

    /// The stages of a login PDU: the current one and, with T, the next, which must be later (11.12.3).
    ///
    /// # Errors
    /// Any other combination, and T together with C.
    pub fn check(transit: bool, more: bool, current: u8, next: u8) -> Result<(Self, Option<Self>), Violation> {
        let wrong = Violation::Malformed("login stages");
        let current = Self::from_raw(current).filter(|stage| *stage != Self::FullFeature).ok_or(wrong.clone())?;
        if !transit {
            return Ok((current, None));
        }
        let next = Self::from_raw(next).filter(|next| next.raw() > current.raw()).ok_or(wrong.clone())?;
        if more { Err(wrong) } else { Ok((current, Some(next))) }
    }
}

/// Status-Class and Status-Detail of a login response (11.13.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status {
    /// Status-Class: 0 success, 1 redirection, 2 initiator error, 3 target error.
    pub class: u8,
    /// Status-Detail.
    pub detail: u8,
}

impl Status {
    /// Success.
    pub const SUCCESS: Self = Self { class: 0, detail: 0 };
    /// The target has moved temporarily; TargetAddress says where.
    pub const MOVED_TEMPORARILY: Self = Self { class: 1, detail: 1 };
    /// The target has moved for good.
    pub const MOVED_PERMANENTLY: Self = Self { class: 1, detail: 2 };
    /// Miscellaneous iSCSI initiator errors.
    pub const INITIATOR_ERROR: Self = Self { class: 2, detail: 0 };
    /// The initiator could not be authenticated.
    pub const AUTHENTICATION_FAILURE: Self = Self { class: 2, detail: 1 };
    /// The initiator is not allowed access to the target.
    pub const AUTHORIZATION_FAILURE: Self = Self { class: 2, detail: 2 };
    /// There is no such target.
    pub const NOT_FOUND: Self = Self { class: 2, detail: 3 };
    /// The target was removed for good.
    pub const TARGET_REMOVED: Self = Self { class: 2, detail: 4 };
    /// No version in common.
    pub const UNSUPPORTED_VERSION: Self = Self { class: 2, detail: 5 };
    /// Too many connections on this session.
    pub const TOO_MANY_CONNECTIONS: Self = Self { class: 2, detail: 6 };
    /// InitiatorName or another key that must be there is missing.
    pub const MISSING_PARAMETER: Self = Self { class: 2, detail: 7 };
    /// The session cannot include this connection.
    pub const CANNOT_INCLUDE: Self = Self { class: 2, detail: 8 };
    /// The target does not offer this type of session.
    pub const SESSION_TYPE: Self = Self { class: 2, detail: 9 };
    /// The session to be joined does not exist.
    pub const NO_SESSION: Self = Self { class: 2, detail: 10 };
    /// Invalid request type during login.
    pub const INVALID_REQUEST: Self = Self { class: 2, detail: 11 };
    /// Target hardware or software error.
    pub const TARGET_ERROR: Self = Self { class: 3, detail: 0 };
    /// The service is not available at present.
    pub const UNAVAILABLE: Self = Self { class: 3, detail: 1 };
    /// Out of resources.
    pub const OUT_OF_RESOURCES: Self = Self { class: 3, detail: 2 };
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match *self {
            Self::SUCCESS => "success",
            Self::MOVED_TEMPORARILY => "target moved temporarily",
            Self::MOVED_PERMANENTLY => "target moved",
            Self::INITIATOR_ERROR => "initiator error",
            Self::AUTHENTICATION_FAILURE => "authentication failure",
            Self::AUTHORIZATION_FAILURE => "access to the target is not allowed",
            Self::NOT_FOUND => "no such target",
            Self::TARGET_REMOVED => "target removed",
            Self::UNSUPPORTED_VERSION => "unsupported version",
            Self::TOO_MANY_CONNECTIONS => "too many connections",
            Self::MISSING_PARAMETER => "missing parameter",
            Self::CANNOT_INCLUDE => "cannot include this connection in the session",
            Self::SESSION_TYPE => "session type not supported",
            Self::NO_SESSION => "session does not exist",
            Self::INVALID_REQUEST => "invalid request during login",
            Self::TARGET_ERROR => "target error",
            Self::UNAVAILABLE => "service unavailable",
            Self::OUT_OF_RESOURCES => "out of resources",
            _ => "unknown status",
        };
        write!(f, "{text} ({:02x}{:02x})", self.class, self.detail)
    }
}
