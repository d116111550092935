//! The loader: a configuration, its threads, and the state of what it has delivered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::buffer::{Pinning, Pool};
use crate::error::{Error, Kind, Result};
use crate::pack::{Batch, LaneState, Pools, Position, Shape, running_weights};
use crate::permutation::key;
use crate::pipeline::{Next, Shared};
use crate::segment::{Common, OnError};
use crate::source::{Format, Opening, Shuffle, Source};
use crate::stats::Stats;
use crate::stop::Stop;
use crate::store::Patience;
use crate::sync::lock;
use crate::tokenizer::{Engine, Tokenizer};

const VERSION: u32 = 1;
/// A segment holds this many rows or more, so that the row that is filled up is at most 0.5 % of it.
const ROWS_A_SEGMENT: u64 = 160;
const BYTES_A_TOKEN: u64 = 4;
const LARGEST_SEGMENT: u64 = 1 << 30;
/// No number of a state is as large: what is counted with them stays far from overflow.
const LARGEST_COUNT: u64 = 1 << 38;

/// One of the sources that are mixed.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Paths or URLs: files, directories, prefixes.
    pub urls: Vec<String>,
    /// Share of the rows, relative to the other sources.
    pub weight: f64,
}

/// All of a loader's choices.
#[derive(Clone, Debug)]
pub struct Config {
    /// At least one.
    pub sources: Vec<SourceConfig>,
    /// A tokenizer.json; not needed for shards of tokens.
    pub tokenizer: Option<PathBuf>,
    /// Name of the end-of-text token; None: the first of `tokenizer::END_OF_TEXT`.
    pub end_of_text: Option<String>,
    /// Rows a batch.
    pub batch: usize,
    /// A row has one token more.
    pub sequence: usize,
    /// Of shuffling and mixing.
    pub seed: u64,
    /// Order of documents.
    pub shuffle: Shuffle,
    /// How documents lie in files; None: by the names of the files.
    pub format: Option<Format>,
    /// This consumer …
    pub rank: u64,
    /// … of so many.
    pub world_size: u64,
    /// Independent sequences of batches, a multiple of the world size; None: the world size.
    pub lanes: Option<u64>,
    /// How often each source is read; None: without end.
    pub epochs: Option<u64>,
    /// 0: as many as the process may use.
    pub threads: usize,
    /// Batches that are made ahead.
    pub depth: usize,
    /// Whether batches have position ids.
    pub positions: bool,
    /// Whether batches have segment ids.
    pub segments: bool,
    /// Whether an incomplete last batch is left out.
    pub drop_last: bool,
    /// Policy for data that cannot be read.
    pub on_error: OnError,
    /// Which tokenizer.
    pub engine: Engine,
    /// Key or column of the text.
    pub text_field: String,
    /// CUDA-pinned batches: None: no; Some(""): the runtime that is found; else its path.
    pub pinned: Option<String>,
    /// Where manifests, indexes and the tokenizer's comparison are kept.
    pub cache: Option<PathBuf>,
    /// Bytes of text a segment; None: by the sequence length.
    pub segment_bytes: Option<u64>,
    /// Of remote stores.
    pub patience: Patience,
}

impl Config {
    /// One source, everything else at its default.
    pub fn new(url: impl Into<String>, tokenizer: impl Into<PathBuf>, batch: usize, sequence: usize) -> Self {
        Self {
            sources: vec![SourceConfig { urls: vec![url.into()], weight: 1.0 }],
            tokenizer: Some(tokenizer.into()),
            end_of_text: None,
            batch,
            sequence,
            seed: 0,
            shuffle: Shuffle::None,
            format: None,
            rank: 0,
            world_size: 1,
            lanes: None,
            epochs: Some(1),
            threads: 0,
            depth: 8,
            positions: false,
            segments: false,
            drop_last: false,
            on_error: OnError::Error,
            engine: Engine::Auto,
            text_field: "text".into(),
            pinned: None,
            cache: None,
            segment_bytes: None,
            patience: Patience::default(),
        }
    }

