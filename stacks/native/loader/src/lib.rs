//! Token batches for training, from text or from pre-tokenized shards: read, tokenized and packed by threads.
//!
//! Batch `k` is a pure function of (manifest, tokenizer, configuration, `k`): equal for any number of threads
//! and any depth of prefetch, sharded without overlap, and resumed exactly from a small state.
//!
//! ```no_run
//! use stackbench_loader::{Config, Loader};
//!
//! let loader = Loader::new(Config::new("corpus/", "tokenizer.json", 8, 2048))?;
//! while let Some(batch) = loader.take()? {
//!     let tokens: &[i32] = batch.tokens.as_slice(); // [8, 2049], row after row
//! }
//! # Ok::<(), stackbench_loader::Error>(())
//! ```

#[cfg(target_endian = "big")]
compile_error!("shards are little-endian, and are mapped as they lie");

mod buffer;
pub mod dlpack;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod json;
mod loader;
mod pack;
mod parquet_file;
mod permutation;
mod pipeline;
mod sample;
mod segment;
mod shards;
mod source;
mod stats;
mod stop;
mod store;
mod sync;
mod tokenize;
mod tokenizer;

pub use buffer::{ALIGNMENT, Lease};
pub use error::{Error, Kind, Result};
pub use loader::{Config, Indexed, Loader, Opened, SourceConfig, State, states_from_json};
pub use pack::{Batch, Data, LaneState, Position};
pub use permutation::Permutation;
pub use pipeline::Next;
pub use segment::OnError;
pub use shards::{Header, Writer};
pub use source::{Format, Manifest, Shuffle};
pub use stats::{STAGES, Stage, Stats, thread_cpu_ns};
pub use stop::Stop;
pub use store::Patience;
pub use tokenize::tokenize;
pub use tokenizer::{Engine, Tokenizer};
