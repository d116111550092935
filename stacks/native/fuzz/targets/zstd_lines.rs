#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stackbench_loader::fuzz::zstd_lines(data));
