//! From segments to batches: rows of `sequence + 1` tokens, disjoint windows of a segment; its last row is
//! filled up with end-of-text. A lane takes its rows from its sources in proportion to their weights.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::buffer::{Lease, Pool};
use crate::error::{Error, Result};
use crate::permutation::key;
use crate::segment::{Segment, Tokens};

/// The next row of a source in a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epoch of this source.
    pub epoch: u64,
    /// The lane's how-manieth block of the epoch.
    pub turn: u64,
    /// Segment in the block.
    pub segment: u64,
    /// Row in the segment.
    pub row: u64,
}

/// Where a lane stands: what a state consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneState {
    /// Batches delivered so far: of a rank's lanes the one with the fewest is next.
    pub batches: u64,
    /// Rows drawn so far: decides which source comes next.
    pub rows: u64,
    /// Next row of each source.
    pub sources: Vec<Position>,
}

/// Shape and options of batches.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Rows.
    pub batch: usize,
    /// Tokens a row, `sequence + 1`.
    pub row: usize,
    /// End-of-text, which also fills up.
    pub end: i32,
    /// Whether position ids are made.
    pub positions: bool,
    /// Whether segment ids are made.
    pub segments: bool,
    /// Whether an incomplete last batch is left out.
    pub drop_last: bool,
    /// Running weights of the sources, the last one 1.
    pub weights: Vec<f64>,
    /// Of the draw of sources.
    pub seed: u64,
}

/// int32 numbers of a batch.
#[derive(Clone, Debug)]
pub enum Data {
    /// In a buffer of ours.
    Pooled(Arc<Lease>),
    /// Rows of a mapped shard, from token `start` on.
    Mapped {
        /// The shard.
        map: Arc<memmap2::Mmap>,
        /// First token.
        start: usize,
        /// Tokens.
        count: usize,
    },
}

impl Data {
    /// The numbers, row after row.
    pub fn as_slice(&self) -> &[i32] {
        match self {
            Self::Pooled(lease) => lease.as_slice(),
            Self::Mapped { map, start, count } => crate::shards::numbers(map, *start, *count),
        }
    }
}

impl Data {
    /// The same numbers in memory of their own.
    pub fn copied(&self) -> Result<Self> {
        let numbers = self.as_slice();
        let mut lease = Pool::new(numbers.len(), 0, None).take()?;
        lease.as_mut_slice().copy_from_slice(numbers);
        Ok(Self::Pooled(Arc::new(lease)))
    }
}

/// One batch.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `[batch, sequence + 1]`
    pub tokens: Data,
    /// Position of each token in its document, from the start of the row at the earliest.
    pub positions: Option<Data>,
    /// Number of each token's document in its row, from 1; 0 where the row is filled up.
    pub segments: Option<Data>,
    /// `[batch]`: tokens of each row before it is filled up.
    pub lengths: Data,
    /// The lane it comes from.
    pub lane: u64,
    /// Tokens that fill up.
    pub padding: u64,
    /// Where the lane stands after it.
    pub state: LaneState,
}

/// Memory for batches of one shape.
#[derive(Clone, Debug)]
pub struct Pools {
    /// `[batch, sequence + 1]`
    pub large: Arc<Pool>,
    /// `[batch]`
    pub small: Arc<Pool>,
}

/// What packing came to.
pub enum Packed {
    /// A batch.
    Batch(Box<Batch>),
    /// More segments are needed.
    More,
    /// No further batch.
    End,
}

struct Current {
    position: Position,
    segment: Result<Segment>,
}

struct Queue {
    waiting: VecDeque<Current>,
    next: Position,
    ended: bool,
    used: u64,
    /// The epoch that is read, the rows it has given, and whether it is read from its start.
    epoch: u64,
    epoch_rows: u64,
    epoch_whole: bool,
}

impl Queue {
    fn from(next: Position) -> Self {
        let whole = Position { epoch: 0, ..next } == Position::default();
        Self {
            waiting: VecDeque::new(),
            next,
            ended: false,
            used: 0,
            epoch: next.epoch,
            epoch_rows: 0,
            epoch_whole: whole,
        }
    }

    /// Refuses to look for ever at a source that gives nothing.
    fn begin(&mut self, epoch: u64) -> Result<()> {
        if epoch == self.epoch {
            return Ok(());
        }
        if self.epoch_whole && self.epoch_rows == 0 {
            return Err(barren());
        }
        (self.epoch, self.epoch_rows, self.epoch_whole) = (epoch, 0, true);
        Ok(())
    }
}

/// A lane whose part of a source holds not one document.
pub fn barren() -> Error {
    Error::data("a lane read a whole epoch and found no text: all its documents are empty, or were left out")
}

