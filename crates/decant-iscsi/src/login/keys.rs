//! The keys of an operational negotiation (12, 13), for both roles.

use crate::error::Violation;
use crate::pdu::{Digests, MAX_DATA_SEGMENT};
use crate::text::{Pairs, TextOut, number};

/// Whether a digest is wanted (13.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DigestPolicy {
    /// Only None is acceptable.
    #[default]
    Never,
    /// Both are; None is preferred.
    Allowed,
    /// Both are; CRC32C is preferred.
    Preferred,
    /// Only CRC32C is.
    Required,
}

impl DigestPolicy {
    fn offers(self) -> &'static str {
        match self {
            Self::Never => "None",
            Self::Allowed => "None,CRC32C",
            Self::Preferred => "CRC32C,None",
            Self::Required => "CRC32C",
        }
    }

    /// The first of the peer's list that is acceptable here: the originator's order decides (6.2.1).
    fn choose(self, offered: &str) -> Option<bool> {
        offered.split(',').find_map(|one| self.accepts(one))
    }

    fn accepts(self, one: &str) -> Option<bool> {
        match one {
            "None" if self != Self::Required => Some(false),
            "CRC32C" if self != Self::Never => Some(true),
            _ => None,
        }
    }
}

/// What one side wants of a session. Values are in the units and ranges of their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// HeaderDigest.
    pub header_digest: DigestPolicy,
    /// DataDigest.
    pub data_digest: DigestPolicy,
    /// InitialR2T; the session has it if either side wants it.
    pub initial_r2t: bool,
    /// ImmediateData; the session has it if both sides want it.
    pub immediate_data: bool,
    /// MaxRecvDataSegmentLength of this side, bytes: 512..2^24. What it declares, and what its decoder accepts.
    pub max_receive: u32,
    /// MaxBurstLength, bytes: 512..2^24. The smaller of both sides' holds, as for the next three.
    pub max_burst: u32,
    /// FirstBurstLength, bytes: 512..2^24; not above `max_burst`.
    pub first_burst: u32,
    /// MaxOutstandingR2T, 1..65536.
    pub max_outstanding_r2t: u32,
    /// DefaultTime2Wait, seconds, 0..=3600; here the larger holds.
    pub time_to_wait: u32,
    /// DefaultTime2Retain, seconds, 0..=3600.
    pub time_to_retain: u32,
}

impl Default for Offer {
    /// What suits both roles of this crate: all that makes fewer round trips, and digests as the peer wants them.
    fn default() -> Self {
        Self {
            header_digest: DigestPolicy::Allowed,
            data_digest: DigestPolicy::Allowed,
            initial_r2t: false,
            immediate_data: true,
            max_receive: 256 * 1024,
            max_burst: 1024 * 1024,
            first_burst: 256 * 1024,
            max_outstanding_r2t: 1,
            time_to_wait: 2,
            time_to_retain: 0,
        }
    }
}

/// What holds in a session. Until something is negotiated, the defaults of section 13.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// Both digests.
    pub digests: Digests,
    /// InitialR2T: no unsolicited Data-Out.
    pub initial_r2t: bool,
    /// ImmediateData: data in the SCSI Command PDU is allowed.
    pub immediate_data: bool,
    /// MaxRecvDataSegmentLength that this side declared.
    pub max_receive: u32,
    /// MaxRecvDataSegmentLength that the peer declared: what may be sent.
    pub max_send: u32,
    /// MaxBurstLength.
    pub max_burst: u32,
    /// FirstBurstLength.
    pub first_burst: u32,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u32,
    /// DefaultTime2Wait, seconds.
    pub time_to_wait: u32,
    /// DefaultTime2Retain, seconds.
    pub time_to_retain: u32,
}

/// MaxRecvDataSegmentLength of a side that has not declared one (13.12), and during login (6.3).
pub const DEFAULT_MAX_SEGMENT: u32 = 8192;

impl Default for Params {
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            initial_r2t: true,
            immediate_data: true,
            max_receive: DEFAULT_MAX_SEGMENT,
            max_send: DEFAULT_MAX_SEGMENT,
            max_burst: 262_144,
            first_burst: 65_536,
            max_outstanding_r2t: 1,
            time_to_wait: 2,
            time_to_retain: 20,
        }
    }
}

/// How the two values of a key become one (6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Digest,
    And,
    Or,
    Min(u32, u32),
    Max(u32, u32),
    /// Each side says its own.
    Declare(u32, u32),
    /// Only this value is spoken here.
    FixedNumber(u32, u32, u32),
}

