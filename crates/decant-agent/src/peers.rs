//! The other workers: messages to them, and what is known of them.
//!
//! A message is sent at least once by whoever owns its row: an outbox tries a few times and then drops it, because the
//! row's own timer sends it again. Messages of one kind of urgency go in order over one kept connection, as many in one request
//! as have gathered meanwhile; long ones (`Prepare`) have a connection of their own, so that a grant never waits behind one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use decant_base::{Epoch, MachineId, WorkerId, crash};
use decant_drain::{Body, Event, Message};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use crate::client::{Client, ClientError, TlsTarget};
use crate::clock::Clock;
use crate::config;
use crate::core::{Core, Outgoing, Snapshot};
use crate::tls::Identity;

/// Where peers post messages.
pub(crate) const MESSAGES_PATH: &str = "/v1/peer/messages";
/// Where peers ask how this worker stands.
pub(crate) const STANDING_PATH: &str = "/v1/peer/standing";

/// How often each peer is asked how it stands.
const POLL: Duration = Duration::from_secs(1);
/// How long a peer may take to answer that.
const POLL_PATIENCE: Duration = Duration::from_secs(2);
/// How long a message may take.
const SEND_PATIENCE: Duration = Duration::from_secs(5);
/// Pauses before a message is tried again: a peer that is not there tells nobody when it is. The row sends it again in any case.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];

/// Several messages in one request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Messages {
    pub(crate) messages: Vec<Message>,
}

/// How a worker stands, for its peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Standing {
    /// As the API shows it.
    pub(crate) worker: decant_api::Worker,
    /// The machines it owns.
    pub(crate) claims: Vec<Claim>,
}

/// A machine that a worker owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) machine: MachineId,
    pub(crate) epoch: Epoch,
}

/// One other worker.
#[derive(Debug)]
pub(crate) struct Peer {
    /// As configured.
    pub(crate) config: config::Peer,
    /// For anything but messages.
    pub(crate) client: Client,
    urgent: UnboundedSender<Message>,
    long: UnboundedSender<Message>,
    last: Mutex<Last>,
}

/// What was heard last of a peer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Last {
    /// How it stands; kept while it does not answer.
    pub(crate) standing: Option<Standing>,
    /// Why it does not answer; empty if it does.
    pub(crate) failure: String,
    /// Since when, Unix milliseconds; 0 if it does.
    pub(crate) failing_since_ms: u64,
}

impl Peer {
    /// What was heard last.
    pub(crate) fn last(&self) -> Last {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// SHA-256, hex, of its certificate; connects if no connection ever told.
    pub(crate) async fn certificate(&self) -> Result<String, ClientError> {
        if let Some(certificate) = self.client.peer_certificate() {
            return Ok(certificate);
        }
        self.client.connect_once().await?;
        Ok(self.client.peer_certificate().unwrap_or_default())
    }

    fn heard(&self, result: Result<Standing, ClientError>, now_ms: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(standing) => {
                if !last.failure.is_empty() {
                    tracing::info!(worker = %self.config.worker, "answers again");
                }
                *last = Last { standing: Some(standing), ..Last::default() };
            }
            Err(error) => {
                if last.failure.is_empty() {
                    last.failing_since_ms = now_ms;
                    tracing::info!(worker = %self.config.worker, %error, "does not answer");
                }
                last.failure = error.into_body().cause;
            }
        }
    }
}

/// All other workers.
#[derive(Debug)]
pub(crate) struct Peers {
    peers: BTreeMap<WorkerId, Arc<Peer>>,
}

impl Peers {
    /// Starts the outboxes of every configured peer.
    pub(crate) fn start(peers: &[config::Peer], identity: &Identity) -> Self {
        let peers = peers.iter().map(|config| {
            let target = TlsTarget {
                address: config.address.to_string(),
                worker: config.worker.clone(),
                config: identity.client.clone(),
            };
            let outbox = || {
                let (sender, receiver) = unbounded_channel();
                tokio::spawn(deliver(Client::tls(target.clone()).with_timeout(SEND_PATIENCE), receiver));
                sender
            };
            let (urgent, long) = (outbox(), outbox());
            let client = Client::tls(target.clone());
            let peer = Peer { config: config.clone(), client, urgent, long, last: Mutex::default() };
            (config.worker.clone(), Arc::new(peer))
        });
        Self { peers: peers.collect() }
    }

