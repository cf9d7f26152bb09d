//! Tests of what both roles share.

mod golden;
mod initiator;
mod negotiation;
mod pair;
mod stream;