const SEGMENT: (u32, u32) = (512, MAX_DATA_SEGMENT);

/// The keys of an operational negotiation that are not mere declarations of names, in the order in which they are offered.
const KEYS: &[(&str, Rule)] = &[
    ("HeaderDigest", Rule::Digest),
    ("DataDigest", Rule::Digest),
    ("InitialR2T", Rule::Or),
    ("ImmediateData", Rule::And),
    ("MaxRecvDataSegmentLength", Rule::Declare(SEGMENT.0, SEGMENT.1)),
    ("MaxBurstLength", Rule::Min(SEGMENT.0, SEGMENT.1)),
    ("FirstBurstLength", Rule::Min(SEGMENT.0, SEGMENT.1)),
    ("MaxOutstandingR2T", Rule::Min(1, 65_535)),
    ("DefaultTime2Wait", Rule::Max(0, 3600)),
    ("DefaultTime2Retain", Rule::Min(0, 3600)),
    ("MaxConnections", Rule::FixedNumber(1, 1, 65_535)),
    ("ErrorRecoveryLevel", Rule::FixedNumber(0, 0, 2)),
    ("DataPDUInOrder", Rule::Or),
    ("DataSequenceInOrder", Rule::Or),
];

/// Keys that need no answer: they declare (13), or they belong to the security stage and are dealt with there.
const DECLARATIONS: &[&str] = &[
    "InitiatorName",
    "InitiatorAlias",
    "TargetName",
    "TargetAlias",
    "TargetAddress",
    "TargetPortalGroupTag",
    "SessionType",
];

/// Keys that are irrelevant in a discovery session (13): answered so.
const NOT_IN_DISCOVERY: &[&str] = &[
    "MaxConnections",
    "InitialR2T",
    "ImmediateData",
    "MaxBurstLength",
    "FirstBurstLength",
    "MaxOutstandingR2T",
    "DataPDUInOrder",
    "DataSequenceInOrder",
];

/// One side of an operational negotiation.
///
/// Each key is decided once: by an offer of the peer's, which is answered, or by the peer's answer to an offer of this
/// side; [`Self::handle`] tells the two apart.
#[derive(Debug, Clone)]
pub struct Negotiation {
    offer: Offer,
    params: Params,
    discovery: bool,
    offered: u32,
    decided: u32,
}

impl Negotiation {
    /// A negotiation that has not begun; `discovery` for a discovery session.
    pub fn new(offer: Offer, discovery: bool) -> Self {
        Self { offer, params: Params::default(), discovery, offered: 0, decided: 0 }
    }

    /// What holds so far.
    pub fn params(&self) -> Params {
        self.params
    }

    /// Offers every key that is not decided or offered yet: what an initiator does.
    pub fn offer(&mut self, out: &mut TextOut) {
        for (index, (key, _)) in KEYS.iter().enumerate() {
            if self.discovery && NOT_IN_DISCOVERY.contains(key) {
                continue;
            }
            self.offer_one(index, out);
        }
    }

    /// Declares MaxRecvDataSegmentLength, if that was not done yet: what a target adds to its answers.
    pub fn declare(&mut self, out: &mut TextOut) {
        if let Some(index) = KEYS.iter().position(|(key, _)| *key == "MaxRecvDataSegmentLength") {
            self.offer_one(index, out);
        }
    }

    fn offer_one(&mut self, index: usize, out: &mut TextOut) {
        let Some((key, rule)) = KEYS.get(index) else { return };
        let declares = matches!(rule, Rule::Declare(..));
        if bit(self.offered, index) || (bit(self.decided, index) && !declares) {
            return;
        }
        set_bit(&mut self.offered, index);
        if declares {
            self.params.max_receive = self.offer.max_receive;
        }
        out.push(key, &self.wanted(key, *rule));
    }

