//! Logins, and what sessions do to each other.

use super::world::*;
use crate::chap::{self, Chap, Credentials, Secret};
use crate::pdu::*;
use crate::serial::Serial;
use crate::target::*;
use crate::text::{Pairs, binary, to_hexadecimal};

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

fn credentials(name: &str, text: &str) -> Credentials {
    Credentials { name: name.into(), secret: secret(text) }
}

fn with_chap(mutual: bool) -> Config {
    let target = mutual.then(|| credentials("the target", "another secret of it"));
    let chap = Chap::new(credentials("the initiator", "a secret of some length"), target).unwrap();
    Config { access: vec![Access { initiator: Some(INITIATOR.into()), chap: Some(chap) }], ..config() }
}

fn answer_of(answers: &Answers) -> (LoginResponse, Pairs) {
    let (Header::LoginResponse(response), data) = answers.last().unwrap() else { panic!("{answers:?}") };
    (*response, Pairs::parse(data).unwrap())
}

/// The status of a login that was refused, and the reason for the log.
fn refused<T: std::fmt::Debug>(result: Result<T, crate::Violation>) -> (crate::login::Status, String) {
    match result {
        Err(crate::Violation::RefusedLogin { status, why }) => (status, why),
        other => panic!("not refused: {other:?}"),
    }
}

fn names() -> String {
    format!("InitiatorName={INITIATOR}\0TargetName={NAME}\0SessionType=Normal\0")
}

/// Runs the security stage; `answer` makes the text that answers CHAP_I and CHAP_C.
fn authenticate(
    world: &mut World,
    end: &mut End,
    answer: impl Fn(u8, &[u8]) -> String,
) -> Result<(LoginResponse, Pairs), crate::Violation> {
    end.login(world, 1, 0, 0, &(names() + "AuthMethod=CHAP,None\0"))?;
    let (_, pairs) = answer_of(&end.login(world, 1, 0, 0, "CHAP_A=7,5\0")?);
    assert_eq!(pairs.value("CHAP_A"), Some("5"));
    let id: u8 = pairs.value("CHAP_I").unwrap().parse().unwrap();
    let challenge = binary(pairs.value("CHAP_C").unwrap(), 1024).unwrap();
    let answers = end.login(world, 1, 0, 1, &answer(id, &challenge))?;
    Ok(answer_of(&answers))
}

fn proof(id: u8, challenge: &[u8], text: &str) -> String {
    let response = chap::answer(id, &secret(text), challenge);
    format!("CHAP_N=the initiator\0CHAP_R={}\0", to_hexadecimal(&response))
}

#[test]
fn chap_lets_in_who_knows_the_secret() {
    let mut world = World::new(with_chap(false));
    let mut end = world.connect(7);
    let right = |id, challenge: &[u8]| proof(id, challenge, "a secret of some length");
    let (response, _) = authenticate(&mut world, &mut end, right).unwrap();
    assert!(response.transit && response.next_stage == 1 && response.status_class == 0);
    let (response, pairs) = answer_of(&end.login(&mut world, 1, 1, 3, "MaxBurstLength=65536\0").unwrap());
    assert!(response.transit && response.tsih != 0);
    assert_eq!(pairs.value("MaxBurstLength"), Some("65536"));
    assert_eq!(pairs.value("MaxRecvDataSegmentLength"), Some("262144"));
    assert!(matches!(&end.events[..], [Event::LoggedIn { discovery: false, .. }]));
}

