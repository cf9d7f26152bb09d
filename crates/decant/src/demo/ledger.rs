//! The client's log of acknowledged writes, and what a database must hold to agree with it.
//!
//! The ledger is written by the client alone; the database is read with SQLite from outside the service. What they
//! must agree on: every acknowledged order is there, as acknowledged, once. An order that was sent and never
//! acknowledged may be there or not.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};

/// One acknowledged write. One line of `acknowledged.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Acknowledged {
    /// The idempotency key it was sent with.
    pub(crate) key: String,
    /// The client's own number for the order, in the order's body.
    pub(crate) reference: String,
    /// As ordered.
    pub(crate) quantity: i64,
    /// The row the service said it is.
    pub(crate) id: i64,
    /// When it was first sent, nanoseconds of CLOCK_MONOTONIC.
    pub(crate) sent_ns: u64,
    /// When the acknowledgement came, nanoseconds of CLOCK_MONOTONIC.
    pub(crate) acknowledged_ns: u64,
    /// How often it was sent.
    pub(crate) tries: u32,
}

/// What the comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Verdict {
    /// Acknowledged writes that were looked for.
    pub(crate) acknowledged: u64,
    /// Acknowledged but not there, or there with other contents.
    pub(crate) lost: u64,
    /// Rows beyond the first of one order.
    pub(crate) duplicated: u64,
    /// Rows of this client that it never sent.
    pub(crate) invented: u64,
    /// The first few faults, for people.
    pub(crate) examples: Vec<String>,
}

impl Verdict {
    #[cfg(test)]
    /// Whether ledger and database agree.
    pub(crate) fn is_clean(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.invented == 0
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.examples.len() < 5 {
            self.examples.push(text());
        }
    }
}

/// A row as the comparison needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) key: String,
    pub(crate) reference: String,
    pub(crate) quantity: i64,
}

/// Compares what was acknowledged with what is there. `sent` is how many references the client ever used:
/// `{prefix}{n}` with n below it.
pub(crate) fn compare(acknowledged: &[Acknowledged], rows: &[Row], prefix: &str, sent: u64) -> Verdict {
    let mut verdict = Verdict { acknowledged: acknowledged.len() as u64, ..Verdict::default() };
    let mut by_reference: HashMap<&str, Vec<&Row>> = HashMap::with_capacity(rows.len());
    for row in rows {
        by_reference.entry(&row.reference).or_default().push(row);
        let number = row.reference.strip_prefix(prefix).and_then(|number| number.parse::<u64>().ok());
        if number.is_none_or(|number| number >= sent) {
            verdict.invented += 1;
            verdict.note(|| format!("row {} holds order {:?}, which nobody sent", row.id, row.reference));
        }
    }
    for write in acknowledged {
        let found = by_reference.get(write.reference.as_str()).map_or(&[][..], Vec::as_slice);
        let same = |row: &&&Row| row.id == write.id && row.key == write.key && row.quantity == write.quantity;
        if !found.iter().any(|row| same(&row)) {
            verdict.lost += 1;
            verdict.note(|| match found.first() {
                None => format!("order {:?} was acknowledged as row {} and is not there", write.reference, write.id),
                Some(row) => format!(
                    "order {:?} was acknowledged as row {} and is another in row {}",
                    write.reference, write.id, row.id
                ),
            });
        }
    }
    for (reference, found) in &by_reference {
        if found.len() > 1 {
            verdict.duplicated += found.len() as u64 - 1;
            verdict.note(|| format!("order {reference:?} is there {} times", found.len()));
        }
    }
    verdict
}

/// Reads the client's rows from a database file, after SQLite's own check of the whole file.
pub(crate) fn read_rows(database: &Path, prefix: &str) -> anyhow::Result<Vec<Row>> {
    use anyhow::Context;
    let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE)
        .with_context(|| format!("opening {}", database.display()))?;
    let check: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .context("running SQLite's integrity check")?;
    anyhow::ensure!(check == "ok", "SQLite's integrity check of {} says: {check}", database.display());
    let mut statement =
        connection.prepare("SELECT id, key, reference, quantity FROM orders WHERE reference GLOB ?1 || '*'")?;
    let rows = statement.query_map([prefix], |row| {
        Ok(Row { id: row.get(0)?, key: row.get(1)?, reference: row.get(2)?, quantity: row.get(3)? })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Copies the live database of a machine with SQLite's online backup, as a second process beside the service. `from` is
/// `/proc/<pid>/root/…`; SQLite resolves that link itself and would end on the host, so it works inside the machine's mounts.
pub(crate) fn copy_database(from: &Path, to: &Path) -> anyhow::Result<()> {
    use anyhow::Context;
    let mut copy = Connection::open(to).with_context(|| format!("making {}", to.display()))?;
    // Its path means nothing inside: no journal is to be opened there.
    copy.pragma_update(None, "journal_mode", "OFF")?;
    let names: Vec<_> = from.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    let (pid, path) = match &names[..] {
        [_, proc, pid, root, path @ ..] if proc == "proc" && root == "root" => {
            (pid.parse().context("reading the process id")?, format!("/{}", path.join("/")))
        }
        _ => (std::process::id(), from.display().to_string()),
    };
    let copied = decant_machine::inside(pid, || {
        let mut backup = || -> rusqlite::Result<()> {
            let source = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
            source.busy_timeout(std::time::Duration::from_secs(10))?;
            let backup = rusqlite::backup::Backup::new(&source, &mut copy)?;
            // In one step: a write of the service between two of them would begin the copy anew, and it writes all the time.
            backup.run_to_completion(i32::MAX, std::time::Duration::ZERO, None)
        };
        backup().map_err(std::io::Error::other)
    });
    copied.with_context(|| format!("copying the database {}", from.display()))
}

/// Writes the ledger, one JSON object per line.
pub(crate) fn save(path: &Path, acknowledged: &[Acknowledged]) -> io::Result<()> {
    let mut file = io::BufWriter::new(std::fs::File::create(path)?);
    for write in acknowledged {
        serde_json::to_writer(&mut file, write)?;
        file.write_all(b"\n")?;
    }
    file.into_inner()?.sync_all()
}

#[cfg(test)]
mod tests;