    pub(crate) fn get(&self, worker: &WorkerId) -> Option<&Arc<Peer>> {
        self.peers.get(worker)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values()
    }

    /// Who but `except` claims `machine` at `epoch` or above, with the epoch and whether it answers now. Every other peer is
    /// asked; of one that does not answer the last word counts.
    pub(crate) async fn claimant(
        &self,
        machine: &MachineId,
        epoch: Epoch,
        except: &WorkerId,
    ) -> Option<(WorkerId, Epoch, bool)> {
        let others = self.peers.values().filter(|peer| peer.config.worker != *except);
        let claims = others.map(|peer| async move {
            let client = peer.client.clone().with_timeout(POLL_PATIENCE);
            let now = client.get::<Standing>(STANDING_PATH).await.ok();
            let answers = now.is_some();
            let standing = now.or_else(|| peer.last().standing)?;
            let claim = standing.claims.into_iter().find(|claim| claim.machine == *machine && claim.epoch >= epoch)?;
            Some((peer.config.worker.clone(), claim.epoch, answers))
        });
        futures_util::future::join_all(claims).await.into_iter().flatten().max_by_key(|(_, epoch, _)| *epoch)
    }

    /// Carries what the core says to the outboxes.
    pub(crate) async fn carry(self: Arc<Self>, mut outgoing: UnboundedReceiver<Outgoing>) {
        while let Some(Outgoing { to, message }) = outgoing.recv().await {
            let Some(peer) = self.peers.get(&to) else {
                tracing::error!(worker = %to, machine = %message.machine, "no such peer in this worker's configuration: a message to it is dropped");
                continue;
            };
            let outbox = if matches!(message.body, Body::Prepare { .. }) { &peer.long } else { &peer.urgent };
            let _ = outbox.send(*message);
        }
    }

    /// Asks every peer how it stands, again and again. What they claim can veto a boot here; it permits none.
    pub(crate) fn watch(&self, tasks: &mut JoinSet<()>, core: &Core, rows: &Arc<Snapshot>, clock: &Arc<Clock>) {
        for peer in self.peers.values().cloned() {
            let (core, rows, clock) = (core.clone(), rows.clone(), clock.clone());
            tasks.spawn(async move {
                let client = peer.client.clone().with_timeout(POLL_PATIENCE);
                let mut ticks = tokio::time::interval(POLL);
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    let result = client.get::<Standing>(STANDING_PATH).await;
                    if let Ok(standing) = &result {
                        veto(&core, &rows, &peer.config.worker, standing);
                    }
                    let changed = result.is_ok() == peer.last().failure.is_empty();
                    peer.heard(result, clock.now_ms());
                    if !changed {
                        rows.touch();
                    }
                }
            });
        }
    }
}

/// A claim of a machine that this worker owns, at no lower epoch: its journal may have been restored from a backup. Or one
/// of a machine whose sealed copy is here, which may be reclaimed only above it.
fn veto(core: &Core, rows: &Snapshot, peer: &WorkerId, standing: &Standing) {
    for claim in &standing.claims {
        if rows.machine(&claim.machine).is_some_and(|row| decant_drain::heeds(&row, claim.epoch)) {
            core.event(&claim.machine, Event::EpochSeen { epoch: claim.epoch, by: peer.clone() });
        }
    }
}

/// Sends what comes in, in order, as much at once as has gathered.
async fn deliver(client: Client, mut inbox: UnboundedReceiver<Message>) {
    // A connection is there before the first message needs it.
    let _ = client.warm().await;
    while let Some(first) = inbox.recv().await {
        let mut messages = vec![first];
        while let Ok(next) = inbox.try_recv() {
            if !messages.contains(&next) {
                messages.push(next);
            }
        }
        for message in &messages {
            crash::point(message.body.points().before);
        }
        post(&client, &Messages { messages: messages.clone() }).await;
        for message in &messages {
            crash::point(message.body.points().after);
        }
    }
}

async fn post(client: &Client, batch: &Messages) {
    let mut pauses = PAUSES.iter();
    loop {
        let error = match client.post::<decant_api::Empty>(MESSAGES_PATH, batch).await {
            Ok(_) => return,
            Err(error) => error,
        };
        let Some(pause) = pauses.next().filter(|_| !matches!(error, ClientError::Api(_))) else {
            tracing::info!(to = %client.target(), count = batch.messages.len(), %error, "messages not delivered; their rows send them again");
            return;
        };
        tokio::time::sleep(*pause).await;
    }
}
