//! The login phase at the target (6.3, 11.12, 12).

use super::{Access, Connection, Event, Farewell, Outbox, Phase, Sink, Target};
use crate::chap::{self, Challenge};
use crate::error::Violation;
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
    fn identify(&mut self, pairs: &Pairs, target: &Target) -> Result<(), Status> {
        let initiator = pairs.value("InitiatorName").ok_or(Status::MISSING_PARAMETER)?;
        if !text::is_name(initiator) {
            return Err(Status::INITIATOR_ERROR);
        }
        self.discovery = match pairs.value("SessionType") {
            None | Some("Normal") => false,
            Some("Discovery") => true,
            Some(_) => return Err(Status::SESSION_TYPE),
        };
        match pairs.value("TargetName") {
            None if !self.discovery => return Err(Status::MISSING_PARAMETER),
            Some(name) if !name.eq_ignore_ascii_case(&target.config.name) => return Err(Status::NOT_FOUND),
            _ => {}
        }
        let fits =
            |access: &&Access| access.initiator.as_deref().is_none_or(|name| name.eq_ignore_ascii_case(initiator));
        let access = target.config.access.iter().find(fits).ok_or(Status::AUTHORIZATION_FAILURE)?;
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
    fn secure(&mut self, pairs: &Pairs) -> Result<(), Status> {
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
                return Err(Status::AUTHENTICATION_FAILURE);
            }
            self.out.push("AuthMethod", wanted);
            if self.chap().is_some() {
                self.proof = Proof::Chap;
            }
        }
        if let Some(algorithms) = pairs.value("CHAP_A") {
            if self.proof != Proof::Chap || !algorithms.split(',').any(|algorithm| algorithm == chap::MD5) {
                return Err(Status::AUTHENTICATION_FAILURE);
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

    fn prove(&mut self, pairs: &Pairs) -> Result<(), Status> {
        let failed = Status::AUTHENTICATION_FAILURE;
        let (Some(name), Some(response)) = (pairs.value("CHAP_N"), pairs.value("CHAP_R")) else { return Err(failed) };
        let chap = self.chap().cloned().filter(|_| self.proof == Proof::Challenged).ok_or(failed)?;
        // The response is computed whatever the name, so that time does not tell whether the name exists.
        let proved = self.challenge.is_answered_by(&chap.initiator().secret, response);
        if !proved || name != chap.initiator().name {
            return Err(failed);
        }
        match (pairs.value("CHAP_I"), pairs.value("CHAP_C")) {
            (None, None) => {}
            (Some(id), Some(challenge)) => {
                let own = chap.target().ok_or(failed)?;
                let answer =
                    chap::answer_text(&own.secret, id, challenge, Some(&self.challenge)).map_err(|_| failed)?;
                self.out.push("CHAP_N", &own.name);
                self.out.push("CHAP_R", &answer);
            }
            _ => return Err(failed),
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
            Err(status) => {
                self.refuse_login(request, status, out);
                Err(Violation::LoginRefused { status })
            }
        }
    }

    /// Takes a request into the login's state; whether it asks for the full feature phase and all is ready for it.
    fn login_step(&mut self, request: &LoginRequest, target: &Target) -> Result<bool, Status> {
        let collected = std::mem::take(&mut self.collected);
        let Phase::Login(login) = &mut self.phase else { return Err(Status::TARGET_ERROR) };
        let stages = Stage::check(request.transit, request.more, request.stage, request.next_stage);
        let (stage, next) = stages.map_err(|_| Status::INITIATOR_ERROR)?;
        if stage != login.stage {
            return Err(Status::INITIATOR_ERROR);
        }
        if request.version_min > 0 {
            return Err(Status::UNSUPPORTED_VERSION);
        }
        if login.steps == 1 && request.tsih != 0 {
            let known = target.has_tsih(request.tsih);
            return Err(if known { Status::TOO_MANY_CONNECTIONS } else { Status::NO_SESSION });
        }
        login.text.push(&collected).map_err(|_| Status::OUT_OF_RESOURCES)?;
        if request.more {
            return Ok(false);
        }
        if !login.out.is_empty() {
            // The initiator asks for the rest of our text: it has nothing to say itself (6.2).
            return if login.text.is_empty() { Ok(false) } else { Err(Status::INITIATOR_ERROR) };
        }
        let pairs = login.text.take().map_err(|_| Status::INITIATOR_ERROR)?;
        if login.access.is_none() {
            login.identify(&pairs, target)?;
        }
        match stage {
            Stage::Security => login.secure(&pairs)?,
            _ => {
                if login.proof != Proof::Done {
                    return Err(Status::AUTHENTICATION_FAILURE);
                }
                let negotiation = login.negotiation.as_mut().ok_or(Status::TARGET_ERROR)?;
                negotiation.handle(&pairs, &mut login.out).map_err(|_| Status::INITIATOR_ERROR)?;
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
            let status = if target.is_shutting_down() { Status::UNAVAILABLE } else { Status::OUT_OF_RESOURCES };
            self.refuse_login(&request, status, out);
            self.close(None);
            return;
        }
        let Some(Ok(params)) = login.negotiation.as_ref().map(Negotiation::finish) else {
            self.refuse_login(&request, Status::INITIATOR_ERROR, out);
            self.close(None);
            return;
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
