//! The userspace data plane: keeper, volume process, FUSE and loop.
//!
//! ```text
//! agent: UserPlane --keeper.sock--> keeper --socketpair--> volume process
//!                                     |                      |  FUSE threads --> Engine --> volume.img
//!                                     holds: FUSE, loop, key |  origin, export: NBD over mutual TLS
//! ```

#![deny(unsafe_code)]

pub mod control;
pub mod device;
pub mod engine;
pub mod export;
pub mod ext4;
pub mod fuse;
pub mod header;
pub mod iscsi;
pub mod keeper;
pub mod keys;
pub mod loopdev;
pub mod metadata;
pub mod origin;
pub mod plane;
pub mod process;
pub mod site;
pub mod standalone;
mod stream;
pub mod tls;
pub mod volume;

pub use plane::UserPlane;
pub use site::{SiteConfig, TlsFiles};
