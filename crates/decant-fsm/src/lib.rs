//! Durable steps: journal, replay, retry. Knows nothing of what is being migrated.

#![forbid(unsafe_code)]

mod backoff;

pub use backoff::Backoff;