    /// Deals with every pair of the peer's: offers are answered into `out`, answers are taken over. Pairs of the security
    /// stage and declarations of names are passed over.
    ///
    /// # Errors
    /// A value that is not the key's, an answer outside of what was offered, a key decided before.
    pub fn handle(&mut self, pairs: &Pairs, out: &mut TextOut) -> Result<(), Violation> {
        for (key, value) in pairs.iter() {
            let index = KEYS.iter().position(|(known, _)| *known == key);
            match index.and_then(|index| KEYS.get(index).map(|(_, rule)| (index, *rule))) {
                Some((index, Rule::Declare(low, high))) => {
                    self.params.max_send = ranged(key, value, low, high)?;
                    self.decide(key, index)?;
                }
                Some((index, rule)) if bit(self.offered, index) => {
                    self.decide(key, index)?;
                    self.handle_answer(key, rule, value)?;
                }
                Some((index, rule)) => {
                    self.decide(key, index)?;
                    self.handle_offer(key, rule, value, out)?;
                }
                None if DECLARATIONS.contains(&key) || is_security(key) => {}
                None if matches!(value, "NotUnderstood" | "Irrelevant" | "Reject") => {}
                // Markers are obsolete (13.25): No is the only answer, and no initiator minds.
                None if matches!(key, "IFMarker" | "OFMarker") => out.push(key, "No"),
                None if matches!(key, "IFMarkInt" | "OFMarkInt") => out.push(key, "Irrelevant"),
                None => out.push(key, "NotUnderstood"),
            }
        }
        Ok(())
    }

    /// The outcome, once both sides are ready for the full feature phase.
    ///
    /// # Errors
    /// Values that contradict each other: a first burst longer than a burst (13.14).
    pub fn finish(&self) -> Result<Params, Violation> {
        let mut params = self.params;
        if params.first_burst > params.max_burst {
            // Only defaults that nobody negotiated may be cut down silently.
            let index = KEYS.iter().position(|(key, _)| *key == "FirstBurstLength");
            if index.is_some_and(|index| bit(self.decided, index)) {
                return Err(Violation::Malformed("FirstBurstLength is above MaxBurstLength"));
            }
            params.first_burst = params.max_burst;
        }
        // A digest that must be there is not, if the peer never said a word about it.
        let offer = &self.offer;
        for (key, policy, on) in [
            ("HeaderDigest", offer.header_digest, params.digests.header),
            ("DataDigest", offer.data_digest, params.digests.data),
        ] {
            if policy == DigestPolicy::Required && !on {
                return Err(Violation::value(key, "None"));
            }
        }
        Ok(params)
    }

    fn decide(&mut self, key: &str, index: usize) -> Result<(), Violation> {
        if bit(self.decided, index) {
            return Err(Violation::value(key, "negotiated twice"));
        }
        set_bit(&mut self.decided, index);
        Ok(())
    }

    /// The value of `key` that this side would have.
    fn wanted(&self, key: &str, rule: Rule) -> String {
        let offer = &self.offer;
        match (key, rule) {
            ("HeaderDigest", _) => offer.header_digest.offers().to_owned(),
            ("DataDigest", _) => offer.data_digest.offers().to_owned(),
            ("InitialR2T", _) => yes_no(offer.initial_r2t).to_owned(),
            ("ImmediateData", _) => yes_no(offer.immediate_data).to_owned(),
            (_, Rule::And | Rule::Or) => "Yes".to_owned(),
            _ => self.wanted_number(key, rule).to_string(),
        }
    }

    fn wanted_number(&self, key: &str, rule: Rule) -> u32 {
        let offer = &self.offer;
        let value = match key {
            "MaxRecvDataSegmentLength" => offer.max_receive,
            "MaxBurstLength" => offer.max_burst,
            "FirstBurstLength" => offer.first_burst.min(offer.max_burst),
            "MaxOutstandingR2T" => offer.max_outstanding_r2t,
            "DefaultTime2Wait" => offer.time_to_wait,
            "DefaultTime2Retain" => offer.time_to_retain,
            _ => 0,
        };
        match rule {
            Rule::FixedNumber(only, ..) => only,
            Rule::Min(low, high) | Rule::Max(low, high) | Rule::Declare(low, high) => value.clamp(low, high),
            _ => value,
        }
    }

    /// Decides an offer of the peer's and says the outcome.
    fn handle_offer(&mut self, key: &str, rule: Rule, value: &str, out: &mut TextOut) -> Result<(), Violation> {
        if self.discovery && NOT_IN_DISCOVERY.contains(&key) {
            out.push(key, "Irrelevant");
            return Ok(());
        }
        match rule {
            Rule::Digest => {
                let policy = self.policy(key);
                let Some(chosen) = policy.choose(value) else {
                    out.push(key, "Reject");
                    return Err(Violation::value(key, value));
                };
                self.set_digest(key, chosen);
                out.push(key, if chosen { "CRC32C" } else { "None" });
            }
            Rule::And | Rule::Or => {
                let theirs = boolean(key, value)?;
                let ours = self.wanted(key, rule) == "Yes";
                let outcome = if rule == Rule::And { ours && theirs } else { ours || theirs };
                self.set_boolean(key, outcome);
                out.push(key, yes_no(outcome));
            }
            Rule::Min(low, high) | Rule::Max(low, high) | Rule::FixedNumber(_, low, high) => {
                let theirs = ranged(key, value, low, high)?;
                let ours = self.wanted_number(key, rule);
                let mut outcome = if matches!(rule, Rule::Max(..)) { ours.max(theirs) } else { ours.min(theirs) };
                if key == "FirstBurstLength" {
                    outcome = outcome.min(self.params.max_burst.max(low));
                }
                self.set_number(key, outcome);
                out.push(key, &outcome.to_string());
            }
            Rule::Declare(..) => {}
        }
        Ok(())
    }

