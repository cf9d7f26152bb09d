//! Moves, and what takes them back.

use super::{DESTINATION, Run, SOURCE, Way};
use crate::fleet::MACHINE;

impl Run<'_> {
    /// One move.
    pub(super) fn moves(&mut self) {
        let early = self.restart_watched(&[SOURCE, DESTINATION]);
        let order = (!early).then(|| self.spawn_move());
        self.strike();
        if let Some(order) = order {
            let _ = order.join();
        }
    }

    /// One move to a destination that cannot unlock the volume.
    pub(super) fn unready(&mut self) {
        self.worker(DESTINATION).lose_key(MACHINE);
        self.moves();
        let when = format!("after {}", self.when);
        self.fleet.settle(&when);
        self.worker(DESTINATION).find_key();
    }

    fn spawn_move(&mut self) -> std::thread::JoinHandle<()> {
        let to = self.name(DESTINATION);
        self.spawn(SOURCE, &["machine", "move", MACHINE, "--to", &to, "--detach"])
    }

    /// Orders a move, which is durable then; its id.
    fn order_move(&mut self) -> String {
        let to = self.name(DESTINATION);
        let order = ["machine", "move", MACHINE, "--to", &to, "--reason", "to be taken back", "--detach"];
        let ordered = self.worker(SOURCE).decant(&order).expect("a move is accepted");
        ordered["migration"].as_str().expect("its id").to_owned()
    }

    /// The destination stands still where it was told to.
    fn await_destination(&mut self) {
        let still = self.worker(DESTINATION).await_standstill();
        assert!(still, "{}: the destination was not asked: {}", self.when, self.fleet.describe());
    }

    /// One move that is cancelled.
    pub(super) fn take_back(&mut self) {
        // Where the destination dies before the cancel is ordered.
        let last_word = if self.way == Way::Abandon { "send:prepare-ok:before" } else { "send:prepare-ok:after" };
        if self.environment(SOURCE).is_some() {
            self.worker(SOURCE).end_agent();
            self.start(SOURCE);
        }
        self.restart_to_stop_at(DESTINATION, last_word);
        let migration = self.order_move();
        self.await_destination();
        self.worker(DESTINATION).kill_agent();
        if self.way == Way::Refuse {
            self.worker(SOURCE).await_phase(&migration, "sealed");
        }
        self.mark_first(SOURCE);
        // The agent that takes the order may stand still before it answers. If it does not, the order is durable before the
        // destination hears anything again, and no grant is on its way any more.
        let cancel = self.spawn(SOURCE, &["migration", "cancel", &migration]);
        self.await_unless_still(SOURCE, |_| cancel.is_finished());
        if self.way == Way::Refuse {
            // A peer's messages go one batch after the other: the first that fails from now on may hold a grant, the next
            // does not.
            let before = self.worker(SOURCE).undelivered();
            self.await_unless_still(SOURCE, |run| run.worker(SOURCE).undelivered() >= before + 2);
        }
        self.mark(DESTINATION);
        self.start(DESTINATION);
        self.strike();
        let _ = cancel.join();
    }

    /// A stopped machine is reclaimed; then its destination comes back.
    pub(super) fn overruled(&mut self) {
        if self.environment(SOURCE).is_some() {
            self.worker(SOURCE).end_agent();
            self.start(SOURCE);
        }
        // Down: were it up at both ends, two would run it, as whoever reclaims is told.
        self.worker(SOURCE).decant(&["machine", "stop", MACHINE]).expect("a stop is accepted");
        self.worker(SOURCE).await_state(MACHINE, "stopped");
        self.restart_to_stop_at(DESTINATION, "send:verified:before");
        let migration = self.order_move();
        self.await_destination();
        self.worker(DESTINATION).kill_agent();
        self.worker(SOURCE).decant(&["machine", "reclaim", MACHINE, "--force"]).expect("it is reclaimed");
        self.worker(SOURCE).await_over(&migration);

        self.mark_first(SOURCE);
        self.mark(DESTINATION);
        self.start(DESTINATION);
        self.strike();
        self.await_traced(DESTINATION, "recv:grant-stale");
        // Its copy is of no use, and nobody says so but the operator; refused until it has heard of the higher epoch.
        let remove = ["machine", "rm", MACHINE, "--with-volume"];
        self.await_unless_still(SOURCE, |run| run.worker(DESTINATION).decant(&remove).is_ok());
        self.worker(DESTINATION).await_gone(MACHINE);
        self.worker(SOURCE).decant(&["machine", "start", MACHINE]).expect("a start is accepted");
    }

    /// A machine is stopped and started again.
    pub(super) fn stop(&mut self) {
        let early = self.restart_watched(&[SOURCE]);
        self.mark_first(SOURCE);
        let stop = (!early).then(|| self.spawn(SOURCE, &["machine", "stop", MACHINE]));
        self.strike();
        if let Some(stop) = stop {
            let _ = stop.join();
        }
        self.await_traced(SOURCE, "journal:machine:detaching:after");
        self.mark_end();
        // Lost with an agent before it was durable, or carried out: up it is then.
        self.worker(SOURCE).decant(&["machine", "start", MACHINE]).expect("a start is accepted");
    }
}
