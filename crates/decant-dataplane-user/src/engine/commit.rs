//! Flushes and commits, one at a time, shared by all who wait for them.

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};

use decant_clone::marks;
use decant_clone::{CloneCore, Scope, SyncedWrite};
use rustix::io::Errno;

use super::{Engine, Life, MapFiles, Medium, lock};

/// Punch the marks file when so many bytes of it are superfluous.
const PUNCH: u64 = 1 << 20;

#[derive(Default)]
struct Turn {
    running: bool,
    /// Commits begun; each has the number of its beginning.
    begun: u64,
    /// The newest commit that ended.
    ended: u64,
}

/// Whose turn it is to sync. A flush is answered by any commit that began after it was asked for.
#[derive(Default)]
pub(super) struct Flusher {
    turn: Mutex<Turn>,
    ended: Condvar,
}

impl Engine {
    /// Returns when all that was acknowledged before the call is durable, and the marks that say so.
    ///
    /// # Errors
    /// EIO, now and for ever, once a sync failed.
    pub fn flush(&self) -> Result<(), Errno> {
        self.note_flush();
        self.commit(Scope::Flush)
    }

    /// As `flush`; with [`Scope::All`] the other marks too.
    pub(super) fn commit(&self, scope: Scope) -> Result<(), Errno> {
        let mut turn = lock(&self.flusher.turn);
        let mine = turn.begun + 1;
        loop {
            if self.has_failed.load(Ordering::Acquire) {
                return Err(Errno::IO);
            }
            // A background commit goes by itself: one that others began may have left fetched marks out.
            if scope == Scope::Flush && turn.ended >= mine {
                return Ok(());
            }
            if !turn.running {
                break;
            }
            turn = self.flusher.ended.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        turn.running = true;
        turn.begun += 1;
        let number = turn.begun;
        drop(turn);
        let result = self.commit_now(scope);
        let mut turn = lock(&self.flusher.turn);
        turn.running = false;
        if result.is_ok() {
            turn.ended = number;
        }
        self.flusher.ended.notify_all();
        result
    }

    /// Image, pages, map, in this order. Any failure is final.
    fn commit_now(&self, scope: Scope) -> Result<(), Errno> {
        let unsynced = self.unsynced.load(Ordering::Acquire);
        let (commit, marks_below) = match &mut *lock(&self.life) {
            Life::Clone(core) => {
                let below = core.next_mark();
                let (file, map) = core.parts();
                (file.begin_commit(map, scope), below)
            }
            _ => (None, 0),
        };
        if let Err(error) = self.image.sync() {
            self.fail(&format!("syncing the image failed: {error}"));
            return Err(Errno::IO);
        }
        self.synced(self.unsynced.fetch_sub(unsynced, Ordering::AcqRel));
        let Some(commit) = commit else { return Ok(()) };
        decant_base::crash::point("map:data-synced");
        let files = lock(&self.files).clone();
        if let Some(files) = &files
            && let Err(error) = write_pages(&*files.map, &commit.writes)
        {
            self.fail(&format!("committing the clone's map failed: {error}"));
            return Err(Errno::IO);
        }
        decant_base::crash::point("map:committed");
        if let Life::Clone(core) = &mut *lock(&self.life) {
            core.parts().0.end_commit(commit);
        }
        if let Some(files) = files.filter(|_| scope == Scope::All) {
            punch_marks(&files, marks_below);
        }
        Ok(())
    }

    /// The background commit, about once a second and sooner when much was stored: fetched marks, and second copies of pages.
    pub(super) fn commit_lazily(&self) {
        let worth_it = match &mut *lock(&self.life) {
            Life::Clone(core) => core.map().has_marks() || core.file().has_unsettled(),
            _ => false,
        };
        if worth_it && !self.has_failed.load(Ordering::Acquire) {
            // A failure is in the status already.
            let _ = self.commit(Scope::All);
        }
    }
}

fn write_pages(map: &dyn Medium, writes: &[SyncedWrite]) -> Result<(), Errno> {
    for write in writes {
        map.write_at(write.offset, &write.bytes[..])?;
    }
    decant_base::crash::point("map:pages-written");
    map.sync()
}

/// The marks file does not grow for ever. Failing to shrink it harms nobody.
fn punch_marks(files: &MapFiles, below: u64) {
    let done = files.punched.load(Ordering::Relaxed);
    if (below - done.min(below)) * marks::RECORD as u64 >= PUNCH {
        let from = marks::offset_of(done);
        let _ = files.marks.punch(from, marks::offset_of(below) - from);
        files.punched.store(below, Ordering::Relaxed);
    }
}

/// A commit before anybody else can have one.
pub(super) fn commit_at_open<W>(core: &mut CloneCore<W>, image: &dyn Medium, map: &dyn Medium) -> Result<(), Errno> {
    let (file, blocks) = core.parts();
    let Some(commit) = file.begin_commit(blocks, Scope::All) else { return Ok(()) };
    image.sync()?;
    write_pages(map, &commit.writes)?;
    core.parts().0.end_commit(commit);
    Ok(())
}
