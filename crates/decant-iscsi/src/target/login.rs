//! The login phase at the target (6.3, 11.12, 12).

use super::{Access, Connection, Event, Farewell, Outbox, Phase, Sink, Target};
use crate::chap::{self, Challenge};
use crate::error::{Violation, cut};
use crate::login::{DEFAULT_MAX_SEGMENT, Negotiation, Stage, Status};
use crate::pdu::{self, Digests, Header, LoginRequest, LoginResponse};
use crate::text::{self, Pairs, TextIn, TextOut};

/// Most requests in a login: two stages, four steps of CHAP and continuations of the longest text come to far fewer.
const MAX_STEPS: u32 = 64;

/// How far the proof is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// AuthMethod is not agreed.
    Open,
    /// CHAP is: CHAP_A comes.
    Chap,
    /// The challenge is out.
    Challenged,
    /// Proved, or nothing to prove.
    Done,
}

#[derive(Debug)]
pub(super) struct Login {
    challenge: Challenge,
    steps: u32,
    first: Option<LoginRequest>,
    stage: Stage,
    proof: Proof,
    text: TextIn,
    out: TextOut,
    initiator: String,
    access: Option<Access>,
    discovery: bool,
    negotiation: Option<Negotiation>,
    said_portal: bool,
    /// The last request, which can only be answered when the session of the same name has ended.
    waiting: Option<LoginRequest>,
}

/// Why a login is refused: what the initiator is told, and what the log is.
struct Refusal {
    status: Status,
    why: String,
}

impl Refusal {
    fn of(status: Status, why: String) -> Self {
        Self { status, why }
    }

    fn unproved(why: &str) -> Self {
        Self::of(Status::AUTHENTICATION_FAILURE, why.to_owned())
    }

    /// Of an initiator that breaks the protocol.
    fn wrong(violation: &Violation) -> Self {
        Self::of(Status::INITIATOR_ERROR, violation.to_string())
    }

    fn violation(self) -> Violation {
        Violation::RefusedLogin { status: self.status, why: self.why }
    }
}

impl Login {
    pub(super) fn new(random: [u8; chap::RANDOM_BYTES]) -> Self {
        Self {
            challenge: Challenge::new(random),
            steps: 0,
            first: None,
            stage: Stage::Security,
            proof: Proof::Open,
            text: TextIn::default(),
            out: TextOut::default(),
            initiator: String::new(),
            access: None,
            discovery: false,
            negotiation: None,
            said_portal: false,
            waiting: None,
        }
    }

    /// Takes over who logs in to what (the first request's text).
    fn identify(&mut self, pairs: &Pairs, target: &Target) -> Result<(), Refusal> {
        let missing = |key: &str| Refusal::of(Status::MISSING_PARAMETER, format!("there is no {key}"));
        let initiator = pairs.value("InitiatorName").ok_or_else(|| missing("InitiatorName"))?;
        if !text::is_peer_name(initiator) {
            let why = format!("{:?} is no iSCSI name: {}", cut(initiator), text::PEER_NAME);
            return Err(Refusal::of(Status::INITIATOR_ERROR, why));
        }
        self.discovery = match pairs.value("SessionType") {
            None | Some("Normal") => false,
            Some("Discovery") => true,
            Some(other) => {
                let why = format!("SessionType={:?} is neither Normal nor Discovery", cut(other));
                return Err(Refusal::of(Status::SESSION_TYPE, why));
            }
        };
        match pairs.value("TargetName") {
            None if !self.discovery => return Err(missing("TargetName")),
            Some(name) if !name.eq_ignore_ascii_case(&target.config.name) => {
                let why = format!("{:?} is asked for, and here is {:?}", cut(name), target.config.name);
                return Err(Refusal::of(Status::NOT_FOUND, why));
            }
            _ => {}
        }
        let fits =
            |access: &&Access| access.initiator.as_deref().is_none_or(|name| name.eq_ignore_ascii_case(initiator));
        let stranger = || {
            let why = format!("{:?} is not on the list of initiators that may log in", cut(initiator));
            Refusal::of(Status::AUTHORIZATION_FAILURE, why)
        };
        let access = target.config.access.iter().find(fits).ok_or_else(stranger)?;
        self.access = Some(access.clone());
        self.initiator = initiator.to_ascii_lowercase();
        self.negotiation = Some(Negotiation::new(target.config.offer.clone(), self.discovery));
        if access.chap.is_none() {
            self.proof = Proof::Done;
        }
        Ok(())
    }