#[test]
fn chap_keeps_out_who_does_not() {
    let failed = crate::login::Status::AUTHENTICATION_FAILURE;
    type Answer<'a> = &'a dyn Fn(u8, &[u8]) -> String;
    let cases: [Answer<'_>; 5] = [
        &|id, challenge| proof(id, challenge, "a secret of some lengtH"),
        &|id, challenge| proof(id, challenge, "a secret of some length").replace("the initiator", "somebody"),
        &|_, _| "CHAP_N=the initiator\0".into(),
        &|_, _| "CHAP_N=the initiator\0CHAP_R=0x00\0".into(),
        // Mutual CHAP that the target has no secret for.
        &|id, challenge| {
            proof(id, challenge, "a secret of some length") + "CHAP_I=1\0CHAP_C=0x00112233445566778899aabbccddeeff\0"
        },
    ];
    for case in cases {
        let mut world = World::new(with_chap(false));
        let mut end = world.connect(7);
        assert_eq!(refused(authenticate(&mut world, &mut end, case)).0, failed);
        let refusal = end.answers();
        assert_eq!(answer_of(&refusal).0.status_detail, 1);
        assert_eq!(world.target.initiators().count(), 0);
    }
    // Leaving the proof out, or the whole stage.
    for (stage, next, text) in
        [(0, 1, "AuthMethod=None\0"), (1, 3, "MaxBurstLength=65536\0"), (0, 3, "AuthMethod=CHAP\0")]
    {
        let mut world = World::new(with_chap(false));
        let mut end = world.connect(7);
        let result = end.login(&mut world, 1, stage, next, &(names() + text));
        match result {
            Err(violation) => assert_eq!(refused::<()>(Err(violation)).0, failed),
            Ok(answers) => assert!(!answer_of(&answers).0.transit),
        }
        assert!(!end.connection.is_logged_in());
    }
}

#[test]
fn mutual_chap_proves_the_target_and_reflection_is_refused() {
    let mut world = World::new(with_chap(true));
    let mut end = world.connect(7);
    let theirs = [0x5a; 16];
    let asked = |id, challenge: &[u8]| {
        proof(id, challenge, "a secret of some length") + &format!("CHAP_I=9\0CHAP_C={}\0", to_hexadecimal(&theirs))
    };
    let (_, pairs) = authenticate(&mut world, &mut end, asked).unwrap();
    let expected = to_hexadecimal(&chap::answer(9, &secret("another secret of it"), &theirs));
    assert_eq!((pairs.value("CHAP_N"), pairs.value("CHAP_R")), (Some("the target"), Some(&expected[..])));
    let mut end = world.connect(8);
    let reflected = |id: u8, challenge: &[u8]| {
        let own = format!("CHAP_I={id}\0CHAP_C={}\0", to_hexadecimal(challenge));
        proof(id, challenge, "a secret of some length") + &own
    };
    assert!(authenticate(&mut world, &mut end, reflected).is_err());
    // One secret for both directions cannot even be configured.
    let one = || credentials("x", "a secret of some length");
    assert_eq!(Chap::new(one(), Some(one())), Err(chap::SecretError::SameBothWays));
    assert!(Secret::new("eleven byte").is_err_and(|error| error == chap::SecretError::Length(11)));
}

/// CVE-2024-45751: challenges that repeat.
#[test]
fn each_connection_is_challenged_with_its_own_random_bytes() {
    let mut world = World::new(with_chap(false));
    let mut challenges = Vec::new();
    for random in [7, 8] {
        let mut end = world.connect(random);
        let _ = authenticate(&mut world, &mut end, |id, challenge| {
            assert_eq!((id, challenge), (random, &[random; 32][..]));
            String::new()
        });
        challenges.push(random);
        // A second challenge on the same connection, which would be the same, is not to be had.
        let mut end = world.connect(random);
        end.login(&mut world, 1, 0, 0, &(names() + "AuthMethod=CHAP\0")).unwrap();
        end.login(&mut world, 1, 0, 0, "CHAP_A=5\0").unwrap();
        assert!(end.login(&mut world, 1, 0, 0, "CHAP_A=5\0").is_err());
    }
}