    pub(crate) fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            given => given,
        }
    }

    fn lane_count(&self) -> u64 {
        self.lanes.unwrap_or(self.world_size)
    }

    /// Bytes of text a segment: enough rows that filling up the last one costs little.
    fn segment_size(&self) -> u64 {
        let least = ROWS_A_SEGMENT * BYTES_A_TOKEN * (self.sequence as u64 + 1);
        self.segment_bytes.unwrap_or_else(|| least.clamp(1 << 20, LARGEST_SEGMENT))
    }

    fn check(&self) -> Result<()> {
        let lanes = self.lane_count();
        let wrong = |what: String| Err(Error::input(what));
        let (batch, sequence) = (self.batch, self.sequence);
        if batch == 0 || sequence == 0 || sequence > 1 << 24 || batch.saturating_mul(sequence + 1) > 1 << 32 {
            return wrong(format!(
                "batch {batch} x sequence {sequence}: valid: at least 1, a sequence up to 2^24, 2^32 tokens a batch"
            ));
        }
        if self.rank >= self.world_size {
            return wrong(format!("rank {} of world_size {}: valid: 0 to world_size - 1", self.rank, self.world_size));
        }
        if lanes == 0 || !lanes.is_multiple_of(self.world_size) || lanes > 1 << 20 {
            return wrong(format!("lanes {lanes}: valid: a multiple of world_size {} up to 2^20", self.world_size));
        }
        if self.sources.is_empty() {
            return wrong("no source; valid: a path, a URL, several of them, or a mapping of path to weight".into());
        }
        if self.depth == 0 || self.depth > 1 << 16 || self.epochs == Some(0) {
            return wrong(format!(
                "depth {}, epochs {:?}: valid: at least 1, depth up to 2^16",
                self.depth, self.epochs
            ));
        }
        if self.threads > 4096 {
            return wrong(format!("threads {}: valid: 0 (all there are) to 4096", self.threads));
        }
        if self.segment_bytes.is_some_and(|bytes| !(1..=LARGEST_SEGMENT).contains(&bytes)) {
            return wrong(format!("segment_bytes {:?}: valid: 1 to {LARGEST_SEGMENT}", self.segment_bytes));
        }
        Ok(())
    }
}

/// What a loader has delivered: small, and all that is needed to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    /// Of manifests, tokenizer and every choice that decides what a batch holds.
    identity: String,
    /// Batches delivered to all ranks, if each got as many as this one.
    pub delivered: u64,
    world_size: u64,
    /// Where each of the rank's lanes stands.
    lanes: BTreeMap<u64, LaneState>,
}

impl State {
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// As JSON, for a checkpoint.
    ///
    /// # Panics
    /// Never: it is plain data.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data")
    }
}

/// States from a JSON list of them.
pub fn states_from_json(text: &str) -> Result<Vec<State>> {
    serde_json::from_str(text).map_err(|e| Error::input(format!("not a state of this loader: {e}")))
}

/// What indexing came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexed {
    /// Hash of the manifest.
    pub manifest: String,
    /// Blocks that can be read independently.
    pub blocks: u64,
    /// Documents, under `Shuffle::Global`; else 0.
    pub documents: u64,
}

/// Sources and tokenizer of a configuration: what takes time to open, and what a resumed loader shares.
#[derive(Clone)]
pub struct Opened {
    sources: Vec<Arc<Source>>,
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    lanes: u64,
    end: i32,
    identity: String,
    pinning: Option<Arc<Pinning>>,
}

