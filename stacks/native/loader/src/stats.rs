//! Where threads spent their CPU time, and what was left out: counted by segment, so that counting is free.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::error::Error;
use crate::sync::lock;

/// Parts of the work, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Bytes from files or stores; decompression where the format is read in a stream.
    Read = 0,
    /// Lines and columns to text.
    Decode = 1,
    /// Text to ids.
    Tokenize = 2,
    /// Ids to batches.
    Pack = 3,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::Read, Self::Decode, Self::Tokenize, Self::Pack];
}

/// Names of the stages, in order.
pub const STAGES: [&str; 4] = ["read", "decode", "tokenize", "pack"];
const KEPT: usize = 1000;

/// Counters of one loader.
#[derive(Debug, Default)]
pub struct Stats {
    cpu_ns: [AtomicU64; 4],
    /// Documents tokenized.
    pub documents: AtomicU64,
    /// Documents without text, left out.
    pub empty: AtomicU64,
    /// Bytes of text tokenized.
    pub text_bytes: AtomicU64,
    /// Tokens made, end-of-text included, delivered or not.
    pub tokens: AtomicU64,
    /// Records left out under `on_error = skip`.
    pub skipped: AtomicU64,
    skips: Mutex<Vec<String>>,
}

impl Stats {
    /// CPU nanoseconds of a stage so far.
    pub fn cpu_ns(&self, stage: Stage) -> u64 {
        self.cpu_ns[stage as usize].load(Ordering::Relaxed)
    }

    /// Runs a part of the work, and counts this thread's CPU time.
    pub fn timed<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let begin = thread_cpu_ns();
        let out = work();
        self.cpu_ns[stage as usize].fetch_add(thread_cpu_ns() - begin, Ordering::Relaxed);
        out
    }

    /// Adds what a clock has measured.
    pub fn add(&self, clock: &Clock) {
        let cpu = (thread_cpu_ns() - clock.cpu_ns) as f64;
        let wall: u64 = clock.wall_ns.iter().sum();
        for (counter, part) in self.cpu_ns.iter().zip(clock.wall_ns) {
            counter.fetch_add((cpu * part as f64 / wall.max(1) as f64) as u64, Ordering::Relaxed);
        }
    }

    /// Counts and lists a record that is left out.
    pub fn skip(&self, error: &Error) {
        self.skipped.fetch_add(1, Ordering::Relaxed);
        let mut skips = lock(&self.skips);
        if skips.len() < KEPT {
            skips.push(error.to_string());
        }
    }

    /// The first records that were left out, each with its place.
    pub fn skips(&self) -> Vec<String> {
        lock(&self.skips).clone()
    }
}

/// Divides a thread's CPU time between stages that alternate quickly, in the ratio of their wall time: the
/// CPU clock is a system call, the wall clock is not.
#[derive(Debug)]
pub struct Clock {
    cpu_ns: u64,
    last: Instant,
    wall_ns: [u64; 4],
}

impl Clock {
    /// From now on.
    pub fn start() -> Self {
        Self { cpu_ns: thread_cpu_ns(), last: Instant::now(), wall_ns: [0; 4] }
    }

    /// The time since the last call belonged to this stage.
    pub fn lap(&mut self, stage: Stage) {
        let now = Instant::now();
        self.wall_ns[stage as usize] += (now - self.last).as_nanos() as u64;
        self.last = now;
    }
}

/// CPU time of the calling thread, nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}
