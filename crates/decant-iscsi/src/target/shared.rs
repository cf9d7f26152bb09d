//! What the connections of one target share: the disk's state, the sessions, and what one session does to another.

use std::collections::{BTreeMap, VecDeque};

use super::{Config, ConnectionId};
use crate::scsi::{Disk, ModeState, asc};

/// Unit attentions that are kept for a session; of more, the oldest is forgotten (SAM-5 5.14 allows that).
const MAX_ATTENTIONS: usize = 8;
/// Sessions that ended, remembered so that their initiator is not told of a power-on again.
const MAX_KNOWN: usize = 64;

/// Why a session has to end, for whoever reads the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    /// The same initiator port logged in anew (7.3.5).
    Reinstated,
    /// TARGET COLD RESET.
    ColdReset,
    /// [`Target::shut_down`].
    ShutDown,
}

/// One session with its one connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) initiator: String,
    pub(super) isid: [u8; 6],
    pub(super) tsih: u16,
    attentions: VecDeque<u16>,
    pub(super) farewell: Option<Farewell>,
    /// Requests at the backend from after, and from before the last reset.
    running: u32,
    running_before_reset: u32,
    /// The connection is gone; the session goes when nothing runs any more.
    gone: bool,
}

/// A target with its one disk. All connections to it need it for most of what they do; a driver with several threads keeps it
/// in a mutex, which it takes after the connection's.
#[derive(Debug)]
pub struct Target {
    pub(super) config: Config,
    disk: Disk,
    mode: ModeState,
    sessions: BTreeMap<ConnectionId, Session>,
    known: VecDeque<(String, [u8; 6])>,
    next_connection: u64,
    next_tsih: u16,
    reservation: Option<ConnectionId>,
    resets: u64,
    waiting: Vec<ConnectionId>,
    wakeups: VecDeque<ConnectionId>,
    shutting_down: bool,
}

impl Target {
    /// A target that nobody has logged in to.
    pub fn new(config: Config, disk: Disk) -> Self {
        Self {
            config,
            disk,
            mode: ModeState::default(),
            sessions: BTreeMap::new(),
            known: VecDeque::new(),
            next_connection: 0,
            next_tsih: 1,
            reservation: None,
            resets: 0,
            waiting: Vec::new(),
            wakeups: VecDeque::new(),
            shutting_down: false,
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Initiators that are logged in to use the disk.
    pub fn initiators(&self) -> impl Iterator<Item = &str> {
        self.sessions.values().filter(|session| !session.gone).map(|session| session.initiator.as_str())
    }

    /// The disk has this many blocks from now on. Initiators hear of it as a unit attention.
    pub fn resize(&mut self, blocks: u64) {
        self.disk.blocks = blocks;
        self.attend_all(asc::CAPACITY_CHANGED, None);
    }

    /// Whether the disk may be written from now on.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.disk.read_only = read_only;
        self.attend_all(asc::MODE_CHANGED, None);
    }

    /// Ends all sessions; nobody can log in any more.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
        self.end_all(Farewell::ShutDown, None);
    }

    /// A connection on which [`super::Connection::handle_wakeup`] has to be called, since another one did something to it.
    /// The driver asks until there is none, after each call that was given this target.
    pub fn poll_wakeup(&mut self) -> Option<ConnectionId> {
        self.wakeups.pop_front()
    }

    pub(super) fn is_shutting_down(&self) -> bool {
        self.shutting_down
    }

    pub(super) fn next_connection(&mut self) -> ConnectionId {
        self.next_connection = self.next_connection.wrapping_add(1);
        ConnectionId(self.next_connection)
    }

    pub(super) fn mode(&self) -> &ModeState {
        &self.mode
    }

    /// Mode parameters were changed by `by`; everybody else hears of it.
    pub(super) fn set_mode(&mut self, mode: ModeState, by: ConnectionId) {
        if self.mode != mode {
            self.mode = mode;
            self.attend_all(asc::MODE_CHANGED, Some(by));
        }
    }

    pub(super) fn session(&self, id: ConnectionId) -> Option<&Session> {
        self.sessions.get(&id)
    }

    /// The session that a login with this name and ISID would reinstate.
    pub(super) fn session_of(&self, initiator: &str, isid: [u8; 6]) -> Option<ConnectionId> {
        let same = |session: &Session| session.initiator == initiator && session.isid == isid;
        self.sessions.iter().find(|(_, session)| same(session)).map(|(id, _)| *id)
    }

    pub(super) fn has_tsih(&self, tsih: u16) -> bool {
        self.sessions.values().any(|session| session.tsih == tsih)
    }

    pub(super) fn is_full(&self) -> bool {
        self.sessions.len() >= self.config.limits.sessions
    }

    /// A session begins. The first of an initiator port is told that the disk was powered on.
    pub(super) fn register(&mut self, id: ConnectionId, initiator: &str, isid: [u8; 6]) -> u16 {
        let tsih = self.free_tsih();
        let name = (initiator.to_owned(), isid);
        let mut attentions = VecDeque::new();
        if !self.known.contains(&name) {
            attentions.push_back(asc::POWER_ON);
            if self.known.len() >= MAX_KNOWN {
                self.known.pop_front();
            }
            self.known.push_back(name);
        }
        let session = Session {
            initiator: initiator.to_owned(),
            isid,
            tsih,
            attentions,
            farewell: None,
            running: 0,
            running_before_reset: 0,
            gone: false,
        };
        self.sessions.insert(id, session);
        tsih
    }

