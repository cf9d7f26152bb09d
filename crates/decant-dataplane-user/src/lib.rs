//! The userspace data plane: keeper, volume process, FUSE and loop.

pub mod device;
