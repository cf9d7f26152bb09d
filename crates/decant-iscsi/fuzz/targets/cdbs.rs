#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| decant_iscsi_fuzz::entries::cdbs(data));