    fn free_tsih(&mut self) -> u16 {
        // There are far fewer sessions than numbers, so this ends.
        loop {
            let tsih = self.next_tsih;
            self.next_tsih = tsih.checked_add(1).unwrap_or(1);
            if !self.has_tsih(tsih) {
                return tsih;
            }
        }
    }

    /// A connection has ended.
    pub(super) fn unregister(&mut self, id: ConnectionId) {
        if self.reservation == Some(id) {
            self.reservation = None;
        }
        self.waiting.retain(|other| *other != id);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.gone = true;
        }
        self.remove_if_drained(id);
    }

    fn remove_if_drained(&mut self, id: ConnectionId) {
        let drained = |session: &Session| session.gone && session.running == 0 && session.running_before_reset == 0;
        if self.sessions.get(&id).is_some_and(drained) {
            self.sessions.remove(&id);
            self.wake_waiting();
        }
    }

    /// Wakes those that wait for requests of others to end.
    fn wake_waiting(&mut self) {
        self.wakeups.extend(self.waiting.drain(..));
    }

    /// `id` is woken when a session has gone, or the last request from before a reset has ended.
    pub(super) fn wait(&mut self, id: ConnectionId) {
        if !self.waiting.contains(&id) {
            self.waiting.push(id);
        }
    }

    /// Tells a session to end.
    pub(super) fn end(&mut self, id: ConnectionId, farewell: Farewell) {
        if let Some(session) = self.sessions.get_mut(&id)
            && session.farewell.is_none()
        {
            session.farewell = Some(farewell);
            self.wakeups.push_back(id);
        }
    }

    pub(super) fn end_all(&mut self, farewell: Farewell, but: Option<ConnectionId>) {
        let all: Vec<ConnectionId> = self.sessions.keys().copied().filter(|id| Some(*id) != but).collect();
        for id in all {
            self.end(id, farewell);
        }
    }

    /// A unit attention for all sessions but one.
    pub(super) fn attend_all(&mut self, asc: u16, but: Option<ConnectionId>) {
        for (id, session) in &mut self.sessions {
            if Some(*id) == but || session.attentions.contains(&asc) {
                continue;
            }
            if session.attentions.len() >= MAX_ATTENTIONS {
                session.attentions.pop_front();
            }
            session.attentions.push_back(asc);
        }
    }

    /// Takes the oldest unit attention of a session.
    pub(super) fn take_attention(&mut self, id: ConnectionId) -> Option<u16> {
        self.sessions.get_mut(&id).and_then(|session| session.attentions.pop_front())
    }

    /// Whether another session has reserved the disk.
    pub(super) fn is_reserved_by_other(&self, id: ConnectionId) -> bool {
        self.reservation.is_some_and(|holder| holder != id)
    }

    pub(super) fn reserve(&mut self, id: ConnectionId) {
        self.reservation = Some(id);
    }

    /// Releases a reservation of `id`'s; another's stays, which is no error (SPC-2 7.22).
    pub(super) fn release(&mut self, id: ConnectionId) {
        if self.reservation == Some(id) {
            self.reservation = None;
        }
    }

    /// How often the disk was reset: tasks from before the last time are gone.
    pub(super) fn resets(&self) -> u64 {
        self.resets
    }

    /// LOGICAL UNIT RESET and the target resets, by `by`: every task of every session is gone, the mode parameters and the
    /// reservation too, and the others hear of it.
    pub(super) fn reset(&mut self, by: ConnectionId) {
        self.resets = self.resets.wrapping_add(1);
        self.mode = ModeState::default();
        self.reservation = None;
        self.known.retain(|(name, isid)| {
            self.sessions.values().any(|session| session.initiator == *name && session.isid == *isid)
        });
        for session in self.sessions.values_mut() {
            session.running_before_reset = session.running_before_reset.saturating_add(session.running);
            session.running = 0;
        }
        self.attend_all(asc::RESET, Some(by));
        self.wakeups.extend(self.sessions.keys().copied().filter(|id| *id != by));
    }

    /// Whether nothing from before the last reset runs any more.
    pub(super) fn is_reset_done(&self) -> bool {
        self.sessions.values().all(|session| session.running_before_reset == 0)
    }

    /// A request goes to the backend.
    pub(super) fn begin(&mut self, id: ConnectionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.running = session.running.saturating_add(1);
        }
    }

    /// A request that was begun when the disk had been reset `resets` times has ended.
    pub(super) fn finish(&mut self, id: ConnectionId, resets: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if resets == self.resets {
            session.running = session.running.saturating_sub(1);
        } else {
            session.running_before_reset = session.running_before_reset.saturating_sub(1);
            if self.is_reset_done() {
                self.wake_waiting();
            }
        }
        self.remove_if_drained(id);
    }
}
