//! The crash points of the journal and of the peers' messages, each name in a table, so that a sweep can tell an unhit
//! one (`crates/decant/tests/crash_sweep.rs`).

use crate::drain::DrainState;
use crate::migration::{Phase, Role};
use crate::row::Life;
use crate::vocabulary::Body;

/// The names of a crash point before and after a commit, both in [`POINTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Point {
    /// Passed before the commit.
    pub before: &'static str,
    /// Passed after it.
    pub after: &'static str,
}

/// The names of a message's crash points, all in [`MESSAGE_POINTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MessagePoints {
    /// Passed before it is sent.
    pub before: &'static str,
    /// Passed when it was sent, delivered or not.
    pub after: &'static str,
    /// Passed when it has arrived, before it is stepped.
    pub received: &'static str,
}

macro_rules! point {
    ($name:literal) => {
        Point { before: concat!("journal:", $name, ":before"), after: concat!("journal:", $name, ":after") }
    };
}

macro_rules! message {
    ($name:literal) => {
        MessagePoints {
            before: concat!("send:", $name, ":before"),
            after: concat!("send:", $name, ":after"),
            received: concat!("recv:", $name),
        }
    };
}

/// Every crash point of the journal: `journal:<source|destination|machine|drain>:<phase>:<before|after>`.
pub const POINTS: &[Point] = &[
    point!("source:planned"),
    point!("source:prepared"),
    point!("source:stopped"),
    point!("source:sealed"),
    point!("source:granted"),
    point!("source:booted"),
    point!("source:hydrating"),
    point!("source:verified"),
    point!("source:cleaned"),
    point!("source:unwinding"),
    point!("source:ended"),
    point!("destination:planned"),
    point!("destination:prepared"),
    point!("destination:granted"),
    point!("destination:booted"),
    point!("destination:hydrating"),
    point!("destination:verified"),
    point!("destination:cleaned"),
    point!("destination:unwinding"),
    point!("destination:ended"),
    point!("machine:down"),
    point!("machine:starting"),
    point!("machine:up"),
    point!("machine:stopping"),
    point!("machine:detaching"),
    point!("drain:cordoning"),
    point!("drain:planning"),
    point!("drain:moving"),
    point!("drain:blocked"),
    point!("drain:evacuated"),
    point!("drain:drained"),
    point!("drain:cancelling"),
    point!("drain:cancelled"),
    point!("drain:overdue"),
];

/// Every crash point of a message: `send:<message>:<before|after>`, `recv:<message>`.
pub const MESSAGE_POINTS: &[MessagePoints] = &[
    message!("prepare"),
    message!("prepare-ok"),
    message!("prepare-failed"),
    message!("grant"),
    message!("refuse"),
    message!("grant-accepted"),
    message!("grant-refused"),
    message!("grant-stale"),
    message!("abandon"),
    message!("abandoned"),
    message!("progress"),
    message!("verified"),
    message!("released"),
];

impl Point {
    /// The point of a commit that enters `phase`.
    pub(crate) fn of_phase(role: Role, phase: Phase) -> Self {
        match (role, phase) {
            (Role::Source, Phase::Planned) => point!("source:planned"),
            (Role::Source, Phase::Prepared) => point!("source:prepared"),
            (Role::Source, Phase::Stopped) => point!("source:stopped"),
            (Role::Source, Phase::Sealed) => point!("source:sealed"),
            (Role::Source, Phase::Granted) => point!("source:granted"),
            (Role::Source, Phase::Booted) => point!("source:booted"),
            (Role::Source, Phase::Hydrating) => point!("source:hydrating"),
            (Role::Source, Phase::Verified) => point!("source:verified"),
            (Role::Source, Phase::Cleaned) => point!("source:cleaned"),
            (Role::Source, Phase::Unwinding) => point!("source:unwinding"),
            (Role::Source, Phase::Ended) => point!("source:ended"),
            (Role::Destination, Phase::Planned) => point!("destination:planned"),
            (Role::Destination, Phase::Prepared | Phase::Stopped | Phase::Sealed) => point!("destination:prepared"),
            (Role::Destination, Phase::Granted) => point!("destination:granted"),
            (Role::Destination, Phase::Booted) => point!("destination:booted"),
            (Role::Destination, Phase::Hydrating) => point!("destination:hydrating"),
            (Role::Destination, Phase::Verified) => point!("destination:verified"),
            (Role::Destination, Phase::Cleaned) => point!("destination:cleaned"),
            (Role::Destination, Phase::Unwinding) => point!("destination:unwinding"),
            (Role::Destination, Phase::Ended) => point!("destination:ended"),
        }
    }

