//! The engine against an origin in this process, real files, and disks that fail.

mod crash;
mod faults;
mod fixture;
mod reads;
mod stress;
