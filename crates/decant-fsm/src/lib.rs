//! Durable steps: journal, replay, retry.