struct Partial {
    tokens: Lease,
    positions: Option<Lease>,
    segments: Option<Lease>,
    lengths: Lease,
    rows: usize,
    padding: u64,
}

/// Packs the rows of one lane, in order.
pub struct Packer {
    lane: u64,
    batches: u64,
    rows: u64,
    queues: Vec<Queue>,
    partial: Option<Partial>,
    ended: bool,
}

impl Packer {
    /// From where a lane stands.
    pub fn new(lane: u64, state: &LaneState) -> Self {
        let queues = state.sources.iter().map(|next| Queue::from(*next)).collect();
        Self { lane, batches: state.batches, rows: state.rows, queues, partial: None, ended: false }
    }

    /// The next segment of a source, in order; an error is one when a row of it is wanted.
    pub fn push(&mut self, source: usize, position: Position, segment: Result<Segment>) {
        self.queues[source].waiting.push_back(Current { position, segment });
    }

    /// A source gives no more.
    pub fn end(&mut self, source: usize) {
        self.queues[source].ended = true;
    }

    /// Segments of a source that have been used up.
    pub fn used(&self, source: usize) -> u64 {
        self.queues[source].used
    }

    /// Where the lane stands, one batch further.
    fn advance(&mut self) -> LaneState {
        self.batches += 1;
        let sources = self.queues.iter().map(|queue| queue.next).collect();
        LaneState { batches: self.batches, rows: self.rows, sources }
    }

    fn pick(&self, shape: &Shape) -> usize {
        if self.queues.len() == 1 {
            return 0;
        }
        let draw = key(&[shape.seed, self.lane, self.rows]) as f64 / 18_446_744_073_709_551_616.0; // 2^64
        shape.weights.iter().position(|limit| draw < *limit).unwrap_or(self.queues.len() - 1)
    }

    /// The next batch, as far as the segments reach. After an error there is none.
    pub fn pack(&mut self, shape: &Shape, pools: &Pools) -> Result<Packed> {
        if self.ended {
            return Ok(Packed::End);
        }
        loop {
            let source = self.pick(shape);
            let queue = &mut self.queues[source];
            let Some(current) = queue.waiting.front_mut() else {
                if !queue.ended {
                    return Ok(Packed::More);
                }
                self.ended = true; // the first source that ends, ends the lane
                return match self.partial.take() {
                    Some(partial) if !shape.drop_last => Ok(Packed::Batch(Box::new(self.finish(partial, shape)))),
                    _ => Ok(Packed::End),
                };
            };
            let position = current.position;
            let segment = match &current.segment {
                Ok(segment) => segment,
                Err(error) => {
                    self.ended = true;
                    return Err(error.clone());
                }
            };
            let tokens = segment.tokens.as_slice().len();
            let start = position.row as usize * shape.row;
            if let Err(error) = queue.begin(position.epoch) {
                self.ended = true;
                return Err(error);
            }
            if start >= tokens {
                queue.next = Position { segment: position.segment + 1, row: 0, ..position };
                queue.used += 1;
                queue.waiting.pop_front();
                continue;
            }
            if self.partial.is_none()
                && self.queues.len() == 1
                && let Some(batch) = self.view(shape, pools, start)?
            {
                return Ok(Packed::Batch(Box::new(batch)));
            }
            let partial = match &mut self.partial {
                Some(partial) => partial,
                none => none.insert(Partial::new(shape, pools)?),
            };
            let queue = &mut self.queues[source];
            let Some(Current { position, segment: Ok(segment) }) = queue.waiting.front_mut() else { continue };
            partial.add(segment, start, shape);
            position.row += 1;
            queue.next = *position;
            queue.epoch_rows += 1;
            self.rows += 1;
            if partial.rows == shape.batch
                && let Some(partial) = self.partial.take()
            {
                return Ok(Packed::Batch(Box::new(self.finish(partial, shape))));
            }
        }
    }

    /// A whole batch that lies in a mapped shard as it is.
    fn view(&mut self, shape: &Shape, pools: &Pools, start: usize) -> Result<Option<Batch>> {
        let queue = &mut self.queues[0];
        let count = shape.batch * shape.row;
        let Some(Current { position, segment: Ok(segment) }) = queue.waiting.front_mut() else { return Ok(None) };
        let Tokens::Mapped { map, start: origin, count: tokens } = &segment.tokens else { return Ok(None) };
        if shape.positions || shape.segments || start + count > *tokens {
            return Ok(None);
        }
        let data = Data::Mapped { map: map.clone(), start: origin + start, count };
        let mut lengths = pools.small.take()?;
        lengths.as_mut_slice().fill(shape.row as i32);
        position.row += shape.batch as u64;
        queue.next = *position;
        queue.epoch_rows += shape.batch as u64;
        self.rows += shape.batch as u64;
        Ok(Some(Batch {
            tokens: data,
            positions: None,
            segments: None,
            lengths: Data::Pooled(Arc::new(lengths)),
            lane: self.lane,
            padding: 0,
            state: self.advance(),
        }))
    }

