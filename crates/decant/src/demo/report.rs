//! What the demo reports: JSON for programs, a page for people.

use serde::Serialize;

use super::figures::{Phases, median};
use crate::cli::output::bytes;

/// The report of one run. Field names are part of the interface.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Report {
    /// Writes that the client was told are stored.
    pub(crate) writes_acknowledged: u64,
    /// Of these, not in the destination's database as acknowledged.
    pub(crate) writes_lost: u64,
    /// Rows beyond the first of one order.
    pub(crate) writes_duplicated: u64,
    /// Longest gap between acknowledged writes.
    pub(crate) interruption_ms: f64,
    /// The same for the machine without a volume.
    pub(crate) stateless_interruption_ms: f64,
    /// Size of the volume.
    pub(crate) volume_bytes: u64,
    /// What its file system needed before the stop, by an oracle outside the product.
    pub(crate) used_bytes: u64,
    /// What the source sent for the move, by its interface's counter, every header included, the client's traffic not.
    pub(crate) bytes_moved: u64,
    /// What the source received for the move, counted likewise: requests and acknowledgements.
    pub(crate) bytes_requested: u64,
    /// Allocated at the source before the move and not moved, because it was deleted.
    pub(crate) discarded_bytes: u64,
    /// LUKS2 header at the source.
    pub(crate) source_header_bytes: u64,
    /// LUKS2 header at the destination.
    pub(crate) destination_header_bytes: u64,
    /// From the stop signal until nothing of the machine was left and its file system was unmounted.
    pub(crate) stop_ms: f64,
    /// From there until the seal was durable.
    pub(crate) seal_ms: f64,
    /// From there until the destination had accepted.
    pub(crate) grant_ms: f64,
    /// From the acceptance until the machine served.
    pub(crate) boot_ms: f64,
    /// From the acceptance until every block was at the destination.
    pub(crate) hydration_ms: f64,
    /// From the order to drain until nothing ran on the worker.
    pub(crate) evacuated_ms: f64,
    /// From the order to drain until nothing read from the worker.
    pub(crate) drained_ms: f64,
    /// From the end of the interruption until reads were as fast as before; absent if they were not again.
    pub(crate) brownout_ms: Option<f64>,
    /// Median read.
    pub(crate) read_p50_us: Phases,
    /// Slow read.
    pub(crate) read_p99_us: Phases,
    /// Moves of each machine that the figures are medians of.
    pub(crate) moves: u32,
    /// Interruption of each move.
    pub(crate) interruptions_ms: Vec<f64>,
    /// Interruption of each move of the machine without a volume.
    pub(crate) stateless_interruptions_ms: Vec<f64>,
    /// Reads that returned something else than was written. Must be 0.
    pub(crate) wrong_reads: u64,
}

/// What one move of the stateful machine measured.
#[derive(Debug, Clone, Default)]
pub(crate) struct Move {
    pub(crate) interruption_ms: f64,
    pub(crate) used_bytes: u64,
    pub(crate) bytes_moved: u64,
    pub(crate) bytes_requested: u64,
    pub(crate) discarded_bytes: u64,
    pub(crate) stop_ms: f64,
    pub(crate) seal_ms: f64,
    pub(crate) grant_ms: f64,
    pub(crate) boot_ms: f64,
    pub(crate) hydration_ms: f64,
    pub(crate) evacuated_ms: f64,
    pub(crate) drained_ms: f64,
    pub(crate) brownout_ms: Option<f64>,
    pub(crate) read_p50_us: Phases,
    pub(crate) read_p99_us: Phases,
}

impl Report {
    /// Takes the medians of `moves`.
    pub(crate) fn set_moves(&mut self, moves: &[Move], stateless_ms: &[f64]) {
        let of = |figure: fn(&Move) -> f64| median(moves.iter().map(figure).collect());
        let bytes_of = |figure: fn(&Move) -> u64| median(moves.iter().map(|one| figure(one) as f64).collect()) as u64;
        let phases = |figure: fn(&Move) -> Phases| {
            let part =
                |part: fn(Phases) -> u64| median(moves.iter().map(|one| part(figure(one)) as f64).collect()) as u64;
            Phases { before: part(|p| p.before), hydrating: part(|p| p.hydrating), after: part(|p| p.after) }
        };
        self.moves = moves.len() as u32;
        self.interruptions_ms = moves.iter().map(|one| round(one.interruption_ms)).collect();
        self.stateless_interruptions_ms = stateless_ms.iter().copied().map(round).collect();
        self.interruption_ms = round(of(|one| one.interruption_ms));
        self.stateless_interruption_ms = round(median(stateless_ms.to_vec()));
        self.used_bytes = bytes_of(|one| one.used_bytes);
        self.bytes_moved = bytes_of(|one| one.bytes_moved);
        self.bytes_requested = bytes_of(|one| one.bytes_requested);
        // Only the first move has the deleted data in its way.
        self.discarded_bytes = moves.first().map_or(0, |one| one.discarded_bytes);
        self.stop_ms = round(of(|one| one.stop_ms));
        self.seal_ms = round(of(|one| one.seal_ms));
        self.grant_ms = round(of(|one| one.grant_ms));
        self.boot_ms = round(of(|one| one.boot_ms));
        self.hydration_ms = round(of(|one| one.hydration_ms));
        self.evacuated_ms = round(of(|one| one.evacuated_ms));
        self.drained_ms = round(of(|one| one.drained_ms));
        // One whose end was not seen is longer than those whose was.
        let brownouts = moves.iter().map(|one| one.brownout_ms.unwrap_or(f64::INFINITY)).collect();
        self.brownout_ms = Some(median(brownouts)).filter(|ms| ms.is_finite()).map(round);
        self.read_p50_us = phases(|one| one.read_p50_us);
        self.read_p99_us = phases(|one| one.read_p99_us);
    }

