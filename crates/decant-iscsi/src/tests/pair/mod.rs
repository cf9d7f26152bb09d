//! Both roles over a network that fails, in virtual time.

mod network;

use crate::chap::{Chap, Credentials, Secret};
use crate::error::Violation;
use crate::initiator::{Config, Initiator};
use crate::login::{DigestPolicy, Offer};
use crate::scsi::Disk;
use crate::serial::Serial;
use crate::target::{Access, Limits, Target};
use network::{Ask, Faults, Network, Random};

const TARGET: &str = "iqn.2026-11.dev.decant:pair";
const INITIATOR: &str = "iqn.2026-11.dev.decant:reader";
/// Ten minutes of virtual time are more than any run needs.
const UNTIL: u64 = 600_000;

fn disk() -> Disk {
    Disk {
        vendor: "DECANT".into(),
        product: "PAIR".into(),
        revision: "1".into(),
        serial: "pair-1".into(),
        block_bytes: 512,
        physical_exponent: 3,
        blocks: 2048,
        read_only: true,
        thin: true,
        max_transfer: 256 * 1024,
        digests: true,
    }
}

fn credentials(name: &str, secret: &str) -> Credentials {
    Credentials { name: name.into(), secret: Secret::new(secret).unwrap() }
}

fn mutual() -> Chap {
    Chap::new(credentials("reader", "a secret of the reader"), Some(credentials("server", "another of the server")))
        .unwrap()
}

/// What a run is like.
struct Shape {
    disk: Disk,
    chap: Option<Chap>,
    digests: DigestPolicy,
    segment: u32,
    depth: u32,
    faults: Faults,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            disk: disk(),
            chap: None,
            digests: DigestPolicy::Preferred,
            segment: 65_536,
            depth: 8,
            faults: Faults::default(),
        }
    }
}

fn target(shape: &Shape) -> Target {
    let config = crate::target::Config {
        name: TARGET.into(),
        addresses: Vec::new(),
        portal_group: 1,
        access: vec![Access { initiator: Some(INITIATOR.into()), chap: shape.chap.clone() }],
        offer: Offer::default(),
        limits: Limits { queue_depth: shape.depth, ping_after_ms: 3000, ping_timeout_ms: 3000, ..Limits::default() },
    };
    Target::new(config, shape.disk.clone())
}

fn initiator_config(shape: &Shape) -> Config {
    Config {
        initiator: INITIATOR.into(),
        target: TARGET.into(),
        lun: 0,
        isid: [0x80, 1, 2, 3, 0, 0],
        chap: shape.chap.clone(),
        offer: Offer {
            header_digest: shape.digests,
            data_digest: shape.digests,
            max_receive: shape.segment,
            ..Offer::default()
        },
        max_outstanding: 16,
        first_cmd_sn: Serial(u32::MAX - 5),
        ping_after_ms: 1000,
        ping_timeout_ms: 1000,
        command_timeout_ms: 60_000,
    }
}

fn network(seed: u64, shape: &Shape) -> Network {
    Network::new(seed, target(shape), Initiator::new(initiator_config(shape)), shape.faults)
}

/// Asks for `count` things at random, and has all of them.
fn soak(seed: u64, count: u64, shape: &Shape) -> Network {
    let mut network = network(seed, shape);
    let (block, blocks) = (u64::from(shape.disk.block_bytes), shape.disk.blocks);
    for tag in 0..count {
        let granules = shape.disk.bytes() / 4096;
        let ask = match network.below(8) {
            0 => Ask::Status(network.below(blocks) * block),
            1 => {
                let first = network.below(granules);
                Ask::Digests(first * 4096, (1 + network.below((granules - first).min(64))) as u32 * 4096)
            }
            _ => {
                let first = network.below(blocks);
                let most = (blocks - first).min(u64::from(shape.disk.max_transfer) / block / 2);
                Ask::Read(first * block, (1 + network.below(most)) as u32 * block as u32)
            }
        };
        network.ask(tag, ask);
    }
    let done = network.run(UNTIL, |network| network.owed.is_empty());
    assert!(done, "seed {seed}: {} unanswered, {:?}", network.owed.len(), network.violations);
    network
}

#[test]
fn everything_is_read_over_a_network_without_faults() {
    for seed in 0..20 {
        let network = soak(seed, 60, &Shape::default());
        assert_eq!((network.sessions, network.violations.len()), (1, 0), "seed {seed}");
        assert!(network.initiator.params().digests.header && network.initiator.params().digests.data);
        let device = network.device();
        assert_eq!((device.bytes(), device.block_bytes, device.max_transfer), (1 << 20, 512, 262_144));
        assert!(device.holes && device.digests && !device.short_commands);
        assert_eq!((device.vendor.as_str(), device.serial.as_deref()), ("DECANT", Some("pair-1")));
        assert_eq!(device.designators.len(), 2, "by vendor and by name");
    }
}

/// Breaks, black holes, damage, disks that are busy: every read has the right bytes, and each is answered once.
#[test]
fn everything_is_read_whatever_the_network_does() {
    let (mut sessions, mut faults) = (0, 0);
    for seed in 0..120 {
        let mut random = Random::new(seed);
        let mut chance = |most: u64| if random.one_in(2) { 0 } else { 20 + random.below(most) };
        let faults_of = Faults {
            reset: chance(400),
            swallow: chance(600),
            damage: chance(400),
            not_ready: chance(50),
            attention: chance(50),
            at_most: 25,
        };
        let large = seed % 3 == 0;
        let shape = Shape {
            disk: if large { Disk { block_bytes: 4096, blocks: 256, ..disk() } } else { disk() },
            chap: (seed % 2 == 0).then(mutual),
            digests: DigestPolicy::Required,
            segment: [512, 8192, 262_144][(seed % 3) as usize],
            depth: [1, 4, 64][(seed / 3 % 3) as usize],
            faults: faults_of,
        };
        let network = soak(seed, 50, &shape);
        sessions += network.sessions;
        faults += network.faults_so_far;
    }
    assert!(sessions > 400 && faults > 1000, "{sessions} sessions, {faults} faults: too calm to say anything");
}

