//! The target against initiators played by hand.

mod hostile;
mod sessions;
mod transfers;
mod world;
