//! The NBD export and origin against stock peers, against each other, and against peers that die, hang, cut and lie.

mod faults;
mod fixture;
mod limits;
mod origin;
mod parked;
mod peers;
mod tls;