/// Sessions are lost while commands of theirs are at the medium: the new one waits for the old one's end, and nothing of
/// the old one is taken for its own.
#[test]
fn sessions_are_reinstated_while_the_old_ones_bytes_trickle_in() {
    for seed in 0..30 {
        let faults = Faults { reset: 12, at_most: 40, ..Faults::default() };
        let network = soak(1000 + seed, 40, &Shape { faults, ..Shape::default() });
        assert!(network.sessions > 1, "seed {seed}");
    }
}

#[test]
fn a_disk_of_another_size_or_identity_is_refused() {
    for (what, change) in [
        ("size", Disk { blocks: 2040, ..disk() }),
        ("block size", Disk { block_bytes: 4096, blocks: 256, ..disk() }),
        ("vendor or product", Disk { product: "OTHER".into(), ..disk() }),
        ("serial number", Disk { serial: "pair-2".into(), ..disk() }),
    ] {
        let mut network = soak(7, 5, &Shape::default());
        // The target is started anew, with another disk behind the same name.
        network.restart(target(&Shape { disk: change, ..Shape::default() }));
        network.ask(100, Ask::Read(0, 4096));
        let before = network.now;
        assert!(!network.run(before + 20_000, |network| network.owed.is_empty()), "{what}: answered");
        let refused = |violation: &Violation| *violation == Violation::OtherDisk(what);
        assert!(network.violations.iter().any(refused), "{what}: {:?}", network.violations);
        // And the first one is taken again when it comes back.
        network.restart(target(&Shape::default()));
        assert!(network.run(before + 60_000, |network| network.owed.is_empty()), "{what}: {:?}", network.violations);
    }
}

#[test]
fn a_disk_that_grows_under_a_session_ends_it_and_is_not_read_any_more() {
    let mut network = soak(3, 5, &Shape::default());
    network.target.resize(4096);
    network.medium.resize(4096 * 512, 0);
    network.ask(100, Ask::Read(0, 4096));
    assert!(!network.run(20_000, |network| network.owed.is_empty()));
    assert!(network.violations.contains(&Violation::Changed), "{:?}", network.violations);
    assert!(network.violations.contains(&Violation::OtherDisk("size")), "{:?}", network.violations);
}

#[test]
fn who_cannot_prove_himself_is_not_let_in_nor_believed() {
    let wrong = |chap: Option<Chap>| {
        let shape = Shape { chap: Some(mutual()), ..Shape::default() };
        let config = Config { chap, ..initiator_config(&shape) };
        let mut network = Network::new(1, target(&shape), Initiator::new(config), Faults::default());
        network.ask(1, Ask::Read(0, 512));
        assert!(!network.run(5000, |network| network.owed.is_empty()));
        assert_eq!(network.sessions, 0);
        network.violations
    };
    let said = |violations: &[Violation], text: &str| violations.iter().any(|v| v.to_string().contains(text));
    let mine = credentials("reader", "not the secret of the reader");
    assert!(said(&wrong(Some(Chap::new(mine, None).unwrap())), "login refused: authentication failure (0201)"));
    // A target that is asked for no proof takes none, and one without the right proof is not believed.
    let good = || credentials("reader", "a secret of the reader");
    let theirs = credentials("server", "not the secret of the server");
    let violations = wrong_target(Some(Chap::new(good(), Some(theirs)).unwrap()));
    assert!(said(&violations, "the target is not the one it should be"), "{violations:?}");
    assert!(said(&wrong(None), "login refused: authentication failure (0201)"));
}

/// The initiator is let in, but does not believe the target.
fn wrong_target(chap: Option<Chap>) -> Vec<Violation> {
    let shape = Shape { chap: Some(mutual()), ..Shape::default() };
    let config = Config { chap, ..initiator_config(&shape) };
    let mut network = Network::new(1, target(&shape), Initiator::new(config), Faults::default());
    network.ask(1, Ask::Read(0, 512));
    assert!(!network.run(5000, |network| network.owed.is_empty()));
    network.violations
}

#[test]
fn an_idle_session_is_kept_alive_and_a_dead_one_found() {
    let mut network = soak(5, 5, &Shape::default());
    let start = network.now;
    network.run(start + 60_000, |_| false);
    assert_eq!((network.sessions, network.violations.len()), (1, 0), "pings both ways are answered");
    // Nothing asked: the silence itself is found out.
    let faults = Faults { swallow: 1, at_most: 1, ..Faults::default() };
    let mut network = self::network(6, &Shape { faults: Faults::default(), ..Shape::default() });
    network.ask(0, Ask::Read(0, 512));
    assert!(network.run(UNTIL, |network| network.owed.is_empty()));
    network.set_faults(faults);
    let start = network.now;
    network.run(start + 10_000, |_| false);
    assert!(network.violations.contains(&Violation::OutOfPlace("a ping was not answered")));
    assert_eq!(network.sessions, 2);
}
