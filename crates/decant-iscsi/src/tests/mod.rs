//! Tests of what both roles share.

mod golden;
mod negotiation;
mod stream;
