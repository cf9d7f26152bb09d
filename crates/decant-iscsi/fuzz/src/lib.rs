//! Entry points for fuzzing, shared with the tests of `decant-iscsi`.

pub mod entries;