impl Opened {
    /// Opens them, and checks all that can be checked before the first document is read; `stop` ends it.
    pub fn new(config: &Config, stop: &Stop) -> Result<Self> {
        config.check()?;
        let (lanes, segment_bytes) = (config.lane_count(), config.segment_size());
        let sources = open_sources(config, segment_bytes, stop)?;
        for source in &sources {
            let blocks = source.blocks();
            if blocks == 0 {
                return Err(Error::input("no document in this source").in_file(&source.url));
            }
            if blocks < lanes {
                let message = format!(
                    "{blocks} blocks for {lanes} lanes: a lane would have none; valid: fewer lanes, a smaller \
                     segment_bytes (now {segment_bytes}), or more files or row groups"
                );
                return Err(Error::input(message).in_file(&source.url));
            }
        }
        let tokenizer = open_tokenizer(config, &sources, stop)?;
        let (end, hash) = match &tokenizer {
            Some(tokenizer) => (tokenizer.end, tokenizer.hash.clone()),
            None => shard_identity(&sources)?,
        };
        let identity = identity(config, &sources, &hash, end, lanes, segment_bytes);
        let pinning = config.pinned.as_deref().map(|path| Pinning::open((!path.is_empty()).then_some(path)));
        Ok(Self {
            sources,
            tokenizer: tokenizer.map(Arc::new),
            lanes,
            end: end.cast_signed(),
            identity,
            pinning: pinning.transpose()?,
        })
    }

    /// Builds manifests and indexes in the configuration's cache, without a tokenizer; `stop` ends it.
    pub fn index(config: &Config, stop: &Stop) -> Result<Indexed> {
        config.check()?;
        let sources = open_sources(config, config.segment_size(), stop)?;
        let manifests: Vec<&str> = sources.iter().map(|source| source.manifest.hash.as_str()).collect();
        Ok(Indexed {
            manifest: manifests.join(" "),
            blocks: sources.iter().map(|source| source.blocks()).sum(),
            documents: sources.iter().map(|source| source.document_count()).sum(),
        })
    }

    /// What threads share; `own` says where the rank's lanes stand.
    pub(crate) fn shared(&self, config: &Config, own: &[(u64, LaneState)]) -> Result<Shared> {
        let weights: Vec<f64> = config.sources.iter().map(|source| source.weight).collect();
        let shape = Shape {
            batch: config.batch,
            row: config.sequence + 1,
            end: self.end,
            positions: config.positions,
            segments: config.segments,
            drop_last: config.drop_last,
            weights: running_weights(&weights)?,
            seed: key(&[config.seed, 5]),
        };
        let most = (config.depth + 2) * (1 + usize::from(config.positions) + usize::from(config.segments));
        let pools = Pools {
            large: Pool::new(shape.batch * shape.row, most, self.pinning.clone()),
            small: Pool::new(shape.batch, config.depth + 2, self.pinning.clone()),
        };
        let common = Common {
            field: config.text_field.clone(),
            on_error: config.on_error,
            shuffle: config.shuffle,
            stats: Stats::default(),
            stop: Stop::default(),
        };
        Ok(Shared::new(
            self.sources.clone(),
            self.tokenizer.clone(),
            common,
            shape,
            pools,
            self.lanes,
            own,
            config.epochs,
            config.seed,
            config.depth,
            config.thread_count(),
        ))
    }
}

/// Delivers batches; dropping it ends and joins its threads.
pub struct Loader {
    opened: Opened,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    delivered: Mutex<State>,
    config: Config,
    process: u32,
}

impl Loader {
    /// Opens sources and tokenizer, and starts the threads.
    pub fn new(config: Config) -> Result<Self> {
        Self::open(config, &[], &Stop::default())
    }

    /// Opens sources and tokenizer, and goes on where states say: none, one where the world size is the same,
    /// else those of all ranks, taken after the same number of batches. `stop` ends the opening.
    pub fn open(config: Config, states: &[State], stop: &Stop) -> Result<Self> {
        Self::start(Opened::new(&config, stop)?, config, states)
    }

    /// Another loader on the same open sources and tokenizer, which goes on where states say.
    pub fn resumed(&self, states: &[State]) -> Result<Self> {
        self.check_process()?;
        Self::start(self.opened.clone(), self.config.clone(), states)
    }

