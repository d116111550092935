#![no_main]

// The Parquet reader panics on some damaged files; the loader turns that into an error. Without libFuzzer's hook only
// a panic that nobody catches ends the run.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    stackbench_loader::fuzz::parquet(data);
});
