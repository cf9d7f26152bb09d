//! The comparison with the origin's digests, and the transition from clone to plain volume.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use decant_base::BLOCK;
use decant_clone::State;
use decant_clone::format::Phase;
use decant_clone::verify::{Counts, Step, Verify};
use decant_dataplane::Verification;
use rustix::io::Errno;

use super::disk::Aligned;
use super::{CLONE, DIGEST_TOKENS, Engine, Life, PLAIN, lock};
use crate::device::{Fetch, Want};

/// Blocks read and compared at a time, 1 MiB.
const COMPARE: u64 = 256;
/// Blocks whose digests one request asks for at most: 16 MiB, 16 KiB of answer.
const ASK: u64 = 4096;
/// Requests for digests in flight, so that many short runs do not cost a round trip each.
const ASKED: usize = 64;
/// With no digest for so long the caller is told to come again.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a verification did not end.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Ask again later.
    #[error("not verified yet: {0}")]
    NotYet(String),
    /// A person is needed.
    #[error("cannot verify: {0}")]
    Stuck(String),
}

#[derive(Default)]
struct Answers {
    next: u64,
    asked: HashMap<u64, Range<u64>>,
    /// First block -> digests.
    have: BTreeMap<u64, Vec<u32>>,
    failed: Option<Range<u64>>,
}

/// Digests asked for and received.
#[derive(Default)]
pub(super) struct Digests {
    answers: Mutex<Answers>,
    changed: Condvar,
}

impl Engine {
    pub(super) fn take_digests(&self, token: u64, first: u64, crc32c: &[u32]) {
        let mut answers = lock(&self.digests.answers);
        if answers.asked.contains_key(&token) {
            answers.have.insert(first, crc32c.to_vec());
            self.digests.changed.notify_all();
        }
    }

    pub(super) fn digests_done(&self, token: u64, result: Result<(), Errno>) {
        let mut answers = lock(&self.digests.answers);
        if let Some(range) = answers.asked.remove(&token)
            && result.is_err()
        {
            answers.failed = Some(range);
        }
        self.digests.changed.notify_all();
    }

    pub(super) fn digests_link(&self, _up: bool) {
        self.digests.changed.notify_all();
    }

    /// Re-reads from the medium every block that is still as fetched and compares it with the origin's digest; fetches again what
    /// differs. When all agree: syncs the image, marks the map complete, and the volume is plain from then on. The map file
    /// stays until [`Engine::drop_map`], so that the caller can first record that the volume is whole. Again: the same answer.
    ///
    /// # Errors
    /// [`VerifyError::NotYet`] while blocks are missing or the origin is away.
    pub fn verify(&self) -> Result<Verification, VerifyError> {
        let mut verifying = lock(&self.verifying);
        let verify = &mut *verifying;
        if let Some(done) = *lock(&self.verified) {
            return Ok(done);
        }
        if self.phase.load(Ordering::Acquire) != CLONE {
            return Err(VerifyError::Stuck("the volume is no clone".into()));
        }
        {
            let mut answers = lock(&self.digests.answers);
            *answers = Answers { next: answers.next, ..Answers::default() };
        }
        // Pages not yet written would be compared in memory only.
        self.commit(decant_clone::Scope::Flush).map_err(|_| self.stuck())?;
        let (mut ahead, mut buffer) = (0, Aligned::new((COMPARE * BLOCK) as usize));
        loop {
            let step = match &*lock(&self.life) {
                Life::Clone(core) => verify.step(core.map(), COMPARE),
                _ => return Err(VerifyError::Stuck("the volume is no clone".into())),
            };
            match step {
                Step::Missing(blocks) => {
                    if verify.has_repairs() && self.wait_for_repairs() {
                        continue;
                    }
                    return Err(VerifyError::NotYet(format!("{blocks} blocks are missing")));
                }
                Step::BadMedium(block) => {
                    let why = format!("block {block} does not read back as it was written, again and again");
                    self.fail(&why);
                    return Err(VerifyError::Stuck(why));
                }
                Step::Compare(blocks) => self.compare(verify, &mut ahead, blocks, &mut buffer)?,
                Step::Done(counts) => {
                    if let Some(verification) = self.complete(counts)? {
                        return Ok(verification);
                    }
                }
            }
        }
    }

