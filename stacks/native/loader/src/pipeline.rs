//! Threads, and what they share: lanes of streams of segments, packed in order whoever made them.
//!
//! A *lane* is a sequence of batches that depends on nothing but the configuration; a rank has the lanes
//! `rank, rank + world_size, …` and delivers a batch of each in turn. Threads claim the next segment of the
//! stream that has the fewest ahead, and pack a lane whose segments have arrived. Both are bounded.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::pack::{Batch, LaneState, Packed, Packer, Pools, Position, Shape, barren};
use crate::permutation::{Permutation, key};
use crate::segment::{self, BlockReader, Common, Segment, Work};
use crate::source::{Shuffle, Source};
use crate::stats::Stage;
use crate::sync::lock;
use crate::tokenizer::Tokenizer;

/// What all threads of a loader use.
pub struct Shared {
    /// Its sources.
    pub sources: Vec<Arc<Source>>,
    /// None where all sources hold tokens.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Of reading.
    pub common: Common,
    /// Of batches.
    pub shape: Shape,
    pub(crate) pools: Pools,
    pub(crate) lanes: u64,
    pub(crate) epochs: Option<u64>,
    pub(crate) seed: u64,
    /// Ready batches a lane.
    pub(crate) depth: usize,
    /// Segments a stream.
    pub(crate) ahead: u64,
    state: Mutex<State>,
    work: Condvar,
    ready: Condvar,
}

struct State {
    lanes: Vec<Lane>,
    turn: usize,
    /// That a thread panicked outside of reading and tokenizing.
    failed: Option<Error>,
}

/// What waiting for a batch came to.
#[derive(Debug)]
pub enum Next {
    /// A batch.
    Batch(Batch),
    /// There is none any more.
    End,
    /// The time is over.
    Late,
}

struct Lane {
    packer: Option<Packer>,
    streams: Vec<Stream>,
    ready: VecDeque<Batch>,
    fresh: bool,
    ended: bool,
    error: Option<Error>,
}

struct Stream {
    cursor: Option<Cursor>,
    claimed: u64,
    handed: u64,
    used: u64,
    done: BTreeMap<u64, (Position, Result<Segment>)>,
    exhausted: bool,
}

/// Walks the segments of one source in one lane.
pub(crate) struct Cursor {
    lane: u64,
    source: usize,
    next: Position,
    reader: Option<(u64, BlockReader)>,
    /// Whether the epoch was begun at its start, and has given no segment yet.
    barren: bool,
}

/// A segment to be made.
pub(crate) struct Claim {
    position: Position,
    block: u64,
    work: Result<Work>,
}

impl Claim {
    /// In place of a segment that could not even be claimed.
    pub(crate) fn failed(error: Error) -> Self {
        Self { position: Position::default(), block: 0, work: Err(error) }
    }
}

impl Cursor {
    /// From a position on.
    pub(crate) fn new(lane: u64, source: usize, next: Position) -> Self {
        let barren = Position { epoch: 0, ..next } == Position::default();
        Self { lane, source, next, reader: None, barren }
    }

    /// The next segment's work; None where the epochs are over. An unreadable block is an error or, by
    /// policy, left out.
    pub(crate) fn next(&mut self, shared: &Shared) -> Result<Option<Claim>> {
        let source = &shared.sources[self.source];
        loop {
            shared.common.stop.check()?;
            let Some((block, reader)) = &mut self.reader else {
                let Some(block) = self.block(shared)? else { return Ok(None) };
                let (segment, common) = (self.next.segment, &shared.common);
                match unless_it_panics(|| BlockReader::open(source, source.block(block), segment, common)) {
                    Ok(reader) => self.reader = Some((block, reader)),
                    Err(error) => self.leave(error, shared)?,
                }
                continue;
            };
            match unless_it_panics(|| reader.next()) {
                Ok(Some(work)) => {
                    let claim = Claim { position: self.next, block: *block, work: Ok(work) };
                    self.next = Position { segment: self.next.segment + 1, row: 0, ..self.next };
                    self.barren = false;
                    return Ok(Some(claim));
                }
                Ok(None) => self.next_block(),
                Err(error) => self.leave(error, shared)?,
            }
        }
    }

    fn next_block(&mut self) {
        self.reader = None;
        self.next = Position { epoch: self.next.epoch, turn: self.next.turn + 1, segment: 0, row: 0 };
    }

    fn leave(&mut self, error: Error, shared: &Shared) -> Result<()> {
        segment::leave_out(error, &shared.common)?;
        self.next_block();
        Ok(())
    }

