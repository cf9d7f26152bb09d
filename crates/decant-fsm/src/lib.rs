//! Durable steps: a worker's journal of rows and an append-only event log on redb. Knows nothing of what is being migrated.
//!
//! **A step is one synced transaction**: [`Journal::apply`] reads a row, steps it, and commits the new row with its line
//! of the log, or nothing. What the step wants done is handed back only when the commit is durable, so an effect can
//! never run ahead of the row that justifies it.
//!
//! # Format
//! `journal.redb`, redb 4's format, three tables:
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema`, `identity`, `generation` | JSON |
//! | `rows` | `<kind>/<id>` | JSON of the row |
//! | `log`  | sequence, u64, from 1, no gaps at its end | JSON of a [`LogEntry`] |
//!
//! Every page carries redb's xxh3 checksum and opening verifies **all** of them ([`redb::Builder::set_check_integrity_on_open`]),
//! so rows carry no checksum of their own. `schema` is one number for everything in the file; a newer file is refused.
//!
//! Beside it `journal.redb.guard` says which journal belongs here: its identity, random when the journal is made, and its
//! generation, which grows each time it is opened. A journal that was deleted, swapped for another worker's, or replaced
//! by a backup from before the last start is refused, loudly: an old journal could boot a machine that has moved since.
//! Backups younger than that are caught by what the journal's user mirrors elsewhere (a volume's epoch; gossip).
//!
//! # Durability
//! A durable commit is redb's one-phase commit: one fsync. Two-phase costs a second one, on the path of a machine's
//! interruption, and guards against an attacker who chooses what is journalled *and* the order in which the disk writes
//! it; rows here come from root and from workers with certificates. A commit may also be asked not to be durable by itself
//! ([`Change::durable`]); it is then lost by a crash unless a durable one follows.
//!
//! What this assumes of the medium: a sync that returned is kept; a sector of 512 bytes is written whole or not; what rots
//! is rare. Rot is noticed when the journal is opened, with one exception: rot in the pages of the very last commit while
//! the file was not closed looks like a torn commit, and the one before it counts. That needs a crash and rot at once.
//!
//! A durable commit takes 0.7 to 8 ms on a shared virtual disk, one that is not durable by itself 0.1 ms.
//!
//! **A failed commit is final**: after an error from redb or the disk the journal refuses everything until it is opened
//! again, because what is on the medium is not known any more.

#![forbid(unsafe_code)]

mod backoff;
mod guard;
mod journal;

pub use backoff::Backoff;
pub use journal::{ApplyError, Change, Journal, JournalError, LogEntry, OpenError, Options, Points, Write};
