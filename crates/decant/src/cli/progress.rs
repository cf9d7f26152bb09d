//! How progress reads: phase, bytes of live data, rate, ETA as a range, exposure.

use decant_api::{Drain, DrainPhase, Eta, Migration, Progress};
use decant_base::WorkerId;

use super::output::{bytes, duration, word};

/// `180 of 200 MiB (90 %), 120 MiB/s, done in 1.0 s to 2.0 s`.
pub(crate) fn amount(progress: &Progress) -> String {
    moved(progress.bytes_done, progress.bytes_total, progress.rate_bytes_per_s, progress.eta)
}

fn moved(done: u64, total: u64, rate: u64, eta: Option<Eta>) -> String {
    let mut text = format!("{} of {} ({} %)", bytes(done.min(total)), bytes(total), percent(done, total));
    if rate > 0 && done < total {
        text.push_str(&format!(", {}/s", bytes(rate)));
    }
    if let Some(eta) = eta.filter(|_| done < total) {
        text.push_str(&format!(", done in {}", range(eta)));
    }
    text
}

/// `1.0 s to 2.0 s`.
pub(crate) fn range(eta: Eta) -> String {
    let (low, high) = (duration(eta.low_ms.min(eta.high_ms)), duration(eta.high_ms));
    // Two ends that read alike are no range.
    if low == high { format!("about {low}") } else { format!("{low} to {high}") }
}

/// Whole per cent, never above 100, and 100 only when all is done.
fn percent(done: u64, total: u64) -> u64 {
    match total {
        0 => 100,
        _ => (u128::from(done.min(total)) * 100 / u128::from(total)) as u64,
    }
}

/// What would be lost if the source died now.
pub(crate) fn exposure(count: u64, source: &WorkerId) -> String {
    match count {
        0 => format!("none: nothing is only on {source}"),
        count => format!("{} still only on {source}", bytes(count)),
    }
}

/// One line about a migration.
pub(crate) fn migration_line(migration: &Migration) -> String {
    let mut line = format!("{}  {}", migration.machine, word(&migration.phase));
    if let Some(progress) = &migration.progress {
        line.push_str(&format!(", {}", amount(progress)));
        if progress.exposure_bytes > 0 {
            line.push_str(&format!(", {}", exposure(progress.exposure_bytes, &migration.source)));
        }
    }
    if let Some(why) = &migration.why {
        line.push_str(&format!(", {}", why.reason));
    }
    line
}

/// The words for a drain's phase. EVACUATED and DRAINED must never be confused.
pub(crate) fn drain_phase(phase: DrainPhase) -> &'static str {
    match phase {
        DrainPhase::Planned => "planned; nothing was touched",
        DrainPhase::Moving => "moving",
        DrainPhase::Evacuated => "EVACUATED: runs nothing, still serves blocks; do not power off",
        DrainPhase::Drained => "DRAINED: safe to power off",
        DrainPhase::Blocked => "BLOCKED",
        DrainPhase::Cancelling => "cancelling",
        DrainPhase::Cancelled => "cancelled",
        DrainPhase::Deadline => "stopped at its deadline",
    }
}

/// One line about a drain, without its machines.
pub(crate) fn drain_line(drain: &Drain) -> String {
    let mut line = drain_phase(drain.phase).to_owned();
    if drain.phase == DrainPhase::Planned {
        line.push_str(&format!(", at most {} to move", bytes(drain.bytes_total)));
        if let Some(eta) = drain.eta {
            let basis =
                if eta.assumed { "; no rate was measured lately, 12.5 MB/s to 1.25 GB/s is assumed" } else { "" };
            line.push_str(&format!(", in {}{basis}", range(eta)));
        }
        return line;
    }
    if drain.bytes_total > 0 {
        line.push_str(&format!(", {}", moved(drain.bytes_done, drain.bytes_total, drain.rate_bytes_per_s, drain.eta)));
    }
    if drain.exposure_bytes > 0 {
        let workers = drain.workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        line.push_str(&format!(", {} still only on {workers}", bytes(drain.exposure_bytes)));
    }
    line
}

/// One line about each machine of a drain.
pub(crate) fn drain_machine_lines(drain: &Drain) -> Vec<String> {
    let line = |machine: &decant_api::DrainMachine| {
        let mut line = machine.machine.to_string();
        if let Some(planned) = &machine.planned {
            line.push_str(&format!("  {} -> {}", planned.source, planned.destination));
        }
        let phase = machine.phase.map_or_else(|| "waiting".to_owned(), |phase| word(&phase));
        line.push_str(&format!("  {phase}"));
        if machine.bytes_total > 0 {
            line.push_str(&format!(
                ", {}",
                moved(machine.bytes_done, machine.bytes_total, machine.rate_bytes_per_s, None)
            ));
        }
        if let Some(why) = &machine.why {
            line.push_str(&format!(", {}", why.reason));
        }
        line
    };
    drain.machines.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_range_and_never_above_all() {
        let progress = Progress {
            bytes_total: 200 << 20,
            bytes_done: 50 << 20,
            rate_bytes_per_s: 120 << 20,
            exposure_bytes: 150 << 20,
            eta: Some(Eta { low_ms: 900, high_ms: 2_100, ..Eta::default() }),
            ..Progress::default()
        };
        assert_eq!(amount(&progress), "50 MiB of 200 MiB (25 %), 120 MiB/s, done in 900 ms to 2.1 s");
        let eta = Some(Eta { low_ms: 2_960, high_ms: 3_040, ..Eta::default() });
        let steady = Progress { eta, ..progress };
        assert_eq!(amount(&steady), "50 MiB of 200 MiB (25 %), 120 MiB/s, done in about 3.0 s");
        let done = Progress { bytes_done: 300 << 20, ..progress };
        assert_eq!(amount(&done), "200 MiB of 200 MiB (100 %)");
        assert_eq!(percent(199, 200), 99, "only all is 100 %");
    }
}