    fn finish(&mut self, mut partial: Partial, shape: &Shape) -> Batch {
        for _ in partial.rows..shape.batch {
            partial.fill_row(shape);
        }
        let data = |lease: Lease| Data::Pooled(Arc::new(lease));
        Batch {
            tokens: data(partial.tokens),
            positions: partial.positions.map(data),
            segments: partial.segments.map(data),
            lengths: data(partial.lengths),
            lane: self.lane,
            padding: partial.padding,
            state: self.advance(),
        }
    }
}

impl Partial {
    fn new(shape: &Shape, pools: &Pools) -> Result<Self> {
        let optional = |wanted: bool| wanted.then(|| pools.large.take()).transpose();
        Ok(Self {
            tokens: pools.large.take()?,
            positions: optional(shape.positions)?,
            segments: optional(shape.segments)?,
            lengths: pools.small.take()?,
            rows: 0,
            padding: 0,
        })
    }

    /// The row of a segment that starts at token `start`.
    fn add(&mut self, segment: &Segment, start: usize, shape: &Shape) {
        let all = segment.tokens.as_slice();
        let count = shape.row.min(all.len() - start);
        let out = self.rows * shape.row..(self.rows + 1) * shape.row;
        let row = &mut self.tokens.as_mut_slice()[out.clone()];
        row[..count].copy_from_slice(&all[start..start + count]);
        row[count..].fill(shape.end);
        self.lengths.as_mut_slice()[self.rows] = count as i32;
        self.padding += (shape.row - count) as u64;
        if self.positions.is_some() || self.segments.is_some() {
            let first = segment.ends.partition_point(|end| *end as usize <= start);
            let mut begin = 0;
            for (number, end) in segment.ends[first..].iter().enumerate() {
                let end = *end as usize - start;
                if begin >= count {
                    break;
                }
                let range = out.start + begin..out.start + end.min(count);
                if let Some(positions) = &mut self.positions {
                    for (i, position) in positions.as_mut_slice()[range.clone()].iter_mut().enumerate() {
                        *position = i as i32;
                    }
                }
                if let Some(segments) = &mut self.segments {
                    segments.as_mut_slice()[range].fill(number as i32 + 1);
                }
                begin = end;
            }
            for lease in [&mut self.positions, &mut self.segments].into_iter().flatten() {
                lease.as_mut_slice()[out.start + count..out.end].fill(0);
            }
        }
        self.rows += 1;
    }

    fn fill_row(&mut self, shape: &Shape) {
        let out = self.rows * shape.row..(self.rows + 1) * shape.row;
        self.tokens.as_mut_slice()[out.clone()].fill(shape.end);
        for lease in [&mut self.positions, &mut self.segments].into_iter().flatten() {
            lease.as_mut_slice()[out.clone()].fill(0);
        }
        self.lengths.as_mut_slice()[self.rows] = 0;
        self.padding += shape.row as u64;
        self.rows += 1;
    }
}

