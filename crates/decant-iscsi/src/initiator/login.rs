//! The login phase at the initiator (6.3, 11.12, 12).
//!
//! ```text
//! Security: AuthMethod=None, T ------------------------------------------+
//! Security: AuthMethod=CHAP -> CHAP_A -> CHAP_N, CHAP_R [, challenge], T --+--> Operational: all keys, T --> full feature
//! ```
//! One method is offered and no choice: a target that answers another one, or that goes on without the proof it owes, is
//! refused. Whatever comes, a login ends after [`MAX_STEPS`] requests.

use super::Config;
use crate::chap::{self, Challenge, Chap};
use crate::error::Violation;
use crate::login::{DEFAULT_MAX_SEGMENT, Negotiation, Params, Stage, Status};
use crate::pdu::{self, Digests, LoginRequest, LoginResponse};
use crate::serial::Serial;
use crate::text::{Pairs, TextIn, TextOut};

/// Most requests in a login; two stages, CHAP and continuations of the longest text come to far fewer.
const MAX_STEPS: u32 = 32;
/// The Initiator Task Tag of a login: of no command, since those have begun to count when there are any.
const LOGIN_TASK: u32 = 0;
/// MD5 over its challenge proves a side; how far that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// AuthMethod is offered.
    Offered,
    /// CHAP_A is offered.
    Algorithm,
    /// The answer to the target's challenge is out, and our challenge, if the target is to prove itself.
    Answered,
    /// All is proved that had to be.
    Done,
}

/// A login under way.
#[derive(Debug)]
pub(super) struct Login {
    stage: Stage,
    proof: Proof,
    challenge: Challenge,
    negotiation: Negotiation,
    text: TextIn,
    steps: u32,
    isid: [u8; 6],
    cmd_sn: Serial,
    stat_sn: Option<Serial>,
}

/// What a response comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// The next request is out.
    Going,
    /// The full feature phase begins.
    LoggedIn(Params),
}

impl Login {
    /// Begins: the first request is appended.
    pub(super) fn start(config: &Config, random: [u8; chap::RANDOM_BYTES], cmd_sn: Serial, out: &mut Vec<u8>) -> Self {
        let mut login = Self {
            stage: Stage::Security,
            proof: Proof::Offered,
            challenge: Challenge::new(random),
            negotiation: Negotiation::new(config.offer.clone(), false),
            text: TextIn::default(),
            steps: 0,
            isid: config.isid,
            cmd_sn,
            stat_sn: None,
        };
        let mut text = TextOut::default();
        text.push("InitiatorName", &config.initiator);
        text.push("TargetName", &config.target);
        text.push("SessionType", "Normal");
        let chap = config.chap.is_some();
        text.push("AuthMethod", if chap { "CHAP" } else { "None" });
        login.ask((!chap).then_some(Stage::Operational), text, out);
        login
    }

    /// ExpStatSN after the last response.
    pub(super) fn exp_stat_sn(&self) -> Serial {
        self.stat_sn.unwrap_or_default()
    }

    fn ask(&mut self, next: Option<Stage>, mut text: TextOut, out: &mut Vec<u8>) {
        let (data, more) = text.next_piece(DEFAULT_MAX_SEGMENT as usize);
        debug_assert!(!more, "what an initiator says is far shorter than a segment");
        let request = LoginRequest {
            immediate: true,
            transit: next.is_some(),
            stage: self.stage.raw(),
            next_stage: next.map_or(0, Stage::raw),
            isid: self.isid,
            task: LOGIN_TASK,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn(),
            ..LoginRequest::default()
        };
        pdu::put(out, &request.into(), &data, Digests::default());
    }

    /// Takes a response with its text.
    pub(super) fn handle(
        &mut self,
        response: &LoginResponse,
        data: &[u8],
        config: &Config,
        out: &mut Vec<u8>,
    ) -> Result<Progress, Violation> {
        self.steps = self.steps.saturating_add(1);
        if self.steps > MAX_STEPS {
            return Err(Violation::EndlessLogin);
        }
        if response.status_class != 0 {
            return Err(refusal(response, data));
        }
        if response.task != LOGIN_TASK || response.version_active != 0 {
            return Err(Violation::Malformed("login response"));
        }
        if self.stat_sn.is_some_and(|expected| expected != response.stat_sn) {
            return Err(Violation::OutOfPlace("a gap in StatSN"));
        }
        self.stat_sn = Some(response.stat_sn.next());
        let (stage, next) = Stage::check(response.transit, response.more, response.stage, response.next_stage)?;
        if stage != self.stage {
            return Err(Violation::Malformed("login stages"));
        }
        self.text.push(data)?;
        if response.more {
            self.ask(None, TextOut::default(), out);
            return Ok(Progress::Going);
        }
        let pairs = self.text.take()?;
        match stage {
            Stage::Security => self.secure(&pairs, next, config, out).map(|()| Progress::Going),
            _ => self.operate(&pairs, next, response.tsih, config, out),
        }
    }

