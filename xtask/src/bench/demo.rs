//! The demo's figures: what a move costs, against a stateless one, and how little of the volume's size it is.

use std::process::Command;

use anyhow::Context;
use serde_json::Value;

use super::{Bench, output};

/// What of a report is shown, with its unit.
const ROWS: &[(&str, &str)] = &[
    ("writes_acknowledged", ""),
    ("writes_lost", ""),
    ("writes_duplicated", ""),
    ("interruption_ms", "ms"),
    ("stateless_interruption_ms", "ms"),
    ("stop_ms", "ms"),
    ("seal_ms", "ms"),
    ("grant_ms", "ms"),
    ("boot_ms", "ms"),
    ("hydration_ms", "ms"),
    ("evacuated_ms", "ms"),
    ("drained_ms", "ms"),
    ("brownout_ms", "ms"),
    ("volume_bytes", "bytes"),
    ("used_bytes", "bytes"),
    ("bytes_moved", "bytes"),
];

/// Moves with volumes of 1 GiB, 4 GiB and 1 TiB, and over a link of 200 Mbit/s and 5 ms.
pub(super) fn figures(bench: &Bench) -> anyhow::Result<String> {
    let moves = bench.rounds.to_string();
    let runs: [(&str, Vec<&str>); 4] = [
        ("1 GiB", vec!["--size", "1GiB", "--moves", &moves]),
        ("4 GiB", vec!["--moves", &moves]),
        ("1 TiB", vec!["--size", "1TiB", "--moves", &moves]),
        ("4 GiB, 200 Mbit/s, 5 ms", vec!["--link", "200mbit,5ms"]),
    ];
    let mut reports = Vec::new();
    for (_, options) in &runs {
        reports.push(report(bench, options)?);
    }
    let mut text =
        format!("`decant demo`, 200 MiB live, medians of {moves} moves (one move over the slow link).\n\n| |");
    for (name, _) in &runs {
        text += &format!(" {name} |");
    }
    text += &format!("\n|---|{}\n", "---|".repeat(runs.len()));
    for (field, unit) in ROWS {
        let values: Vec<String> = reports.iter().map(|report| report[*field].to_string()).collect();
        text += &format!(
            "| {field}{} | {} |\n",
            if unit.is_empty() { String::new() } else { format!(", {unit}") },
            values.join(" | ")
        );
    }
    for field in ["read_p50_us", "read_p99_us"] {
        for when in ["before", "hydrating", "after"] {
            let values: Vec<String> = reports.iter().map(|report| report[field][when].to_string()).collect();
            text += &format!("| {field} {when} | {} |\n", values.join(" | "));
        }
    }
    Ok(text)
}

fn report(bench: &Bench, options: &[&str]) -> anyhow::Result<Value> {
    let file = bench.path("report.json");
    output(Command::new(&bench.decant).arg("demo").args(options).arg("--report").arg(&file))?;
    let text = std::fs::read_to_string(&file).context("the demo left no report")?;
    Ok(serde_json::from_str(&text)?)
}