#[test]
fn logins_are_refused_with_the_reason() {
    use crate::login::Status;
    let mut world =
        World::new(Config { access: vec![Access { initiator: Some(INITIATOR.into()), chap: None }], ..config() });
    let other = names().replace("initiator", "other");
    let bad_name = |name: &str| names().replace(INITIATOR, name);
    for (text, status, reason) in [
        (names().replace(":test", ":best"), Status::NOT_FOUND, "\"iqn.2026-11.dev.decant:best\" is asked for"),
        (other, Status::AUTHORIZATION_FAILURE, "\"iqn.2026-11.dev.decant:other\" is not on the list"),
        ("TargetName=x\0".into(), Status::MISSING_PARAMETER, "there is no InitiatorName"),
        (format!("InitiatorName={INITIATOR}\0"), Status::MISSING_PARAMETER, "there is no TargetName"),
        (names().replace("iqn.", "IQN "), Status::INITIATOR_ERROR, "they begin with iqn., eui. or naa."),
        (bad_name("iqn.2026-11.dev.decant:two words"), Status::INITIATOR_ERROR, "neither spaces nor"),
        (bad_name("iqn.2026-11.dev.decant:a,b"), Status::INITIATOR_ERROR, "is no iSCSI name"),
        (names().replace("Normal", "Odd"), Status::SESSION_TYPE, "SessionType=\"Odd\""),
        (names() + "MaxBurstLength=12\0", Status::INITIATOR_ERROR, "MaxBurstLength=12 is not acceptable"),
        (names() + "HeaderDigest=SHA\0", Status::INITIATOR_ERROR, "HeaderDigest=SHA is not acceptable"),
    ] {
        let mut end = world.connect(1);
        let (found, why) = refused(end.login(&mut world, 1, 1, 3, &text));
        assert_eq!(found, status, "{text}");
        assert!(why.contains(reason), "{why}, not {reason}");
    }
}

/// QEMU puts the name of the machine into its initiator's, and others that of the host.
#[test]
fn names_as_tools_write_them_are_let_in() {
    for name in
        ["iqn.2008-11.org.linux-kvm:my_vm", "iqn.1991-05.com.microsoft:HOST_1.corp", "iqn.2026-11.dev.decant:a+b@c"]
    {
        let access = Access { initiator: Some(name.to_ascii_lowercase()), chap: None };
        let mut world = World::new(Config { access: vec![access], ..config() });
        let mut end = world.connect(1);
        let answers = end.login(&mut world, 1, 1, 3, &names().replace(INITIATOR, name)).unwrap();
        assert!(answer_of(&answers).0.transit, "{name}");
    }
}

#[test]
fn discovery_names_the_target_and_does_nothing_else() {
    let mut world = World::new(config());
    let mut end = world.connect(1);
    let text = format!("InitiatorName={INITIATOR}\0SessionType=Discovery\0MaxBurstLength=512\0");
    let (_, pairs) = answer_of(&end.login(&mut world, 1, 1, 3, &text).unwrap());
    assert_eq!(pairs.value("MaxBurstLength"), Some("Irrelevant"));
    let ask = TextRequest { is_final: true, transfer: NO_TAG, cmd_sn: Serial(1), task: 9, ..TextRequest::default() };
    let answers = end.send(&mut world, ask, b"SendTargets=All\0").unwrap();
    let (Header::TextResponse(response), data) = &answers[0] else { panic!("{answers:?}") };
    assert!(response.is_final && response.transfer == NO_TAG);
    assert_eq!(String::from_utf8_lossy(data), format!("TargetName={NAME}\0TargetAddress=192.0.2.1:3260,1\0"));
    let command = ScsiCommand { cmd_sn: Serial(2), is_final: true, ..ScsiCommand::default() };
    assert!(end.send(&mut world, command, &[]).is_err());
}

#[test]
fn commands_outside_of_the_window_are_passed_over() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let ready = end.request(&[0], 0, &[]);
    for wrong in [ready.cmd_sn.minus(1), ready.cmd_sn.plus(8), ready.cmd_sn.plus(1 << 30)] {
        let late = ScsiCommand { cmd_sn: wrong, ..ready };
        assert!(end.send(&mut world, late, &[]).unwrap().is_empty());
    }
    assert_eq!(end.send(&mut world, ready, &[]).unwrap().len(), 1);
    // The window closes when it is full, and opens when something ends.
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    for _ in 0..9 {
        let request = end.request(&read, 512, &[]);
        assert!(end.send(&mut world, request, &[]).unwrap().is_empty());
    }
    assert_eq!(end.requests.len(), 8);
    end.perform(&mut world, 0);
    let answers = end.answers();
    let (Header::DataIn(data), _) = &answers[0] else { panic!("{answers:?}") };
    assert_eq!(data.max_cmd_sn, data.exp_cmd_sn);
}