    /// The point of a commit that changes nothing of a migration's phase.
    pub(crate) fn of_life(life: Life) -> Self {
        match life {
            Life::Down => point!("machine:down"),
            Life::Starting => point!("machine:starting"),
            Life::Up => point!("machine:up"),
            Life::Stopping => point!("machine:stopping"),
            Life::Detaching => point!("machine:detaching"),
        }
    }

    /// The point of a drain's commit.
    pub(crate) fn of_drain(state: DrainState) -> Self {
        match state {
            DrainState::Cordoning => point!("drain:cordoning"),
            DrainState::Planning => point!("drain:planning"),
            DrainState::Moving => point!("drain:moving"),
            DrainState::Blocked => point!("drain:blocked"),
            DrainState::Evacuated => point!("drain:evacuated"),
            DrainState::Drained => point!("drain:drained"),
            DrainState::Cancelling => point!("drain:cancelling"),
            DrainState::Cancelled => point!("drain:cancelled"),
            DrainState::Overdue => point!("drain:overdue"),
        }
    }
}

impl Body {
    /// The message's crash points.
    pub fn points(&self) -> MessagePoints {
        match self {
            Self::Prepare { .. } => message!("prepare"),
            Self::PrepareOk => message!("prepare-ok"),
            Self::PrepareFailed { .. } => message!("prepare-failed"),
            Self::Grant { .. } => message!("grant"),
            Self::Refuse => message!("refuse"),
            Self::GrantAccepted => message!("grant-accepted"),
            Self::GrantRefused => message!("grant-refused"),
            Self::GrantStale { .. } => message!("grant-stale"),
            Self::Abandon => message!("abandon"),
            Self::Abandoned => message!("abandoned"),
            Self::Progress { .. } => message!("progress"),
            Self::Verified { .. } => message!("verified"),
            Self::Released => message!("released"),
        }
    }

    /// The message's word, as logs write it.
    pub fn name(&self) -> &'static str {
        self.points().received.trim_start_matches("recv:")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_in_the_table() {
        for phase in Phase::ALL {
            assert!(POINTS.contains(&Point::of_phase(Role::Source, phase)), "{phase:?}");
            assert!(POINTS.contains(&Point::of_phase(Role::Destination, phase)), "{phase:?}");
        }
        for life in [Life::Down, Life::Starting, Life::Up, Life::Stopping, Life::Detaching] {
            assert!(POINTS.contains(&Point::of_life(life)), "{life:?}");
        }
        for state in [
            DrainState::Cordoning,
            DrainState::Planning,
            DrainState::Moving,
            DrainState::Blocked,
            DrainState::Evacuated,
            DrainState::Drained,
            DrainState::Cancelling,
            DrainState::Cancelled,
            DrainState::Overdue,
        ] {
            assert!(POINTS.contains(&Point::of_drain(state)), "{state:?}");
        }
        let journal = POINTS.iter().flat_map(|p| [p.before, p.after]);
        let messages = MESSAGE_POINTS.iter().flat_map(|p| [p.before, p.after, p.received]);
        let names: std::collections::BTreeSet<&str> = journal.chain(messages).collect();
        assert_eq!(names.len(), 2 * POINTS.len() + 3 * MESSAGE_POINTS.len(), "a name is there twice");
    }
}
