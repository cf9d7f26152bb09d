//! The iSCSI origin against our own target and tgt, and against targets that die, hang, cut and lie.

mod faults;
#[path = "../nbd/fixture.rs"]
#[allow(dead_code, reason = "the other protocol needs more of it")]
mod fixture;
mod origin;
mod tgt;
mod world;