#[test]
fn an_aborted_write_is_answered_by_nobody_and_the_abort_waits_for_it() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let request = end.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0, &[1; 512]);
    end.send(&mut world, request, &[1; 512]).unwrap();
    let abort = |referenced| TaskRequest {
        immediate: true,
        function: task_function::ABORT_TASK,
        task: 0x77,
        referenced,
        ..TaskRequest::default()
    };
    assert!(end.send(&mut world, abort(request.task), &[]).unwrap().is_empty());
    assert!(matches!(end.events[..], [.., Event::Abort(task)] if task == end.requests[0].0), "{:?}", end.events);
    end.perform_all(&mut world);
    let answers = end.answers();
    assert!(
        matches!(answers[..], [(Header::TaskResponse(TaskResponse { response: 0, task: 0x77, .. }), _)]),
        "{answers:?}"
    );
    let answers = end.send(&mut world, abort(request.task), &[]).unwrap();
    assert!(matches!(answers[..], [(Header::TaskResponse(TaskResponse { response: 1, .. }), _)]));
    // One that still waits for its data is gone at once, and its data are passed over.
    let request = end.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0], 0, &[1; 1024]);
    end.send(&mut world, request, &[1; 512]).unwrap();
    assert_eq!(end.send(&mut world, abort(request.task), &[]).unwrap().len(), 1);
    assert!(end.events.iter().any(|event| matches!(event, Event::Forget(_))));
    let late = DataOut { is_final: true, task: request.task, transfer: 1, offset: 512, ..DataOut::default() };
    assert!(end.send(&mut world, late, &[1; 512]).unwrap().is_empty());
    assert!(end.requests.is_empty());
}

#[test]
fn a_reset_waits_for_every_session_and_is_told_to_the_others() {
    let mut world = World::new(config());
    let (mut one, mut two) = (world.session(1), world.session(2));
    let request = two.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0, &[1; 512]);
    two.send(&mut world, request, &[1; 512]).unwrap();
    let reset = TaskRequest { immediate: true, function: task_function::LUN_RESET, task: 5, ..TaskRequest::default() };
    assert!(one.send(&mut world, reset, &[]).unwrap().is_empty());
    world.wake(&mut [&mut one, &mut two]);
    assert!(one.answers().is_empty());
    two.perform_all(&mut world);
    assert!(two.answers().is_empty(), "nobody hears of a task that was reset away");
    world.wake(&mut [&mut one, &mut two]);
    let answers = one.answers();
    assert!(matches!(answers[..], [(Header::TaskResponse(TaskResponse { response: 0, .. }), _)]), "{answers:?}");
    assert_eq!(status(&two.command(&mut world, &[0], 0, &[])), (2, 6, 0x2903));
    assert_eq!(status(&two.command(&mut world, &[0], 0, &[])), (0, 0, 0));
    assert_eq!(status(&one.command(&mut world, &[0], 0, &[])), (0, 0, 0));
}

#[test]
fn a_cold_reset_ends_all_sessions() {
    let mut world = World::new(config());
    let (mut one, mut two) = (world.session(1), world.session(2));
    let reset = TaskRequest { immediate: true, function: task_function::COLD_RESET, task: 5, ..TaskRequest::default() };
    one.send(&mut world, reset, &[]).unwrap();
    world.wake(&mut [&mut one, &mut two]);
    for end in [&mut one, &mut two] {
        assert!(end.events.contains(&Event::Close(Some(Farewell::ColdReset))), "{:?}", end.events);
    }
}

#[test]
fn a_session_is_reinstated_when_the_old_one_has_nothing_running() {
    let mut world = World::new(config());
    let mut old = world.session(1);
    let request = old.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0, &[1; 512]);
    old.send(&mut world, request, &[1; 512]).unwrap();
    let mut new = world.connect(2);
    assert!(new.login(&mut world, 1, 1, 3, &names()).unwrap().is_empty());
    world.wake(&mut [&mut old, &mut new]);
    assert!(old.events.contains(&Event::Close(Some(Farewell::Reinstated))));
    old.connection.handle_disconnect(&mut world.target);
    world.wake(&mut [&mut new]);
    assert!(new.answers().is_empty(), "the old session's write could still land");
    old.perform_all(&mut world);
    world.wake(&mut [&mut new]);
    let answers = new.answers();
    assert!(answer_of(&answers).0.transit);
    // It is the same initiator port, so nothing was powered on for it.
    assert_eq!(status(&new.command(&mut world, &[0], 0, &[])), (0, 0, 0));
}

