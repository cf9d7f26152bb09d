//! The agent, as a command sees it: its API over the unix socket.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use decant_api::{Code, Empty, ErrorBody};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failure::Failure;
use crate::http::{Address, Answer, Connection};

/// How long a request may take: a stop waits for the machine's own stop timeout.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to one agent.
#[derive(Debug)]
pub(crate) struct Agent {
    socket: PathBuf,
    connection: Connection,
}

impl Agent {
    /// The agent behind `socket`; nothing is connected yet.
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self { connection: Connection::new(Address::Unix(socket.clone()), PATIENCE), socket }
    }

    /// Gets a thing.
    pub(crate) fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Failure> {
        self.ask("GET", path, b"")
    }

    /// Orders a thing.
    pub(crate) fn post<T: DeserializeOwned>(&mut self, path: &str, request: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(request)
            .map_err(|error| Failure::usage("request cannot be written", error, "report this as a bug of decant"))?;
        self.ask("POST", path, &body)
    }

    /// Removes a thing.
    pub(crate) fn delete(&mut self, path: &str) -> Result<Empty, Failure> {
        self.ask("DELETE", path, b"")
    }

    fn ask<T: DeserializeOwned>(&mut self, method: &str, path: &str, body: &[u8]) -> Result<T, Failure> {
        let answer = self.connection.request(method, path, "", body).map_err(|error| self.unreachable(&error))?;
        read(&answer)
    }

    fn unreachable(&self, error: &io::Error) -> Failure {
        let socket = self.socket.display();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::local(
                "agent not running",
                format_args!("nothing answers at {socket} ({error})"),
                "start it with `decant agent --config worker.toml`, or name its socket with --socket or DECANT_SOCKET",
            ),
            io::ErrorKind::PermissionDenied => {
                Failure::local("no access to the agent", format_args!("{socket}: {error}"), "run as root")
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::from(ErrorBody::new(
                Code::Timeout,
                "agent does not answer",
                format!("no answer from {socket} in {} s", PATIENCE.as_secs()),
                "look at the agent's log; `decant why` says what it waits for",
            )),
            _ => Failure::local(
                "connection to the agent broke",
                format_args!("{socket}: {error}"),
                "try again; requests are idempotent. The agent's log says why if it stopped",
            ),
        }
    }
}

fn read<T: DeserializeOwned>(answer: &Answer) -> Result<T, Failure> {
    if (200..300).contains(&answer.status) {
        return serde_json::from_slice(&answer.body).map_err(|error| {
            let cause = format!("{error}, in {} bytes", answer.body.len());
            Failure::local("answer not understood", cause, "run a decant of the agent's own version")
        });
    }
    Err(match serde_json::from_slice::<ErrorBody>(&answer.body) {
        Ok(body) => Failure::from(body),
        Err(_) => Failure::local(
            "answer not understood",
            format_args!("status {} without a reason", answer.status),
            "check that --socket names a decant agent",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::failure::Exit;

    #[test]
    fn an_agents_refusal_keeps_its_words() {
        let body = br#"{"code":"blocked","name":"plan has blockers","cause":"no room on worker-2","fix":"add room"}"#;
        let failure = read::<Empty>(&Answer { status: 409, body: body.to_vec() }).expect_err("409 is a failure");
        assert_eq!((failure.exit, failure.body.name.as_str()), (Exit::Blocked, "plan has blockers"));
        let failure = read::<Empty>(&Answer { status: 502, body: b"<html>".to_vec() }).expect_err("502 is a failure");
        assert_eq!(failure.exit, Exit::Error);
    }

    #[test]
    fn a_missing_agent_says_how_to_start_it() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let failure = Agent::at(directory.path().join("agent.sock")).get::<Empty>("/v1/workers").expect_err("no agent");
        assert_eq!(failure.body.name, "agent not running");
        assert!(failure.body.fix.contains("decant agent"), "{}", failure.body.fix);
    }
}
