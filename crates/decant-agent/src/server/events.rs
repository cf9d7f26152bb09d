//! `/v1/events`: the event log, from where the reader left off, then live.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{KeepAlive, Sse};
use decant_api::Event;
use decant_fsm::LogEntry;
use futures_util::Stream;
use serde::Deserialize;

use crate::agent::Agent;
use crate::core::Detail;
use crate::server::Shared;
use crate::server::extract::Args;

/// Lines read at a time.
const BATCH: usize = 256;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventArgs {
    /// The last sequence that the reader has; `latest` events only if absent.
    after: Option<u64>,
}

pub(super) async fn follow(
    agent: Shared,
    Args(args): Args<EventArgs>,
) -> Sse<impl Stream<Item = Result<axum::response::sse::Event, Infallible>>> {
    let after = args.after.unwrap_or_else(|| agent.journal.last_seq());
    let changes = agent.rows.changes();
    let reader = Reader { agent: agent.0.clone(), changes, after, ready: VecDeque::new() };
    let stream = futures_util::stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        let data = serde_json::to_string(&event).ok()?;
        let message = axum::response::sse::Event::default().id(event.sequence.to_string()).data(data);
        Some((Ok(message), reader))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(10)))
}

struct Reader {
    agent: Arc<Agent>,
    changes: tokio::sync::watch::Receiver<u64>,
    after: u64,
    ready: VecDeque<Event>,
}

impl Reader {
    /// The next event; `None` when the journal does not read any more.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            self.changes.borrow_and_update();
            let (agent, after) = (self.agent.clone(), self.after);
            let lines = tokio::task::spawn_blocking(move || agent.journal.log(after, BATCH)).await.ok()?.ok()?;
            if lines.is_empty() {
                self.changes.changed().await.ok()?;
                continue;
            }
            self.after = lines.last().map_or(self.after, |line| line.seq);
            self.ready.extend(lines.into_iter().map(|line| self.agent.event(line)));
        }
    }
}

impl Agent {
    /// A line of the log as the API shows it.
    fn event(&self, line: LogEntry) -> Event {
        let detail: Detail = serde_json::from_value(line.detail).unwrap_or_default();
        let plain = || format!("{} {} -> {}", line.subject, line.from, line.to);
        let message = if detail.message.is_empty() { plain() } else { detail.message };
        Event {
            sequence: line.seq,
            at_ms: line.time_ms,
            worker: self.config.worker.clone(),
            kind: detail.kind,
            machine: detail.machine,
            volume: detail.volume,
            migration: detail.migration,
            drain: detail.drain,
            message,
        }
    }
}