    /// The security stage (12.1).
    fn secure(
        &mut self,
        pairs: &Pairs,
        next: Option<Stage>,
        config: &Config,
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let mut text = TextOut::default();
        match (self.proof, &config.chap) {
            (Proof::Offered, None) => {
                if !matches!(pairs.value("AuthMethod"), None | Some("None")) {
                    return Err(Violation::Authentication("the target wants a secret and none is configured"));
                }
                self.proof = Proof::Done;
            }
            (Proof::Offered, Some(_)) => {
                if pairs.value("AuthMethod") != Some("CHAP") {
                    return Err(Violation::Authentication("the target does not take CHAP"));
                }
                text.push("CHAP_A", chap::MD5);
                self.proof = Proof::Algorithm;
            }
            (Proof::Algorithm, Some(chap)) => {
                self.answer(pairs, chap, &mut text)?;
                self.proof = Proof::Answered;
                return self.expect_none(next).map(|()| self.ask(Some(Stage::Operational), text, out));
            }
            (Proof::Answered, Some(chap)) => {
                self.check(pairs, chap)?;
                self.proof = Proof::Done;
            }
            (Proof::Done, _) | (_, None) => {}
        }
        if self.proof != Proof::Done {
            self.expect_none(next)?;
            self.ask(None, text, out);
        } else if next == Some(Stage::Operational) {
            self.stage = Stage::Operational;
            self.negotiation.offer(&mut text);
            self.ask(Some(Stage::FullFeature), text, out);
        } else if next.is_none() {
            self.ask(Some(Stage::Operational), text, out);
        } else {
            return Err(Violation::Malformed("login stages"));
        }
        Ok(())
    }

    /// The target must not go on before all is proved.
    fn expect_none(&self, next: Option<Stage>) -> Result<(), Violation> {
        if next.is_some() {
            return Err(Violation::Authentication("the target goes on without authentication"));
        }
        Ok(())
    }

    /// Answers the target's challenge, and puts ours if the target has to prove itself.
    fn answer(&self, pairs: &Pairs, chap: &Chap, text: &mut TextOut) -> Result<(), Violation> {
        if pairs.value("CHAP_A") != Some(chap::MD5) {
            return Err(Violation::Authentication("the target does not take MD5"));
        }
        let (Some(id), Some(challenge)) = (pairs.value("CHAP_I"), pairs.value("CHAP_C")) else {
            return Err(Violation::Authentication("there is no challenge"));
        };
        let own = chap.initiator();
        let ours = chap.target().map(|_| &self.challenge);
        let answer = chap::answer_text(&own.secret, id, challenge, ours)?;
        text.push("CHAP_N", &own.name);
        text.push("CHAP_R", &answer);
        if chap.target().is_some() {
            self.challenge.put(text);
        }
        Ok(())
    }

    /// Checks the target's proof, if it owes one.
    fn check(&self, pairs: &Pairs, chap: &Chap) -> Result<(), Violation> {
        let Some(target) = chap.target() else { return Ok(()) };
        let (Some(name), Some(response)) = (pairs.value("CHAP_N"), pairs.value("CHAP_R")) else {
            return Err(Violation::Authentication("the target does not prove itself"));
        };
        let proved = self.challenge.is_answered_by(&target.secret, response);
        if !proved || name != target.name {
            return Err(Violation::Authentication("the target is not the one it should be"));
        }
        Ok(())
    }

    /// The operational stage.
    fn operate(
        &mut self,
        pairs: &Pairs,
        next: Option<Stage>,
        tsih: u16,
        config: &Config,
        out: &mut Vec<u8>,
    ) -> Result<Progress, Violation> {
        let mut text = TextOut::default();
        self.negotiation.handle(pairs, &mut text)?;
        if next.is_none() {
            self.ask(Some(Stage::FullFeature), text, out);
            return Ok(Progress::Going);
        }
        if !text.is_empty() {
            return Err(Violation::OutOfPlace("an offer that can not be answered any more"));
        }
        if tsih == 0 {
            return Err(Violation::Malformed("TSIH"));
        }
        let params = self.negotiation.finish()?;
        debug_assert_eq!(params.max_receive, config.offer.max_receive, "declared with the first request of the stage");
        Ok(Progress::LoggedIn(params))
    }
}

/// Status-Class is not success.
fn refusal(response: &LoginResponse, data: &[u8]) -> Violation {
    let status = Status { class: response.status_class, detail: response.status_detail };
    let address = Pairs::parse(data).ok().and_then(|pairs| pairs.value("TargetAddress").map(str::to_owned));
    match address {
        Some(address) if status.class == 1 => {
            let printable = |c: char| if c.is_ascii_graphic() { c } else { '?' };
            Violation::Moved { address: address.chars().take(255).map(printable).collect() }
        }
        _ => Violation::LoginRefused { status },
    }
}
