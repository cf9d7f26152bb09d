//! Failures as responses.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use decant_api::{Code, ErrorBody};
use decant_base::{MachineId, WorkerId};
use decant_dataplane::{Failure, FailureCode};
use decant_drain::Denied;

use crate::core::Refusal;

/// A failure on its way out.
#[derive(Debug)]
pub(crate) struct Fail(pub(crate) ErrorBody);

impl Fail {
    pub(crate) fn new(code: Code, name: &str, cause: impl Into<String>, fix: impl Into<String>) -> Self {
        Self(ErrorBody::new(code, name, cause, fix))
    }

    pub(crate) fn invalid(cause: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, "invalid request", cause, fix)
    }

    /// No `what` called `id` here.
    pub(crate) fn not_found(what: &str, id: &impl std::fmt::Display, fix: &str) -> Self {
        Self::new(Code::NotFound, &format!("{what} not found"), format!("no {what} {id} is known here"), fix)
    }

    /// Another worker has it.
    pub(crate) fn elsewhere(machine: &MachineId, owner: &WorkerId) -> Self {
        Self::new(
            Code::Elsewhere,
            "machine is elsewhere",
            format!("{owner} owns {machine}"),
            format!("run the command on {owner}"),
        )
    }
}

impl IntoResponse for Fail {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<ErrorBody> for Fail {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl From<Refusal> for Fail {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Denied(denied) => denied.into(),
            Refusal::Down(cause) => Self::new(
                Code::Unavailable,
                "agent is ending",
                cause,
                "start it again; machines run on meanwhile. If it ends again, read its log",
            ),
        }
    }
}

impl From<Denied> for Fail {
    fn from(denied: Denied) -> Self {
        let cause = denied.to_string();
        let (code, name, fix) = match denied {
            Denied::NotOwner { .. } => {
                (Code::Elsewhere, "not the owner", "ask `decant machine show` which worker owns it")
            }
            Denied::Exists { .. } => {
                (Code::Exists, "machine exists", "choose another name, or remove the machine first")
            }
            Denied::Busy { .. } => (Code::Conflict, "machine is busy", "wait until that is over, or cancel it"),
            Denied::Over { .. } => (Code::Conflict, "migration is over", "nothing is left to do"),
            Denied::TooLate { .. } => (
                Code::TooLate,
                "too late to cancel",
                "watch it with `decant migration watch`, then bring the machine back with `decant machine move`",
            ),
            Denied::Unknown { .. } => (Code::NotFound, "migration not found", "list them with `decant migration list`"),
            Denied::Senseless { .. } => {
                (Code::Conflict, "not possible now", "look at the machine with `decant machine show`")
            }
            Denied::Unawaited => (Code::Conflict, "not awaited", "nothing is left to do"),
            Denied::Impossible { .. } => (Code::Refused, "impossible message", "look at the logs of both workers"),
        };
        Self::new(code, name, cause, fix)
    }
}

impl From<Failure> for Fail {
    fn from(failure: Failure) -> Self {
        let (code, fix) = match failure.code {
            FailureCode::Retry | FailureCode::NotYet => (Code::Unavailable, "try again"),
            FailureCode::Refused => (Code::Refused, "change what the cause names, then try again"),
            FailureCode::Stuck => {
                (Code::Stuck, "look at the agent's log on this worker; nothing is tried again by itself")
            }
        };
        Self::new(code, "the worker could not do it", failure.message, fix)
    }
}

#[cfg(test)]
mod tests {
    use decant_base::MigrationId;
    use expect_test::expect;

    use super::*;

    /// Every denial as a user sees it.
    #[test]
    fn denials_have_name_cause_and_fix() {
        let worker = || WorkerId::new("worker-2").expect("a label");
        let migration = || MigrationId::new("m-1").expect("a label");
        let all = [
            Denied::NotOwner { worker: worker(), state: "sealed".to_owned(), hint: ", it went to worker-3".to_owned() },
            Denied::Exists { state: "active".to_owned() },
            Denied::Busy { reason: "migration m-0 is under way".to_owned() },
            Denied::Over { migration: migration(), phase: "cleaned".to_owned() },
            Denied::TooLate { migration: migration(), to: worker() },
            Denied::Unknown { migration: migration() },
            Denied::Senseless { reason: "it is stopped already".to_owned() },
            Denied::Unawaited,
            Denied::Impossible { from: worker(), what: "grant".to_owned(), reason: "nothing was prepared".to_owned() },
        ];
        let down = Refusal::Down("disk full".to_owned());
        let lines: Vec<String> = all.into_iter().map(Fail::from).chain([down.into()]).map(show).collect();
        expect![[r#"
            409 {"code":"elsewhere","name":"not the owner","cause":"worker-2 does not own this machine, which is sealed here, it went to worker-3","fix":"ask `decant machine show` which worker owns it"}
            409 {"code":"exists","name":"machine exists","cause":"this machine is here already (active): choose another name, or remove it first","fix":"choose another name, or remove the machine first"}
            409 {"code":"conflict","name":"machine is busy","cause":"migration m-0 is under way","fix":"wait until that is over, or cancel it"}
            409 {"code":"conflict","name":"migration is over","cause":"migration m-1 is over: cleaned","fix":"nothing is left to do"}
            409 {"code":"too_late","name":"too late to cancel","cause":"migration m-1 is past its commit point, worker-2 owns the machine: once it is verified, a move brings the machine back","fix":"watch it with `decant migration watch`, then bring the machine back with `decant machine move`"}
            404 {"code":"not_found","name":"migration not found","cause":"no migration m-1 of this machine is known here","fix":"list them with `decant migration list`"}
            409 {"code":"conflict","name":"not possible now","cause":"it is stopped already","fix":"look at the machine with `decant machine show`"}
            409 {"code":"conflict","name":"not awaited","cause":"nobody waits for this outcome","fix":"nothing is left to do"}
            409 {"code":"refused","name":"impossible message","cause":"worker-2 sent grant, which cannot be: nothing was prepared","fix":"look at the logs of both workers"}
            503 {"code":"unavailable","name":"agent is ending","cause":"disk full","fix":"start it again; machines run on meanwhile. If it ends again, read its log"}"#]].assert_eq(&lines.join("\n"));
    }

    #[test]
    fn failures_of_the_plane_have_name_cause_and_fix() {
        use FailureCode as F;
        let lines: Vec<String> = [F::Retry, F::NotYet, F::Refused, F::Stuck]
            .map(|code| show(Failure { code, message: "no room: 1 GiB free, 4 GiB needed".to_owned() }.into()))
            .into();
        expect![[r#"
            503 {"code":"unavailable","name":"the worker could not do it","cause":"no room: 1 GiB free, 4 GiB needed","fix":"try again"}
            503 {"code":"unavailable","name":"the worker could not do it","cause":"no room: 1 GiB free, 4 GiB needed","fix":"try again"}
            409 {"code":"refused","name":"the worker could not do it","cause":"no room: 1 GiB free, 4 GiB needed","fix":"change what the cause names, then try again"}
            500 {"code":"stuck","name":"the worker could not do it","cause":"no room: 1 GiB free, 4 GiB needed","fix":"look at the agent's log on this worker; nothing is tried again by itself"}"#]].assert_eq(&lines.join("\n"));
    }

    fn show(fail: Fail) -> String {
        format!("{} {}", fail.0.code.status(), serde_json::to_string(&fail.0).expect("a body is JSON"))
    }
}
