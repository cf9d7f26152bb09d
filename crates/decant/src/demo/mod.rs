//! The demo: one real drain on one Linux machine, measured from outside.

pub(crate) mod client;
pub(crate) mod figures;
pub(crate) mod ledger;
pub(crate) mod orders;
pub(crate) mod store;