    /// Ends a clone whose origin has no digests to compare with: once nothing is missing, syncs, marks the map complete, and the
    /// volume is plain from then on; the origin is let go. Again: no error.
    ///
    /// # Errors
    /// [`VerifyError::NotYet`] while blocks are missing.
    pub fn finish(&self) -> Result<(), VerifyError> {
        let _one = lock(&self.verifying);
        loop {
            let (missing, counts) = match &*lock(&self.life) {
                Life::Plain => return Ok(()),
                Life::Prepared(_) => return Err(VerifyError::NotYet("the clone has not begun".into())),
                Life::Clone(core) => {
                    let count = |state| core.map().count(state);
                    let (overwritten, discarded) = (count(State::Written), count(State::Discarded));
                    (count(State::Missing), Counts { compared: 0, overwritten, discarded, repaired: 0 })
                }
            };
            if missing > 0 {
                return Err(VerifyError::NotYet(format!("{missing} blocks are missing")));
            }
            self.commit(decant_clone::Scope::Flush).map_err(|_| self.stuck())?;
            if self.complete(counts)?.is_some() {
                return Ok(());
            }
        }
    }

    fn stuck(&self) -> VerifyError {
        VerifyError::Stuck(self.failure().unwrap_or_else(|| "the volume failed".into()))
    }

    /// Missing blocks during a verification are its own repairs: a few, so they are worth waiting for.
    fn wait_for_repairs(&self) -> bool {
        self.pump();
        for _ in 0..PATIENCE.as_millis() / 10 {
            if let Life::Clone(core) = &*lock(&self.life)
                && core.map().count(State::Missing) == 0
            {
                break;
            }
            let answers = lock(&self.digests.answers);
            drop(self.digests.changed.wait_timeout(answers, Duration::from_millis(10)));
        }
        // What was repaired must be on the medium before it is read from there.
        let whole = matches!(&*lock(&self.life), Life::Clone(core) if core.map().count(State::Missing) == 0);
        whole && self.commit(decant_clone::Scope::Flush).is_ok()
    }

    fn compare(
        &self,
        verify: &mut Verify,
        ahead: &mut u64,
        blocks: Range<u64>,
        buffer: &mut Aligned,
    ) -> Result<(), VerifyError> {
        let digests = self.digests_of(blocks.clone(), ahead)?;
        let blocks = blocks.start..blocks.start + digests.len() as u64;
        let bytes = self.shape.bytes_of(blocks.clone());
        let buffer = &mut buffer.bytes()[..((blocks.end - blocks.start) * BLOCK) as usize];
        let read = self.image.read_medium(bytes.start, buffer);
        let length = (bytes.end - bytes.start) as usize;
        let differs = |(index, data): (usize, &[u8])| {
            let same = read.is_ok() && crc32c::crc32c(data) == digests[index];
            (!same).then_some(blocks.start + index as u64)
        };
        let differing: Vec<u64> = buffer[..length].chunks(BLOCK as usize).enumerate().filter_map(differs).collect();
        if let Life::Clone(core) = &mut *lock(&self.life) {
            let lost = verify.compared(core.parts().1, blocks, &differing);
            if lost > 0 {
                core.refill();
                tracing::warn!(volume = %self.volume, blocks = ?differing, "fetched blocks differ from the origin; fetching them again");
            }
        }
        Ok(())
    }

