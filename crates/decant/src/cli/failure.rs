//! How a command fails: an exit status for scripts; name, cause and fix for people, or the same as JSON.

use std::process::ExitCode;

use decant_api::{Code, ErrorBody};

use super::output::Output;

/// Exit statuses. They are part of the interface and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It is done.
    Done = 0,
    /// It failed.
    Error = 1,
    /// It was asked for in the wrong way.
    Usage = 2,
    /// Something stands in the way, and is named.
    Blocked = 3,
    /// The deadline passed first.
    Deadline = 4,
    /// It was cancelled.
    Cancelled = 5,
    /// It goes on without us.
    Detached = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// With which status.
    pub(crate) exit: Exit,
    /// Why.
    pub(crate) body: Box<ErrorBody>,
}

impl Failure {
    /// A failure of this program, not of the agent.
    pub(crate) fn local(name: &str, cause: impl std::fmt::Display, fix: impl Into<String>) -> Self {
        Self::from(ErrorBody::new(Code::Unavailable, name, cause.to_string(), fix))
    }

    /// The request makes no sense.
    pub(crate) fn usage(name: &str, cause: impl std::fmt::Display, fix: impl Into<String>) -> Self {
        Self::from(ErrorBody::new(Code::InvalidRequest, name, cause.to_string(), fix))
    }

    /// Something stands in the way.
    pub(crate) fn blocked(name: &str, cause: impl std::fmt::Display, fix: impl Into<String>) -> Self {
        Self::from(ErrorBody::new(Code::Blocked, name, cause.to_string(), fix))
    }

    /// As it is shown.
    pub(crate) fn text(&self, output: Output) -> String {
        match output {
            Output::Json => serde_json::to_string(&self.body).unwrap_or_else(|error| error.to_string()),
            Output::Table => {
                let ErrorBody { name, cause, fix, .. } = &*self.body;
                format!("error: {name}\n  cause: {cause}\n  fix:   {fix}")
            }
        }
    }
}

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        let exit = match body.code {
            Code::InvalidRequest => Exit::Usage,
            Code::Blocked => Exit::Blocked,
            _ => Exit::Error,
        };
        Self { exit, body: Box::new(body) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_reads_as_name_cause_fix_or_json() {
        let failure = Failure::from(ErrorBody::new(Code::NoRoom, "no room", "4 GiB wanted, 1 GiB free", "free some"));
        expect_test::expect![[r"
            error: no room
              cause: 4 GiB wanted, 1 GiB free
              fix:   free some"]]
        .assert_eq(&failure.text(Output::Table));
        expect_test::expect![[
            r#"{"code":"no_room","name":"no room","cause":"4 GiB wanted, 1 GiB free","fix":"free some"}"#
        ]]
        .assert_eq(&failure.text(Output::Json));
    }

    #[test]
    fn every_code_has_its_exit_status() {
        let lines: Vec<String> = Code::ALL
            .iter()
            .map(|code| format!("{code:?} {}", Failure::from(ErrorBody::new(*code, "", "", "")).exit as u8))
            .filter(|line| !line.ends_with(" 1"))
            .collect();
        assert_eq!(lines, ["InvalidRequest 2", "Blocked 3"], "all others are 1");
    }
}
