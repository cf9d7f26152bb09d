//! The userspace data plane: keeper, volume process, FUSE and loop.

#![deny(unsafe_code)]

pub mod device;
pub mod fuse;
pub mod loopdev;
pub mod process;