/// Running sums of weights, the last one 1. Refuses what is no weight.
pub fn running_weights(weights: &[f64]) -> Result<Vec<f64>> {
    let total: f64 = weights.iter().sum();
    if weights.iter().any(|w| !w.is_finite() || *w <= 0.0) || !total.is_finite() {
        return Err(Error::input(format!("weights {weights:?}: valid: numbers above 0")));
    }
    let mut sum = 0.0;
    Ok(weights
        .iter()
        .map(|w| {
            sum += w;
            sum / total
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(batch: usize, row: usize) -> Shape {
        Shape { batch, row, end: 9, positions: true, segments: true, drop_last: false, weights: vec![1.0], seed: 0 }
    }

    fn pools(shape: &Shape) -> Pools {
        Pools { large: Pool::new(shape.batch * shape.row, 4, None), small: Pool::new(shape.batch, 4, None) }
    }

    #[expect(clippy::unnecessary_wraps, reason = "as `push` takes it")]
    fn segment(tokens: &[i32], ends: &[u32]) -> Result<Segment> {
        Ok(Segment { tokens: Tokens::Owned(Arc::new(tokens.to_vec())), ends: ends.to_vec() })
    }

    fn batch(packer: &mut Packer, shape: &Shape, pools: &Pools) -> Batch {
        match packer.pack(shape, pools).unwrap() {
            Packed::Batch(batch) => *batch,
            _ => panic!("no batch"),
        }
    }

    #[test]
    fn rows_positions_segments_and_padding() {
        let shape = shape(2, 4);
        let pools = pools(&shape);
        let mut packer = Packer::new(0, &LaneState { batches: 0, rows: 0, sources: vec![Position::default()] });
        packer.push(0, Position::default(), segment(&[1, 9, 2, 3, 4, 9], &[2, 6]));
        packer.push(0, Position { turn: 1, ..Position::default() }, segment(&[5, 9], &[2]));
        packer.end(0);
        let first = batch(&mut packer, &shape, &pools);
        assert_eq!(first.tokens.as_slice(), [1, 9, 2, 3, 4, 9, 9, 9]);
        assert_eq!(first.positions.unwrap().as_slice(), [0, 1, 0, 1, 0, 1, 0, 0]);
        assert_eq!(first.segments.unwrap().as_slice(), [1, 1, 2, 2, 1, 1, 0, 0]);
        assert_eq!((first.lengths.as_slice(), first.padding), (&[4, 2][..], 2));
        assert_eq!(first.state.sources[0], Position { epoch: 0, turn: 0, segment: 0, row: 2 });
        let last = batch(&mut packer, &shape, &pools);
        assert_eq!(last.tokens.as_slice(), [5, 9, 9, 9, 9, 9, 9, 9]);
        assert_eq!((last.lengths.as_slice(), last.padding), (&[2, 0][..], 6));
        assert!(matches!(packer.pack(&shape, &pools).unwrap(), Packed::End));
    }

    #[test]
    fn a_source_that_is_late_is_waited_for_and_the_incomplete_batch_may_be_left_out() {
        let shape = Shape { drop_last: true, ..shape(2, 2) };
        let pools = pools(&shape);
        let mut packer = Packer::new(0, &LaneState { batches: 0, rows: 0, sources: vec![Position::default()] });
        packer.push(0, Position::default(), segment(&[1, 9], &[2]));
        assert!(matches!(packer.pack(&shape, &pools).unwrap(), Packed::More));
        packer.end(0);
        assert!(matches!(packer.pack(&shape, &pools).unwrap(), Packed::End));
    }

    #[test]
    fn weights_are_kept_to() {
        let shape =
            Shape { weights: running_weights(&[3.0, 1.0]).unwrap(), positions: false, segments: false, ..shape(1, 1) };
        let pools = pools(&shape);
        let mut packer = Packer::new(3, &LaneState { batches: 0, rows: 0, sources: vec![Position::default(); 2] });
        packer.push(0, Position::default(), segment(&[0; 4000], &[4000]));
        packer.push(1, Position::default(), segment(&[1; 4000], &[4000]));
        let ones: i32 = (0..4000).map(|_| batch(&mut packer, &shape, &pools).tokens.as_slice()[0]).sum();
        assert!((900..1100).contains(&ones), "{ones}");
        assert!(running_weights(&[1.0, 0.0]).is_err());
    }

    #[test]
    fn an_error_comes_where_its_rows_are_wanted_and_not_before() {
        let shape =
            Shape { weights: running_weights(&[1.0, 1e-9]).unwrap(), positions: false, segments: false, ..shape(1, 2) };
        let pools = pools(&shape);
        let mut packer = Packer::new(0, &LaneState { batches: 0, rows: 0, sources: vec![Position::default(); 2] });
        packer.push(1, Position::default(), Err(Error::data("bad"))); // of the source that is hardly ever drawn
        packer.push(0, Position::default(), segment(&[1, 2, 3, 4, 5, 9], &[6]));
        let next = Position { turn: 1, ..Position::default() };
        packer.push(0, next, Err(Error::data("worse")));
        for _ in 0..3 {
            batch(&mut packer, &shape, &pools);
        }
        assert_eq!(packer.pack(&shape, &pools).err().unwrap().message, "worse");
        assert!(matches!(packer.pack(&shape, &pools), Ok(Packed::End)));
    }

    #[test]
    fn an_epoch_without_a_row_is_an_error() {
        let shape = shape(1, 2);
        let pools = pools(&shape);
        let mut packer = Packer::new(0, &LaneState { batches: 0, rows: 0, sources: vec![Position::default()] });
        packer.push(0, Position::default(), segment(&[], &[]));
        packer.push(0, Position { epoch: 1, ..Position::default() }, segment(&[], &[]));
        assert!(packer.pack(&shape, &pools).err().unwrap().message.contains("no text"));
    }
}
