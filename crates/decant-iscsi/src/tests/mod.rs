//! Tests of what both roles share.

mod golden;
mod negotiation;
mod pair;
mod stream;