    /// The digests of a non-empty prefix of `blocks`. Asks ahead for the runs that come after.
    fn digests_of(&self, blocks: Range<u64>, ahead: &mut u64) -> Result<Vec<u32>, VerifyError> {
        // A block that is compared again lies behind what was asked for.
        self.ask_ahead(ahead);
        let mut answers = lock(&self.digests.answers);
        loop {
            let oldest = answers.have.range(..=blocks.start).next_back().map_or(0, |(&first, _)| first);
            answers.have = answers.have.split_off(&oldest);
            if let Some((&first, have)) = answers.have.range(..=blocks.start).next_back() {
                let skip = (blocks.start - first) as usize;
                if skip < have.len() {
                    let end = have.len().min(skip + (blocks.end - blocks.start) as usize);
                    return Ok(have[skip..end].to_vec());
                }
            }
            if answers.failed.take().is_some() {
                return Err(VerifyError::NotYet("the origin cannot digest some blocks now".into()));
            }
            let is_asked = answers.asked.values().any(|range| range.contains(&blocks.start));
            if !is_asked {
                drop(answers);
                self.ask(blocks.clone())?;
                answers = lock(&self.digests.answers);
                continue;
            }
            let (guard, timeout) =
                self.digests.changed.wait_timeout(answers, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            answers = guard;
            let connected = matches!(&*lock(&self.life), Life::Clone(core) if core.connected());
            if timeout.timed_out() || !connected {
                return Err(VerifyError::NotYet("the origin does not answer".into()));
            }
        }
    }

    fn ask_ahead(&self, ahead: &mut u64) {
        loop {
            let answers = lock(&self.digests.answers);
            let room = answers.asked.len() + answers.have.len() < ASKED;
            drop(answers);
            if !room {
                return;
            }
            let next = match &*lock(&self.life) {
                Life::Clone(core) => core.map().next_in(*ahead..self.shape.blocks(), State::Fetched),
                _ => None,
            };
            let Some(run) = next else { return };
            let run = run.start..run.end.min(run.start + ASK);
            *ahead = run.end;
            if self.ask(run).is_err() {
                return;
            }
        }
    }

    fn ask(&self, blocks: Range<u64>) -> Result<(), VerifyError> {
        let Some(origin) = self.origin() else { return Err(VerifyError::NotYet("there is no origin".into())) };
        let token = {
            let mut answers = lock(&self.digests.answers);
            answers.next += 1;
            let token = DIGEST_TOKENS | answers.next;
            answers.asked.insert(token, blocks.clone());
            token
        };
        let bytes = self.shape.bytes_of(blocks);
        origin.request(Fetch {
            token,
            offset: bytes.start,
            length: (bytes.end - bytes.start) as u32,
            want: Want::Digests,
            urgent: false,
        });
        Ok(())
    }

    /// All agree: the volume turns plain. `None`: a block was lost meanwhile, go on.
    fn complete(&self, counts: Counts) -> Result<Option<Verification>, VerifyError> {
        let verification = Verification {
            compared: counts.compared,
            overwritten: counts.overwritten,
            discarded: counts.discarded,
            repaired: counts.repaired,
        };
        // All bytes durable, then the word that all are here.
        self.commit(decant_clone::Scope::Flush).map_err(|_| self.stuck())?;
        let Some(files) = lock(&self.files).clone() else { return Err(self.stuck()) };
        {
            let _one = lock(&files.superblock);
            let write = match &mut *lock(&self.life) {
                Life::Clone(core) => core.parts().0.begin_update(|superblock| {
                    superblock.phase = Phase::Complete;
                    superblock.clean = true;
                    superblock.verification = [counts.compared, counts.overwritten, counts.discarded, counts.repaired];
                }),
                _ => return Ok(None),
            };
            self.update(&files, &write, "map:complete").map_err(|_| self.stuck())?;
        }
        *lock(&self.verified) = Some(verification);
        let core = std::mem::replace(&mut *lock(&self.life), Life::Plain);
        self.phase.store(PLAIN, Ordering::Release);
        self.stored.notify_all();
        if let Life::Clone(mut core) = core {
            // Whoever still waits must hear something: nobody knows of those reads once this is gone.
            let mut waiting = Vec::new();
            core.take_parked(&mut waiting);
            self.serve_all(waiting);
        }
        self.drop_origin();
        self.fill.stop();
        *lock(&self.files) = None;
        if let Err(error) = self.disk.remove_marks() {
            tracing::warn!(volume = %self.volume, %error, "cannot remove the marks file of a whole volume");
        }
        Ok(Some(verification))
    }

    /// Removes the map of a volume that is complete, durably. Again: no error.
    ///
    /// # Errors
    /// EBUSY while the volume is a clone; what removing says.
    pub fn drop_map(&self) -> Result<(), Errno> {
        if !self.is_plain() {
            return Err(Errno::BUSY);
        }
        self.disk.remove_map()?;
        decant_base::crash::point("map:dropped");
        Ok(())
    }
}