    /// The block at this turn, in the next epoch where this one is over; None after the last epoch.
    fn block(&mut self, shared: &Shared) -> Result<Option<u64>> {
        let blocks = shared.sources[self.source].blocks();
        let mut over = false;
        if self.lane + self.next.turn * shared.lanes >= blocks {
            self.next = Position { epoch: self.next.epoch + 1, ..Position::default() };
            over = true;
        }
        if shared.epochs.is_some_and(|epochs| self.next.epoch >= epochs) {
            return Ok(None);
        }
        if over && std::mem::replace(&mut self.barren, true) {
            return Err(barren());
        }
        let index = self.lane + self.next.turn * shared.lanes;
        if shared.common.shuffle != Shuffle::Block {
            return Ok(Some(index));
        }
        Ok(Some(Permutation::new(blocks, shared.order(self.source, self.next.epoch, 2, 0)).at(index)))
    }
}

impl Shared {
    fn order(&self, source: usize, epoch: u64, purpose: u64, which: u64) -> u64 {
        key(&[self.seed, source as u64, epoch, purpose, which])
    }

    /// Everything in place, no thread running yet. `states` are those of the rank's lanes, in order.
    #[expect(clippy::too_many_arguments, reason = "one caller, which names them all")]
    pub(crate) fn new(
        sources: Vec<Arc<Source>>,
        tokenizer: Option<Arc<Tokenizer>>,
        common: Common,
        shape: Shape,
        pools: Pools,
        lanes: u64,
        own: &[(u64, LaneState)],
        epochs: Option<u64>,
        seed: u64,
        depth: usize,
        threads: usize,
    ) -> Self {
        let streams = (own.len() * sources.len()).max(1);
        let ahead = (2 * threads).div_ceil(streams).max(2) as u64;
        let lanes_of = own
            .iter()
            .map(|(lane, state)| Lane {
                packer: Some(Packer::new(*lane, state)),
                streams: state
                    .sources
                    .iter()
                    .enumerate()
                    .map(|(source, next)| Stream {
                        cursor: Some(Cursor::new(*lane, source, *next)),
                        claimed: 0,
                        handed: 0,
                        used: 0,
                        done: BTreeMap::new(),
                        exhausted: false,
                    })
                    .collect(),
                ready: VecDeque::new(),
                fresh: false,
                ended: false,
                error: None,
            })
            .collect();
        Self {
            sources,
            tokenizer,
            common,
            shape,
            pools,
            lanes,
            epochs,
            seed,
            ahead,
            depth: depth.div_ceil(own.len().max(1)).max(1),
            state: Mutex::new(State { lanes: lanes_of, turn: 0, failed: None }),
            work: Condvar::new(),
            ready: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Ends all waits; threads return.
    pub(crate) fn stop(&self) {
        self.common.stop.set();
        drop(self.lock());
        self.work.notify_all();
        self.ready.notify_all();
    }

    /// The next batch of the rank; waits at most until `deadline`.
    pub(crate) fn next(&self, deadline: Instant) -> Result<Next> {
        let mut state = self.lock();
        loop {
            self.common.stop.check()?;
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let count = state.lanes.len();
            let turn = state.turn;
            let here = (0..count).map(|i| (turn + i) % count).find(|lane| {
                let lane = &state.lanes[*lane];
                !lane.ended || !lane.ready.is_empty() || lane.error.is_some()
            });
            let Some(here) = here else { return Ok(Next::End) };
            let lane = &mut state.lanes[here];
            if let Some(batch) = lane.ready.pop_front() {
                if lane.ready.len() < self.depth.div_ceil(2) && !lane.ended {
                    lane.fresh = true;
                    self.work.notify_one();
                }
                state.turn = (here + 1) % count;
                return Ok(Next::Batch(batch));
            }
            if let Some(error) = &lane.error {
                return Err(error.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Next::Late);
            }
            state = self.ready.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Batches that wait to be taken.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().lanes.iter().map(|lane| lane.ready.len()).sum()
    }

    /// A thread's life. A panic in it ends the loader with an error, not with a wait for ever.
    pub(crate) fn work(&self) {
        if catch_unwind(AssertUnwindSafe(|| self.serve())).is_err() {
            self.lock().failed.get_or_insert_with(panicked);
            self.ready.notify_all();
        }
    }

    fn serve(&self) {
        let mut state = self.lock();
        while !self.common.stop.is_set() && state.failed.is_none() {
            let packable = |l: &Lane| l.fresh && !l.ended && l.packer.is_some() && l.ready.len() < self.depth;
            if let Some(lane) = state.lanes.iter().position(packable) {
                state = self.pack(state, lane);
            } else if let Some((lane, source)) = self.stream_to_claim(&state) {
                state = self.claim(state, lane, source);
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// The stream with the fewest segments ahead, the lane whose turn is next first.
    fn stream_to_claim(&self, state: &State) -> Option<(usize, usize)> {
        let count = state.lanes.len();
        let lanes = (0..count).map(|i| (state.turn + i) % count);
        lanes
            .filter(|lane| !state.lanes[*lane].ended)
            .flat_map(|lane| state.lanes[lane].streams.iter().enumerate().map(move |(i, stream)| (lane, i, stream)))
            .filter(|(_, _, s)| s.cursor.is_some() && !s.exhausted && s.claimed - s.used < self.ahead)
            .min_by_key(|(_, _, s)| s.claimed - s.used)
            .map(|(lane, source, _)| (lane, source))
    }

    fn claim<'a>(&'a self, mut state: MutexGuard<'a, State>, lane: usize, source: usize) -> MutexGuard<'a, State> {
        let stream = &mut state.lanes[lane].streams[source];
        let Some(mut cursor) = stream.cursor.take() else { return state };
        let claim = if self.sources[source].one_segment_a_block() {
            cursor.next(self) // reads nothing
        } else {
            drop(state);
            let claim = self.common.stats.timed(Stage::Read, || cursor.next(self));
            state = self.lock();
            claim
        };
        let stream = &mut state.lanes[lane].streams[source];
        stream.cursor = Some(cursor);
        let ordinal = stream.claimed;
        match claim {
            Ok(Some(claim)) => {
                stream.claimed += 1;
                self.work.notify_one(); // the stream may be claimed again
                drop(state);
                let made = self.make(source, claim);
                state = self.lock();
                state.lanes[lane].streams[source].done.insert(ordinal, made);
            }
            Ok(None) => {
                stream.exhausted = true;
                state.lanes[lane].fresh = true;
            }
            Err(error) => {
                stream.claimed += 1;
                stream.exhausted = true;
                stream.done.insert(ordinal, (Position::default(), Err(error)));
            }
        }
        let stream = &state.lanes[lane].streams[source];
        if stream.done.contains_key(&stream.handed) {
            state.lanes[lane].fresh = true;
        }
        state
    }

    /// Reads, decodes and tokenizes a segment.
    pub(crate) fn make(&self, source: usize, claim: Claim) -> (Position, Result<Segment>) {
        let place = &self.sources[source];
        let Claim { position, block, work } = claim;
        let documents = self.order(source, position.epoch, 3, 0);
        let within = self.order(source, position.epoch, 4, key(&[block, position.segment]));
        let segment = unless_it_panics(|| {
            let raw = match work? {
                Work::Raw(raw) => raw,
                Work::Block(block) => {
                    let read = || segment::read(place, block, documents, &self.common);
                    self.common.stats.timed(Stage::Read, read)?
                }
            };
            segment::tokenize(place, raw, self.tokenizer.as_deref(), within, &self.common)
        });
        let segment = segment.or_else(|error| {
            segment::leave_out(error, &self.common)?;
            Ok(Segment { tokens: segment::Tokens::Owned(Arc::new(Vec::new())), ends: Vec::new() })
        });
        (position, segment)
    }

    /// Packs a lane as far as its segments and its depth reach.
    fn pack<'a>(&'a self, mut state: MutexGuard<'a, State>, index: usize) -> MutexGuard<'a, State> {
        let lane = &mut state.lanes[index];
        let Some(mut packer) = lane.packer.take() else { return state };
        lane.fresh = false;
        for (source, stream) in lane.streams.iter_mut().enumerate() {
            while let Some((position, segment)) = stream.done.remove(&stream.handed) {
                stream.handed += 1;
                packer.push(source, position, segment);
            }
            if stream.exhausted && stream.handed == stream.claimed {
                packer.end(source);
            }
        }
        let room = self.depth - lane.ready.len();
        drop(state);
        let mut made = Vec::new();
        let last = self.common.stats.timed(Stage::Pack, || {
            while made.len() < room {
                match packer.pack(&self.shape, &self.pools) {
                    Ok(Packed::Batch(batch)) => made.push(*batch),
                    other => return other,
                }
            }
            Ok(Packed::More)
        });
        let full = made.len() == room;
        let mut state = self.lock();
        let lane = &mut state.lanes[index];
        for (source, stream) in lane.streams.iter_mut().enumerate() {
            stream.used = packer.used(source);
        }
        lane.packer = Some(packer);
        lane.ready.extend(made);
        match last {
            Ok(Packed::End) => lane.ended = true,
            Ok(_) => lane.fresh |= full || lane.streams.iter().any(|s| s.done.contains_key(&s.handed)),
            Err(error) => {
                lane.error = Some(error); // after the batches before it
                lane.ended = true;
            }
        }
        self.ready.notify_all();
        self.work.notify_all(); // segments were used up: streams may be claimed again
        state
    }
}

fn panicked() -> Error {
    Error::new(Kind::Bug, "a thread of the loader panicked: see standard error")
}

/// A panic, of a decoder or tokenizer that cannot bear its input, is an error as any other.
fn unless_it_panics<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(panicked()))
}