    /// The state from which a rank starts.
    pub(crate) fn begin(config: &Config, states: &[State], lanes: u64, identity: &str) -> Result<State> {
        let own = (0..lanes).filter(|lane| lane % config.world_size == config.rank);
        let sources = vec![Position::default(); config.sources.len()];
        let mut state = State {
            version: VERSION,
            identity: identity.to_owned(),
            delivered: 0,
            world_size: config.world_size,
            lanes: BTreeMap::new(),
        };
        let Some(first) = states.first() else {
            state.lanes = own.map(|lane| (lane, LaneState { batches: 0, rows: 0, sources: sources.clone() })).collect();
            return Ok(state);
        };
        let mut known: BTreeMap<u64, &LaneState> = BTreeMap::new();
        for given in states {
            if given.version != VERSION || given.identity != identity {
                return Err(Error::input(
                    "the state is of another corpus, tokenizer or configuration (everything but threads, depth, rank, \
                 world_size and epochs must be the same)",
                ));
            }
            if given.delivered != first.delivered {
                return Err(Error::input(format!(
                    "states of different moments: {} and {} batches delivered; valid: states of all ranks after the same step",
                    first.delivered, given.delivered
                )));
            }
            let sound = |at: &LaneState| {
                let numbers = at.sources.iter().flat_map(|p| [p.epoch, p.turn, p.segment, p.row]);
                at.sources.len() == config.sources.len()
                    && numbers.chain([at.batches, at.rows]).all(|n| n < LARGEST_COUNT)
            };
            if given.delivered >= LARGEST_COUNT || !given.lanes.values().all(sound) {
                return Err(Error::input("the state is damaged: a number in it is none that a loader writes"));
            }
            known.extend(given.lanes.iter().map(|(lane, at)| (*lane, at)));
        }
        for lane in own {
            let Some(at) = known.get(&lane) else {
                return Err(Error::input(format!(
                    "the states do not say where lane {lane} stands; valid: the states of all {} ranks",
                    first.world_size
                )));
            };
            state.lanes.insert(lane, (*at).clone());
        }
        state.delivered = first.delivered;
        Ok(state)
    }

    fn start(opened: Opened, config: Config, states: &[State]) -> Result<Self> {
        let state = Self::begin(&config, states, opened.lanes, &opened.identity)?;
        let mut own: Vec<(u64, LaneState)> = state.lanes.iter().map(|(lane, at)| (*lane, at.clone())).collect();
        own.sort_by_key(|(lane, at)| (at.batches, *lane)); // lanes deliver in turn
        let shared = Arc::new(opened.shared(&config, &own)?);
        let start = |number| {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name(format!("stackbench-{number}"))
                .spawn(move || shared.work())
                .map_err(|e| Error::new(Kind::Io, format!("cannot start a thread: {e}")))
        };
        let count = config.thread_count();
        let process = std::process::id();
        let loader = Self {
            opened,
            shared: shared.clone(),
            threads: Mutex::default(),
            delivered: Mutex::new(state),
            config,
            process,
        };
        for number in 0..count {
            let thread = start(number)?; // where one cannot be started, the others end with `loader`
            lock(&loader.threads).push(thread);
        }
        Ok(loader)
    }

    /// The next batch of this rank; waits as long as `patience`. Equal for any number of threads and any depth.
    pub fn next(&self, patience: Duration) -> Result<Next> {
        self.check_process()?;
        let answer = self.shared.next(Instant::now() + patience)?;
        if let Next::Batch(batch) = &answer {
            let mut state = lock(&self.delivered);
            state.delivered += self.config.world_size;
            let lane = state.lanes.entry(batch.lane).or_default();
            if lane.batches < batch.state.batches {
                *lane = batch.state.clone(); // two callers at once may come here in the other order
            }
        }
        Ok(answer)
    }

    /// The next batch of this rank, or None after the last, however long it takes.
    pub fn take(&self) -> Result<Option<Batch>> {
        loop {
            match self.next(Duration::from_secs(60))? {
                Next::Batch(batch) => return Ok(Some(batch)),
                Next::End => return Ok(None),
                Next::Late => {}
            }
        }
    }

    /// What has been delivered so far.
    pub fn state(&self) -> State {
        lock(&self.delivered).clone()
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What its threads share: sources, tokenizer, counters.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Its tokenizer; None where all sources are shards.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.opened.tokenizer.as_deref()
    }