/// LIO shows a grown disk only after a rescan; here initiators hear of it.
#[test]
fn a_grown_disk_is_told_as_a_unit_attention() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    world.target.resize(BLOCKS * 2);
    // INQUIRY and REPORT LUNS do not take it.
    assert_eq!(status(&end.command(&mut world, &[0x12, 0, 0, 0, 96, 0], 96, &[])), (0, 0, 0));
    assert_eq!(status(&end.command(&mut world, &[0], 0, &[])), (2, 6, 0x2a09));
    let answers = end.command(&mut world, &[0x25], 8, &[]);
    assert_eq!(answers[0].1[..4], (BLOCKS as u32 * 2 - 1).to_be_bytes());
}

#[test]
fn a_reservation_keeps_others_out_and_goes_with_its_session() {
    let mut world = World::new(config());
    let (mut one, mut two) = (world.session(1), world.session(2));
    assert_eq!(status(&one.command(&mut world, &[0x16], 0, &[])).0, 0);
    let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(status(&two.command(&mut world, &write, 0, &[1; 512])).0, 0x18);
    assert_eq!(status(&two.command(&mut world, &[0], 0, &[])).0, 0x18);
    assert_eq!(status(&two.command(&mut world, &[0x12, 0, 0, 0, 96, 0], 96, &[])).0, 0);
    assert_eq!(world.medium[0], 0);
    // A write that came while it was reserved, and whose data came later, is written then.
    let late = two.request(&write, 0, &[1; 512]);
    let answers = two.send(&mut world, late, &[]).unwrap();
    let Some((Header::ReadyToTransfer(r2t), _)) = answers.last() else { panic!("{answers:?}") };
    one.connection.handle_disconnect(&mut world.target);
    let out = DataOut { is_final: true, task: late.task, transfer: r2t.transfer, ..DataOut::default() };
    two.send(&mut world, out, &[1; 512]).unwrap();
    two.perform_all(&mut world);
    assert_eq!((status(&two.answers()).0, world.medium[0]), (0, 1));
}

#[test]
fn a_silent_initiator_is_pinged_and_then_given_up() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let mut tick = |end: &mut End, now| end.connection.handle_tick(&mut world.target, now, &mut end.out);
    tick(&mut end, 0).unwrap();
    tick(&mut end, 10_000).unwrap();
    assert!(end.answers().is_empty());
    tick(&mut end, 10_001).unwrap();
    let answers = end.answers();
    let (Header::NopIn(ping), _) = &answers[0] else { panic!("{answers:?}") };
    assert!(ping.task == NO_TAG && ping.transfer != NO_TAG);
    assert!(tick(&mut end, 20_001).is_ok());
    assert!(tick(&mut end, 20_002).is_err());
}

/// What was left over comes again with every call: it is no sign of life.
#[test]
fn an_initiator_that_stops_in_the_midst_of_a_header_is_given_up() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    end.connection.handle_tick(&mut world.target, 0, &mut end.out).unwrap();
    let half = [0u8; 30];
    let mut result = Ok(());
    for now in (500..60_000).step_by(500) {
        let step = end.connection.handle_input(&mut world.target, &half[..(now / 500).min(30)], &mut end.out).unwrap();
        assert_eq!(step.consumed, 0);
        result = end.connection.handle_tick(&mut world.target, now as u64, &mut end.out);
        if result.is_err() {
            // The last byte that was new came after 15 s.
            assert!((34_000..38_000).contains(&now), "{now}");
            break;
        }
        end.answers();
    }
    assert!(result.is_err());
}