    /// Takes over the peer's answer to an offer of ours, which must lie between the two sides' values.
    fn handle_answer(&mut self, key: &str, rule: Rule, value: &str) -> Result<(), Violation> {
        if matches!(value, "Irrelevant" | "NotUnderstood") {
            // The default holds (6.2). For digests that is None, which must be acceptable.
            return match rule {
                Rule::Digest if self.policy(key) == DigestPolicy::Required => Err(Violation::value(key, value)),
                _ => Ok(()),
            };
        }
        let wrong = || Violation::value(key, value);
        match rule {
            Rule::Digest => {
                let chosen = self.policy(key).accepts(value).ok_or_else(wrong)?;
                self.set_digest(key, chosen);
            }
            Rule::And | Rule::Or => {
                let outcome = boolean(key, value)?;
                let ours = self.wanted(key, rule) == "Yes";
                let possible = if rule == Rule::And { ours || !outcome } else { !ours || outcome };
                if !possible {
                    return Err(wrong());
                }
                self.set_boolean(key, outcome);
            }
            Rule::Min(low, high) | Rule::FixedNumber(_, low, high) => {
                let outcome = ranged(key, value, low, high)?;
                if outcome > self.wanted_number(key, rule) {
                    return Err(wrong());
                }
                self.set_number(key, outcome);
            }
            Rule::Max(low, high) => {
                let outcome = ranged(key, value, low, high)?;
                if outcome < self.wanted_number(key, rule) {
                    return Err(wrong());
                }
                self.set_number(key, outcome);
            }
            Rule::Declare(..) => {}
        }
        Ok(())
    }

    fn policy(&self, key: &str) -> DigestPolicy {
        if key == "HeaderDigest" { self.offer.header_digest } else { self.offer.data_digest }
    }

    fn set_digest(&mut self, key: &str, on: bool) {
        let digests = &mut self.params.digests;
        let field = if key == "HeaderDigest" { &mut digests.header } else { &mut digests.data };
        *field = on;
    }

    fn set_boolean(&mut self, key: &str, value: bool) {
        match key {
            "InitialR2T" => self.params.initial_r2t = value,
            "ImmediateData" => self.params.immediate_data = value,
            // DataPDUInOrder and DataSequenceInOrder: this side wants Yes, so they are.
            _ => {}
        }
    }

    fn set_number(&mut self, key: &str, value: u32) {
        match key {
            "MaxBurstLength" => self.params.max_burst = value,
            "FirstBurstLength" => self.params.first_burst = value,
            "MaxOutstandingR2T" => self.params.max_outstanding_r2t = value,
            "DefaultTime2Wait" => self.params.time_to_wait = value,
            "DefaultTime2Retain" => self.params.time_to_retain = value,
            // MaxConnections is 1 and ErrorRecoveryLevel 0.
            _ => {}
        }
    }
}

fn bit(set: u32, index: usize) -> bool {
    1u32.checked_shl(u32::try_from(index).unwrap_or(u32::MAX)).is_some_and(|mask| set & mask != 0)
}

fn set_bit(set: &mut u32, index: usize) {
    *set |= 1u32.checked_shl(u32::try_from(index).unwrap_or(u32::MAX)).unwrap_or_default();
}

/// Whether a key belongs to the security stage (12).
pub fn is_security(key: &str) -> bool {
    key == "AuthMethod" || key.starts_with("CHAP_") || key.starts_with("SRP_") || key.starts_with("KRB_")
}

fn yes_no(value: bool) -> &'static str {
    if value { "Yes" } else { "No" }
}

fn boolean(key: &str, value: &str) -> Result<bool, Violation> {
    match value {
        "Yes" => Ok(true),
        "No" => Ok(false),
        _ => Err(Violation::value(key, value)),
    }
}

fn ranged(key: &str, value: &str, low: u32, high: u32) -> Result<u32, Violation> {
    number(value).filter(|number| (low..=high).contains(number)).ok_or_else(|| Violation::value(key, value))
}