    fn chap(&self) -> Option<&chap::Chap> {
        self.access.as_ref().and_then(|access| access.chap.as_ref())
    }

    /// The security stage (12.1).
    fn secure(&mut self, pairs: &Pairs) -> Result<(), Refusal> {
        for (key, _) in pairs.iter() {
            let declared = matches!(
                key,
                "InitiatorName" | "InitiatorAlias" | "SessionType" | "TargetName" | "AuthMethod" | "TargetAlias"
            );
            if !declared && !key.starts_with("CHAP_") {
                // Operational keys have a stage of their own (6.3.2); others are not understood.
                self.out.push(key, "NotUnderstood");
            }
        }
        if let Some(methods) = pairs.value("AuthMethod") {
            let wanted = if self.chap().is_some() { "CHAP" } else { "None" };
            if self.proof == Proof::Challenged || !methods.split(',').any(|method| method == wanted) {
                return Err(Refusal::unproved(&format!("AuthMethod={:?} where {wanted} is wanted", cut(methods))));
            }
            self.out.push("AuthMethod", wanted);
            if self.chap().is_some() {
                self.proof = Proof::Chap;
            }
        }
        if let Some(algorithms) = pairs.value("CHAP_A") {
            if self.proof != Proof::Chap || !algorithms.split(',').any(|algorithm| algorithm == chap::MD5) {
                return Err(Refusal::unproved(&format!("CHAP_A={:?} where 5 (MD5) is wanted, once", cut(algorithms))));
            }
            self.out.push("CHAP_A", chap::MD5);
            self.challenge.put(&mut self.out);
            self.proof = Proof::Challenged;
        }
        if pairs.value("CHAP_N").is_some() || pairs.value("CHAP_R").is_some() {
            self.prove(pairs)?;
        }
        Ok(())
    }

    fn prove(&mut self, pairs: &Pairs) -> Result<(), Refusal> {
        let (Some(name), Some(response)) = (pairs.value("CHAP_N"), pairs.value("CHAP_R")) else {
            return Err(Refusal::unproved("CHAP_N and CHAP_R come together"));
        };
        let unasked = || Refusal::unproved("an answer to a challenge that was not given");
        let chap = self.chap().cloned().filter(|_| self.proof == Proof::Challenged).ok_or_else(unasked)?;
        // The response is computed whatever the name, so that time does not tell whether the name exists.
        let proved = self.challenge.is_answered_by(&chap.initiator().secret, response);
        if !proved || name != chap.initiator().name {
            let what = if proved { "the CHAP name is another" } else { "the CHAP secret is another" };
            return Err(Refusal::unproved(what));
        }
        match (pairs.value("CHAP_I"), pairs.value("CHAP_C")) {
            (None, None) => {}
            (Some(id), Some(challenge)) => {
                let own = chap.target().ok_or_else(|| {
                    Refusal::unproved(
                        "the initiator wants a proof of the target too, and no secret is configured for that",
                    )
                })?;
                let answer = chap::answer_text(&own.secret, id, challenge, Some(&self.challenge));
                let answer = answer.map_err(|violation| Refusal::unproved(&violation.to_string()))?;
                self.out.push("CHAP_N", &own.name);
                self.out.push("CHAP_R", &answer);
            }
            _ => return Err(Refusal::unproved("CHAP_I and CHAP_C come together")),
        }
        self.proof = Proof::Done;
        Ok(())
    }
}