/// A slow network is no dead one: what is before the ping has to be sent first.
#[test]
fn a_ping_has_its_time_from_when_it_is_out() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let read = end.request(&[0x28, 0, 0, 0, 0, 0, 0, 0, 200, 0], 102_400, &[]);
    end.send(&mut world, read, &[]).unwrap();
    end.connection.handle_tick(&mut world.target, 0, &mut end.out).unwrap();
    end.connection.handle_tick(&mut world.target, 1000, &mut end.out).unwrap();
    end.perform_all(&mut world);
    let mut tick = |end: &mut End, now| end.connection.handle_tick(&mut world.target, now, &mut end.out);
    let before = end.out.len();
    tick(&mut end, 12_000).unwrap();
    assert!(end.out.len() > before, "a ping is behind the data");
    let mut now = 12_000;
    while !end.out.is_empty() {
        end.out.advance(5000);
        now += 9000;
        tick(&mut end, now).unwrap();
    }
    assert!(now > 100_000);
    tick(&mut end, now + 10_000).unwrap();
    assert!(tick(&mut end, now + 10_001).is_err());
    // And where nothing of it is taken, its time is up as ever.
    let mut end = world.session(2);
    let mut tick = |end: &mut End, now| end.connection.handle_tick(&mut world.target, now, &mut end.out);
    tick(&mut end, 0).unwrap();
    tick(&mut end, 1000).unwrap();
    end.out.put(|bytes| bytes.extend([0; 100]));
    tick(&mut end, 12_000).unwrap();
    tick(&mut end, 22_000).unwrap();
    assert!(tick(&mut end, 22_001).is_err());
}

/// CVE-2024-7409: sockets that connect and say nothing are not kept.
#[test]
fn a_connection_that_never_logs_in_is_given_up() {
    let mut world = World::new(config());
    let mut end = world.connect(1);
    end.connection.handle_tick(&mut world.target, 5, &mut end.out).unwrap();
    assert!(end.connection.handle_tick(&mut world.target, 10_006, &mut end.out).is_err());
}

#[test]
fn a_ping_is_answered_with_its_data() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let nop = NopOut { immediate: true, is_final: true, task: 3, transfer: NO_TAG, ..NopOut::default() };
    let answers = end.send(&mut world, nop, b"hello").unwrap();
    assert!(matches!(&answers[..], [(Header::NopIn(NopIn { task: 3, .. }), data)] if data == b"hello"));
}

#[test]
fn a_logout_is_answered_and_ends_the_connection() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let logout = LogoutRequest { immediate: true, task: 4, ..LogoutRequest::default() };
    let answers = end.send(&mut world, logout, &[]).unwrap();
    assert!(matches!(answers[..], [(Header::LogoutResponse(LogoutResponse { response: 0, .. }), _)]));
    assert_eq!(end.events.last(), Some(&Event::Close(None)));
    end.connection.handle_disconnect(&mut world.target);
    assert_eq!(world.target.initiators().count(), 0);
}

#[test]
fn logouts_without_end_are_refused() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let request = end.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 0, &[1; 512]);
    end.send(&mut world, request, &[1; 512]).unwrap();
    let mut rejects = 0;
    for task in 0..1000 {
        let logout = LogoutRequest { immediate: true, task: 0x1000 + task, ..LogoutRequest::default() };
        let answers = end.send(&mut world, logout, &[]).unwrap();
        rejects += answers.len();
        assert!(answers.iter().all(|(header, _)| {
            matches!(header, Header::Reject(reject) if reject.reason == reject_reason::IMMEDIATE)
        }));
    }
    assert_eq!(rejects, 1000 - 8, "so many are kept until the write has ended");
    end.perform_all(&mut world);
    assert!(matches!(end.answers()[..], [(Header::LogoutResponse(LogoutResponse { task: 0x1000, .. }), _)]));
}

#[test]
fn there_are_so_many_sessions_and_no_more() {
    let mut world = World::new(config());
    let _kept = [world.session(1), world.session(2), world.session(3)];
    let mut end = world.connect(4);
    let answers = end.login(&mut world, 4, 1, 3, &names()).unwrap();
    assert_eq!((answer_of(&answers).0.status_class, answer_of(&answers).0.status_detail), (3, 2));
    assert_eq!(end.events, [Event::Close(None)]);
    assert!(end.connection.refusal().unwrap().to_string().contains("there are 3 sessions"));
}
