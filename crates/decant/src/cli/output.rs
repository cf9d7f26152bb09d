//! How results are shown: tables for people, JSON for programs.

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use decant_base::Bytes;
use serde::Serialize;

/// The form of a command's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// Columns for people; may change.
    #[default]
    Table,
    /// The API's objects; fields are added, never renamed.
    Json,
}

/// Prints a line. A reader that went away ends the program quietly, as with any filter.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Prints `value` as JSON, or what `people` makes of it.
pub(crate) fn show<T: Serialize>(output: Output, value: &T, people: impl FnOnce(&T) -> String) {
    match output {
        Output::Json => print(&serde_json::to_string_pretty(value).unwrap_or_else(|error| error.to_string())),
        Output::Table => print(people(value).trim_end()),
    }
}

/// A table with no lines, or `none` if it has no rows.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: Vec<[String; N]>, none: &str) -> String {
    if rows.is_empty() {
        return none.to_owned();
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(headings);
    if !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    trimmed(&table.to_string())
}

/// `name value` lines with the values in one column.
pub(crate) fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    let lines = rows.iter().filter(|(_, value)| !value.is_empty());
    trimmed(&lines.map(|(name, value)| format!("{name:width$}{value}\n")).collect::<String>())
}

fn trimmed(text: &str) -> String {
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A number of bytes as people read it.
pub(crate) fn bytes(count: u64) -> String {
    Bytes(count).to_string()
}

/// A moment, UTC, to the second.
pub(crate) fn moment(at_ms: u64) -> String {
    i64::try_from(at_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| "-".to_owned(), |at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string())
}

/// A duration with the unit that fits.
pub(crate) fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1e3),
        60_000..3_600_000 => format!("{} min {:02} s", ms / 60_000, ms / 1_000 % 60),
        3_600_000..172_800_000 => format!("{} h {:02} min", ms / 3_600_000, ms / 60_000 % 60),
        _ => format!("{} days", ms / 86_400_000),
    }
}

/// A word of the API, as it is spelled there.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "?".to_owned(),
    }
}

/// A value or a dash.
pub(crate) fn or_dash<T: ToString>(value: Option<&T>) -> String {
    value.map_or_else(|| "-".to_owned(), T::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_moments_read_well() {
        let shown = [0, 999, 1_000, 61_000, 3_700_000, 200_000_000].map(duration);
        assert_eq!(shown, ["0 ms", "999 ms", "1.0 s", "1 min 01 s", "1 h 01 min", "2 days"]);
        assert_eq!(moment(0), "1970-01-01 00:00:00Z");
        assert_eq!(moment(u64::MAX), "-");
    }

    #[test]
    fn tables_have_no_trailing_blanks() {
        expect_test::expect![[r"
            NAME  SIZE
            a     1 KiB
            bb    2"]]
        .assert_eq(&table(["NAME", "SIZE"], vec![["a".into(), "1 KiB".into()], ["bb".into(), "2".into()]], "none"));
        assert_eq!(table(["NAME"], vec![], "nothing here"), "nothing here");
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into()), ("no", String::new())]), "a     1\nlong  2");
    }
}
