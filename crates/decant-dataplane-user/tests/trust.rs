//! Volumes that are to travel over iSCSI: where that is refused, and who is let in.

mod support;

use std::net::{IpAddr, Ipv4Addr};

use decant_base::Bytes;
use decant_dataplane::{Access, Command, ExportSecret, Failure, FailureCode, Origin, Outcome, Protocol, Reader};
use support::{Worker, World, cannot_run, migration, mount, run, unmount, volume};

fn open(source: &Worker, destination: &Worker, address: IpAddr) -> Result<Outcome, Failure> {
    let certificate = destination.plane.certificate().to_owned();
    let reader = Reader { certificate, address, protocol: Protocol::Iscsi };
    source.perform(Command::OpenExport { volume: volume("v"), migration: migration("m-1"), reader })
}

/// What the destination says to an offer, made up as `change` likes.
fn offered(destination: &Worker, opened: &Outcome, change: impl FnOnce(&mut Origin)) -> Result<Outcome, Failure> {
    let Outcome::ExportOpened { origin, geometry, header, room } = opened.clone() else { panic!("{opened:?}") };
    let (volume, migration) = (volume("v"), migration("m-1"));
    let prepare = Command::Prepare { volume: volume.clone(), migration: migration.clone(), geometry, header, room };
    assert_eq!(destination.perform(prepare), Ok(Outcome::Done));
    let mut origin = origin;
    change(&mut origin);
    let outcome =
        destination.perform(Command::Assemble { volume: volume.clone(), migration: migration.clone(), origin });
    assert_eq!(destination.perform(Command::Abandon { volume, migration }), Ok(Outcome::Done));
    destination.assert_nothing_left("v");
    outcome
}

#[test]
fn iscsi_is_refused_where_it_is_not_trusted_and_to_strangers() {
    if cannot_run("iscsi_is_refused_where_it_is_not_trusted_and_to_strangers") {
        return;
    }
    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 9, 9, 9));
    let world = World::new();
    let source = world.worker("source", Bytes::mib(4));
    let destination = world.worker("destination", Bytes::mib(4));
    let wary = world.worker_that_trusts("wary", &[]);
    source.create("v", Bytes::mib(64));
    let device = source.attach("v");
    let at = world.mount_point("at-source");
    mount(&device, &at);

    // The source does not trust the destination's network, and says how to mend it.
    let refused = open(&source, &destination, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))).unwrap_err();
    assert_eq!(refused.code, FailureCode::Refused);
    assert_eq!(
        refused.message,
        "worker source does not trust the network of 192.0.2.1 with iSCSI, where CHAP authenticates a login and nothing after it; \
         name the network in iscsi.trusted_networks of source, or move over nbd"
    );

    let opened = open(&source, &destination, HERE).unwrap();
    assert_eq!(open(&source, &destination, HERE), Ok(opened.clone()), "again: the same, its secret too");
    assert!(!format!("{opened:?}").contains(&secret(&opened)), "the secret shows itself in no log");
    // Nor does every destination trust the source's.
    let refused = offered(&wary, &opened, |_| {}).unwrap_err();
    assert_eq!(refused.code, FailureCode::Refused);
    assert!(refused.message.contains("iscsi.trusted_networks of wary"), "{refused}");
    // A secret of another export, and one that no worker draws.
    let other = ExportSecret::new(std::array::from_fn(|byte| byte as u8));
    let stranger = offered(&destination, &opened, |origin| origin.access = Access::Iscsi { secret: other });
    assert_eq!(stranger.unwrap_err().code, FailureCode::Retry);
    let short: ExportSecret = serde_json::from_str("\"short\"").unwrap();
    let nonsense = offered(&destination, &opened, |origin| origin.access = Access::Iscsi { secret: short });
    assert_ne!(nonsense.unwrap_err().message, "");
    // The right secret from the wrong address.
    let opened = open(&source, &destination, ELSEWHERE).unwrap();
    assert_eq!(offered(&destination, &opened, |_| {}).unwrap_err().code, FailureCode::Retry);
    // And as it should be.
    let opened = open(&source, &destination, HERE).unwrap();
    assert!(matches!(offered(&destination, &opened, |_| {}), Ok(Outcome::Attached { .. })));

    // Nothing of it touched the machine.
    std::fs::write(at.join("file"), b"written after it all").unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    unmount(&at);
    let close = Command::CloseExport { volume: volume("v"), migration: migration("m-1") };
    assert_eq!(source.perform(close), Ok(Outcome::Done));
    source.detach("v");
    source.assert_nothing_left("v");
}

fn secret(opened: &Outcome) -> String {
    let Outcome::ExportOpened { origin, .. } = opened else { panic!("{opened:?}") };
    let Access::Iscsi { secret } = &origin.access else { panic!("not over iSCSI") };
    secret.of_reader().unwrap().to_owned()
}