    /// Whether every promise about the data was kept.
    pub(crate) fn is_clean(&self) -> bool {
        self.writes_lost == 0 && self.writes_duplicated == 0 && self.wrong_reads == 0 && self.writes_acknowledged > 0
    }

    /// A page for people.
    pub(crate) fn text(&self) -> String {
        let verdict = if self.is_clean() { "nothing was lost, nothing twice" } else { "DATA WAS LOST OR WRONG" };
        let brownout = match self.brownout_ms {
            Some(ms) => format!("{ms:.0} ms until reads were as fast as before"),
            None => "reads were not as fast as before again while the demo looked".to_owned(),
        };
        let medians = match self.moves {
            0 | 1 => String::new(),
            moves => format!(" (medians of {moves} moves)"),
        };
        let phase = |phases: Phases| {
            format!("{:>8} {:>10} {:>8}", micros(phases.before), micros(phases.hydrating), micros(phases.after))
        };
        let share = if self.used_bytes == 0 { 0.0 } else { self.bytes_moved as f64 / self.used_bytes as f64 };
        format!(
            "Result{medians}: {verdict}\n\
             \x20 writes        {} acknowledged, {} lost, {} duplicated; {} reads were wrong\n\
             \x20 interruption  {:.0} ms between two acknowledged writes (the same machine without a volume: {:.0} ms)\n\
             \x20   of that     stop {:.0} ms, seal {:.0} ms, grant {:.0} ms, boot {:.0} ms\n\
             \x20 volume        {}, {} in use; {} crossed the wire ({share:.2} x), {} deleted data stayed behind\n\
             \x20 LUKS2 header  {} at the source, {} at the destination\n\
             \x20 drain         evacuated after {:.0} ms, drained after {:.0} ms, hydration {:.0} ms\n\
             \x20 brownout      {brownout}\n\
             \x20 reads           before  hydrating    after\n\
             \x20   median    {}\n\
             \x20   p99       {}",
            self.writes_acknowledged,
            self.writes_lost,
            self.writes_duplicated,
            self.wrong_reads,
            self.interruption_ms,
            self.stateless_interruption_ms,
            self.stop_ms,
            self.seal_ms,
            self.grant_ms,
            self.boot_ms,
            bytes(self.volume_bytes),
            bytes(self.used_bytes),
            bytes(self.bytes_moved),
            bytes(self.discarded_bytes),
            bytes(self.source_header_bytes),
            bytes(self.destination_header_bytes),
            self.evacuated_ms,
            self.drained_ms,
            self.hydration_ms,
            phase(self.read_p50_us),
            phase(self.read_p99_us),
        )
    }
}

/// To a hundredth of a millisecond: finer is noise.
pub(crate) fn round(ms: f64) -> f64 {
    (ms * 100.0).round() / 100.0
}

fn micros(us: u64) -> String {
    if us < 10_000 { format!("{us} us") } else { format!("{:.1} ms", us as f64 / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let phases = Phases { before: 210, hydrating: 480, after: 205 };
        let one = Move {
            interruption_ms: 131.237,
            used_bytes: 209 << 20,
            bytes_moved: 210 << 20,
            discarded_bytes: 300 << 20,
            hydration_ms: 900.0,
            brownout_ms: Some(850.0),
            read_p50_us: phases,
            read_p99_us: phases,
            ..Move::default()
        };
        let other = Move { interruption_ms: 101.0, brownout_ms: Some(50.0), discarded_bytes: 0, ..one.clone() };
        let mut report = Report { writes_acknowledged: 4_000, volume_bytes: 4 << 30, ..Report::default() };
        report.set_moves(&[one.clone(), other, one], &[60.0, 70.0, 80.0]);
        report
    }

    #[test]
    fn the_json_has_every_promised_field() {
        let json = serde_json::to_value(sample()).expect("a report is JSON");
        for field in [
            "writes_acknowledged",
            "writes_lost",
            "writes_duplicated",
            "interruption_ms",
            "stateless_interruption_ms",
            "volume_bytes",
            "used_bytes",
            "bytes_moved",
            "discarded_bytes",
            "source_header_bytes",
            "destination_header_bytes",
            "stop_ms",
            "seal_ms",
            "grant_ms",
            "boot_ms",
            "hydration_ms",
            "evacuated_ms",
            "drained_ms",
            "brownout_ms",
        ] {
            assert!(json[field].is_number(), "{field}: {}", json[field]);
        }
        for field in ["read_p50_us", "read_p99_us"] {
            for phase in ["before", "hydrating", "after"] {
                assert!(json[field][phase].is_number(), "{field}.{phase}");
            }
        }
        assert_eq!(json["interruption_ms"], 131.24, "the median, rounded");
        assert_eq!(json["discarded_bytes"], 300 << 20, "of the first move");
    }

    #[test]
    fn people_read_the_verdict_first() {
        let mut report = sample();
        assert!(
            report.text().starts_with("Result (medians of 3 moves): nothing was lost, nothing twice"),
            "{}",
            report.text()
        );
        report.writes_lost = 1;
        assert!(report.text().contains("DATA WAS LOST OR WRONG"), "{}", report.text());
        assert!(!report.is_clean());
    }
}
