//! Handoff, migration and drain as pure state machines.