impl Connection {
    /// A login request's header.
    pub(super) fn login_header<B: AsRef<[u8]>>(
        &mut self,
        header: &Header,
        out: &mut Outbox<B>,
    ) -> Result<Sink, Violation> {
        let Header::LoginRequest(request) = header else {
            self.refuse_login(&LoginRequest::default(), Status::INVALID_REQUEST, out);
            return Err(Violation::OutOfPlace("something else than a login request during login"));
        };
        let Phase::Login(login) = &mut self.phase else { return Err(Violation::Ended) };
        login.steps = login.steps.saturating_add(1);
        if login.steps > MAX_STEPS {
            return Err(Violation::EndlessLogin);
        }
        let Some(first) = login.first else {
            login.first = Some(*request);
            login.stage = Stage::from_raw(request.stage).unwrap_or(Stage::Security);
            self.exp_cmd_sn = request.cmd_sn;
            self.max_cmd_sn = request.cmd_sn.plus(self.queue_depth).minus(1);
            self.cid = request.cid;
            return Ok(Sink::Login);
        };
        let same = first.isid == request.isid && first.tsih == request.tsih && first.cid == request.cid;
        if !same || first.task != request.task {
            self.refuse_login(request, Status::INITIATOR_ERROR, out);
            return Err(Violation::OutOfPlace("a login that changes its name midway"));
        }
        Ok(Sink::Login)
    }

    /// A login request is complete.
    pub(super) fn login_request<B: AsRef<[u8]>>(
        &mut self,
        request: &LoginRequest,
        target: &mut Target,
        out: &mut Outbox<B>,
    ) -> Result<(), Violation> {
        match self.login_step(request, target) {
            Ok(true) => {
                if let Phase::Login(login) = &mut self.phase {
                    login.waiting = Some(*request);
                }
                self.go_on_with_login(target, out);
                Ok(())
            }
            Ok(false) => {
                self.answer_login(request, out);
                Ok(())
            }
            Err(refusal) => {
                self.refuse_login(request, refusal.status, out);
                Err(refusal.violation())
            }
        }
    }

    /// Takes a request into the login's state; whether it asks for the full feature phase and all is ready for it.
    fn login_step(&mut self, request: &LoginRequest, target: &Target) -> Result<bool, Refusal> {
        let collected = std::mem::take(&mut self.collected);
        let Phase::Login(login) = &mut self.phase else { return Err(Refusal::wrong(&Violation::Ended)) };
        let stages = Stage::check(request.transit, request.more, request.stage, request.next_stage);
        let (stage, next) = stages.map_err(|violation| Refusal::wrong(&violation))?;
        if stage != login.stage {
            return Err(Refusal::wrong(&Violation::Malformed("login stages")));
        }
        if request.version_min > 0 {
            let why = format!("version {} at least is wanted, and this is 0", request.version_min);
            return Err(Refusal::of(Status::UNSUPPORTED_VERSION, why));
        }
        if login.steps == 1 && request.tsih != 0 {
            let known = target.has_tsih(request.tsih);
            let status = if known { Status::TOO_MANY_CONNECTIONS } else { Status::NO_SESSION };
            let why = format!("a connection is to be added to session {}, and a session has one", request.tsih);
            return Err(Refusal::of(status, why));
        }
        let too_long = |violation: Violation| Refusal::of(Status::OUT_OF_RESOURCES, violation.to_string());
        login.text.push(&collected).map_err(too_long)?;
        if request.more {
            return Ok(false);
        }
        if !login.out.is_empty() {
            // The initiator asks for the rest of our text: it has nothing to say itself (6.2).
            let wrong =
                || Refusal::wrong(&Violation::OutOfPlace("text while the answer to the text before is not over"));
            return if login.text.is_empty() { Ok(false) } else { Err(wrong()) };
        }
        let pairs = login.text.take().map_err(|violation| Refusal::wrong(&violation))?;
        if login.access.is_none() {
            login.identify(&pairs, target)?;
        }
        match stage {
            Stage::Security => login.secure(&pairs)?,
            _ => {
                if login.proof != Proof::Done {
                    return Err(Refusal::unproved("the initiator goes on without the proof that it owes"));
                }
                let Some(negotiation) = &mut login.negotiation else { return Err(Refusal::wrong(&Violation::Ended)) };
                let agreed = negotiation.handle(&pairs, &mut login.out);
                agreed.map_err(|violation| Refusal::wrong(&violation))?;
                negotiation.declare(&mut login.out);
            }
        }
        if !login.said_portal {
            login.said_portal = true;
            login.out.push("TargetPortalGroupTag", &target.config.portal_group.to_string());
        }
        let full = next == Some(Stage::FullFeature) && login.proof == Proof::Done;
        Ok(full)
    }

