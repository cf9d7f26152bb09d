//! The one shape of every failure.

use serde::{Deserialize, Serialize};

/// What kind of failure, for programs. Codes are never renamed or reused; clients take an unknown one as [`Code::Internal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// 400: the request is malformed, or names an impossible value.
    InvalidRequest,
    /// 403: the caller's certificate does not allow this.
    Forbidden,
    /// 404: no such thing on the workers asked.
    NotFound,
    /// 404: no such path, or not this method on it.
    NoSuchPath,
    /// 409: something of that name is there already and differs.
    Exists,
    /// 409: the thing is in a state that does not allow this, e.g. a stop while it moves.
    Conflict,
    /// 409: another worker owns the machine; `cause` names it.
    Elsewhere,
    /// 409: the worker takes no new machines.
    Cordoned,
    /// 409: the plan has blockers and nothing was touched.
    Blocked,
    /// 409: it cannot be done as things are; the other side or the data plane said why.
    Refused,
    /// 409: past the point of no return; cancelling can no longer stop it.
    TooLate,
    /// 409: only the operator's word (`--force`) allows this.
    NeedsForce,
    /// 507: no room here.
    NoRoom,
    /// 503: a worker or a part of this one does not answer; trying again may help.
    Unavailable,
    /// 504: it did not finish in time, and goes on.
    Timeout,
    /// 413: the request is too long.
    TooLong,
    /// 500: a person is needed; nothing is retried.
    Stuck,
    /// 500: a fault of the agent.
    #[serde(other)]
    Internal,
}

impl Code {
    /// Every code, in the order of its declaration.
    pub const ALL: [Self; 18] = [
        Self::InvalidRequest,
        Self::Forbidden,
        Self::NotFound,
        Self::NoSuchPath,
        Self::Exists,
        Self::Conflict,
        Self::Elsewhere,
        Self::Cordoned,
        Self::Blocked,
        Self::Refused,
        Self::TooLate,
        Self::NeedsForce,
        Self::NoRoom,
        Self::Unavailable,
        Self::Timeout,
        Self::TooLong,
        Self::Stuck,
        Self::Internal,
    ];

    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Forbidden => 403,
            Self::NotFound | Self::NoSuchPath => 404,
            Self::Exists
            | Self::Conflict
            | Self::Elsewhere
            | Self::Cordoned
            | Self::Blocked
            | Self::Refused
            | Self::TooLate
            | Self::NeedsForce => 409,
            Self::TooLong => 413,
            Self::NoRoom => 507,
            Self::Unavailable => 503,
            Self::Timeout => 504,
            Self::Stuck | Self::Internal => 500,
        }
    }
}

/// The body of every response that is not 2xx.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{name}: {cause}; {fix}")]
pub struct ErrorBody {
    /// What kind, for programs.
    pub code: Code,
    /// What went wrong, in a few words, e.g. `machine not found`.
    pub name: String,
    /// Why.
    pub cause: String,
    /// What the reader can do about it.
    pub fix: String,
}

impl ErrorBody {
    /// An error of `code`.
    pub fn new(code: Code, name: impl Into<String>, cause: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { code, name: name.into(), cause: cause.into(), fix: fix.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_stable() {
        let lines: Vec<String> = Code::ALL
            .iter()
            .map(|code| format!("{} {}", code.status(), serde_json::to_string(code).expect("a code is a string")))
            .collect();
        expect_test::expect![[r#"
            400 "invalid_request"
            403 "forbidden"
            404 "not_found"
            404 "no_such_path"
            409 "exists"
            409 "conflict"
            409 "elsewhere"
            409 "cordoned"
            409 "blocked"
            409 "refused"
            409 "too_late"
            409 "needs_force"
            507 "no_room"
            503 "unavailable"
            504 "timeout"
            413 "too_long"
            500 "stuck"
            500 "internal""#]]
        .assert_eq(&lines.join("\n"));
    }

    #[test]
    fn a_code_of_a_later_version_reads_as_internal() {
        assert_eq!(serde_json::from_str::<Code>(r#""new_in_9""#).expect("any string is a code"), Code::Internal);
    }
}