    /// Batches that are ready.
    pub fn waiting(&self) -> usize {
        self.check_process().map_or(0, |()| self.shared.waiting())
    }

    /// Ends and joins the threads. Nothing can be delivered afterwards; the state can still be taken.
    pub fn close(&self) {
        if std::process::id() != self.process {
            return; // a forked child has no threads of ours to join
        }
        self.shared.stop();
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Refuses a forked child, which has a copy of this loader and none of its threads.
    pub fn check_process(&self) -> Result<()> {
        if std::process::id() == self.process {
            return Ok(());
        }
        Err(Error::new(
            Kind::Misuse,
            "this loader was made in another process, whose threads a fork does not copy; make one in each process",
        ))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.close();
    }
}

fn open_sources(config: &Config, segment_bytes: u64, stop: &Stop) -> Result<Vec<Arc<Source>>> {
    let open = |source: &SourceConfig| {
        let opening = Opening {
            urls: &source.urls,
            format: config.format,
            shuffle: config.shuffle,
            segment_bytes,
            field: &config.text_field,
            cache: config.cache.as_deref(),
            patience: config.patience,
        };
        Source::open(&opening, stop).map(Arc::new)
    };
    config.sources.iter().map(open).collect()
}

fn open_tokenizer(config: &Config, sources: &[Arc<Source>], stop: &Stop) -> Result<Option<Tokenizer>> {
    let tokens = sources.iter().filter(|source| source.manifest.format == Format::Tokens).count();
    if tokens == sources.len() {
        return Ok(None);
    }
    let Some(path) = &config.tokenizer else {
        return Err(Error::input("text needs a tokenizer; valid: the path of a tokenizer.json"));
    };
    let sample = match config.engine {
        Engine::Auto => crate::sample::texts(sources, config, stop),
        _ => Vec::new(),
    };
    let sample: Vec<&str> = sample.iter().map(String::as_str).collect();
    let tokenizer =
        Tokenizer::open(path, config.end_of_text.as_deref(), config.engine, &sample, config.cache.as_deref())?;
    if tokens > 0 {
        let (end, hash) = shard_identity(sources)?;
        if end != tokenizer.end || hash != tokenizer.hash {
            return Err(Error::input("shards of another tokenizer are mixed with text of this one"));
        }
    }
    Ok(Some(tokenizer))
}

/// End-of-text and tokenizer of all shards, which must be the same.
fn shard_identity(sources: &[Arc<Source>]) -> Result<(u32, String)> {
    let mut found: Option<(u32, String)> = None;
    for source in sources.iter().filter(|source| source.manifest.format == Format::Tokens) {
        for file in &source.manifest.files {
            let directory = std::path::Path::new(&file.name).parent().unwrap_or(std::path::Path::new(""));
            let header = crate::shards::header(directory)?;
            let this = (header.end, header.tokenizer);
            if found.as_ref().is_some_and(|first| *first != this) {
                return Err(Error::input("shards of different tokenizers").in_file(&file.name));
            }
            found = Some(this);
        }
    }
    found.ok_or_else(|| Error::input("no shard"))
}

/// Everything that decides what a batch holds. Threads, depth and ranks do not.
fn identity(
    config: &Config,
    sources: &[Arc<Source>],
    tokenizer: &str,
    end: u32,
    lanes: u64,
    segment_bytes: u64,
) -> String {
    let mut hasher = blake3::Hasher::new();
    for (source, choice) in sources.iter().zip(&config.sources) {
        hasher.update(source.manifest.hash.as_bytes());
        hasher.update(format!("{:?}", source.manifest.format).as_bytes());
        hasher.update(&choice.weight.to_le_bytes());
    }
    let choices = format!(
        "{tokenizer} {end} {} {} {} {:?} {lanes} {segment_bytes} {:?} {:?} {:?}",
        config.batch,
        config.sequence,
        config.seed,
        config.shuffle,
        config.text_field,
        config.on_error,
        config.drop_last
    );
    hasher.update(choices.as_bytes());
    hasher.finalize().to_hex()[..32].to_owned()
}