    /// Answers a request that does not end the login.
    fn answer_login<B: AsRef<[u8]>>(&mut self, request: &LoginRequest, out: &mut Outbox<B>) {
        let Phase::Login(login) = &mut self.phase else { return };
        let (piece, more) =
            if request.more { (Vec::new(), false) } else { login.out.next_piece(DEFAULT_MAX_SEGMENT as usize) };
        let next = Stage::from_raw(request.next_stage).unwrap_or(Stage::Security);
        let transit = request.transit && !more && login.proof == Proof::Done && next != Stage::FullFeature;
        if transit {
            login.stage = next;
        }
        let response = LoginResponse {
            transit,
            more,
            next_stage: if transit { request.next_stage } else { 0 },
            ..self.login_response(request, Status::SUCCESS)
        };
        self.put_login(&response, &piece, out);
    }

    fn login_response(&mut self, request: &LoginRequest, status: Status) -> LoginResponse {
        let stat_sn = self.next_stat_sn();
        LoginResponse {
            stage: request.stage,
            isid: request.isid,
            tsih: request.tsih,
            task: request.task,
            stat_sn,
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
            status_class: status.class,
            status_detail: status.detail,
            ..LoginResponse::default()
        }
    }

    fn put_login<B: AsRef<[u8]>>(&mut self, response: &LoginResponse, data: &[u8], out: &mut Outbox<B>) {
        out.put(|bytes| pdu::put(bytes, &(*response).into(), data, Digests::default()));
    }

    fn refuse_login<B: AsRef<[u8]>>(&mut self, request: &LoginRequest, status: Status, out: &mut Outbox<B>) {
        let response = self.login_response(request, status);
        self.put_login(&response, &[], out);
    }

    fn refuse_and_close<B: AsRef<[u8]>>(&mut self, request: &LoginRequest, refusal: Refusal, out: &mut Outbox<B>) {
        self.refuse_login(request, refusal.status, out);
        self.refusal = Some(refusal.violation());
        self.close(None);
    }

    /// Whether the login's last answer waits for another session to end: no input is taken then.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(&self.phase, Phase::Login(login) if login.waiting.is_some())
    }

    /// Ends the login, if its last request is there and the session of the same name has gone (7.3.5).
    pub(super) fn go_on_with_login<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        let Phase::Login(login) = &mut self.phase else { return };
        let Some(request) = login.waiting else { return };
        if !login.discovery
            && let Some(old) = target.session_of(&login.initiator, request.isid)
        {
            target.wait(self.id);
            target.end(old, Farewell::Reinstated);
            return;
        }
        login.waiting = None;
        if target.is_shutting_down() || (!login.discovery && target.is_full()) {
            let refusal = if target.is_shutting_down() {
                Refusal::of(Status::UNAVAILABLE, "the target is shutting down".to_owned())
            } else {
                let why =
                    format!("there are {} sessions, which is all that there may be", target.config.limits.sessions);
                Refusal::of(Status::OUT_OF_RESOURCES, why)
            };
            return self.refuse_and_close(&request, refusal, out);
        }
        let params = login.negotiation.as_ref().map_or(Err(Violation::Ended), Negotiation::finish);
        let params = match params {
            Ok(params) => params,
            Err(violation) => return self.refuse_and_close(&request, Refusal::wrong(&violation), out),
        };
        let (piece, more) = login.out.next_piece(DEFAULT_MAX_SEGMENT as usize);
        debug_assert!(!more, "the answers to one round of keys are far shorter than a segment");
        let (initiator, discovery) = (std::mem::take(&mut login.initiator), login.discovery);
        let tsih = if discovery { 1 } else { target.register(self.id, &initiator, request.isid) };
        let response = LoginResponse {
            transit: true,
            next_stage: Stage::FullFeature.raw(),
            tsih,
            ..self.login_response(&request, Status::SUCCESS)
        };
        self.put_login(&response, &piece, out);
        self.decoder.set_negotiated(params.digests, params.max_receive);
        (self.params, self.discovery, self.phase) = (params, discovery, Phase::FullFeature);
        self.resets = target.resets();
        self.events.push_back(Event::LoggedIn { initiator, discovery });
    }
}
