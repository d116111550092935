//! From a block to a segment: read, decode, tokenize. Everything here is a pure function of the files.

use std::io::{BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow_array::RecordBatch;
use bytes::Bytes;

use crate::error::{Error, Kind, Result};
use crate::json;
use crate::parquet_file::{self, GroupReader};
use crate::permutation::{Permutation, key};
use crate::source::{Block, Documents, Index, Shuffle, Source};
use crate::stats::{Clock, Stage, Stats};
use crate::stop::Stop;
use crate::store::File;
use crate::tokenizer::Tokenizer;

/// A record may be this long, bytes.
pub const LONGEST_RECORD: usize = 1 << 28;
const TAIL: usize = 1 << 16;
const PIECE: usize = 1 << 20;

/// What happens to data that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The batch that would have held it is an error.
    Error,
    /// The record, or the rest of an unreadable block, is left out, counted and listed.
    Skip,
}

/// What all threads read.
#[derive(Debug)]
pub struct Common {
    /// Key or column of the text.
    pub field: String,
    /// Policy for data that cannot be read.
    pub on_error: OnError,
    /// Order of documents.
    pub shuffle: Shuffle,
    /// Counters.
    pub stats: Stats,
    /// Ends everything.
    pub stop: Stop,
}

/// Text as it was read.
pub enum Raw {
    /// Whole lines of a file: `bytes[skip..]`, where `bytes` begin at byte `start`.
    Lines { file: String, start: u64, skip: usize, bytes: Vec<u8> },
    /// Lines of several files.
    Several(Vec<Raw>),
    /// Rows of Parquet.
    Rows(RecordBatch),
    /// One document each, with its file.
    Texts(Vec<(String, Bytes)>),
    /// Lines picked one by one, each with its file and its first byte.
    Picked(Vec<(usize, u64, Bytes)>),
    /// Tokens that need no work.
    Tokens(Segment),
}

/// Tokens of a segment: each document followed by end-of-text.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The tokens.
    pub tokens: Tokens,
    /// Running number of tokens after each document.
    pub ends: Vec<u32>,
}

/// Tokens in memory or in a mapped shard.
#[derive(Clone, Debug)]
pub enum Tokens {
    /// Made by us.
    Owned(Arc<Vec<i32>>),
    /// `count` tokens from token `start` of a mapped file.
    Mapped { map: Arc<memmap2::Mmap>, start: usize, count: usize },
}

impl Tokens {
    /// All of them.
    pub fn as_slice(&self) -> &[i32] {
        match self {
            Self::Owned(tokens) => tokens,
            Self::Mapped { map, start, count } => crate::shards::numbers(map, *start, *count),
        }
    }
}

// ------------------------------------------------------------------------------------------------ reading
/// Reads the segments of one block in order.
pub enum BlockReader {
    /// A block of one segment, until it has been read.
    Single(Option<Block>),
    /// A compressed file.
    Compressed(Box<LineStream>),
    /// A row group.
    Group(Box<GroupReader>),
}

impl BlockReader {
    /// Opens a block at one of its segments.
    pub fn open(source: &Source, block: Block, segment: u64, common: &Common) -> Result<Self> {
        match block {
            Block::Compressed { file } => {
                let file = source.file(file, &common.stop)?;
                let mut stream = LineStream::open(file, source.manifest.segment_bytes as usize)?;
                for _ in 0..segment {
                    common.stop.check()?;
                    stream.next()?;
                }
                Ok(Self::Compressed(Box::new(stream)))
            }
            Block::Group { file, group } => {
                let (rows, bytes) = source.manifest.files[file].groups[group];
                let segments = bytes.div_ceil(source.manifest.segment_bytes.max(1)).max(1);
                let rows = rows.div_ceil(segments).max(1);
                let file = source.file(file, &common.stop)?;
                let reader = GroupReader::open(file, &common.field, group, rows, segment)?;
                Ok(Self::Group(Box::new(reader)))
            }
            single => Ok(Self::Single((segment == 0).then_some(single))),
        }
    }

    /// The next segment's text; None after the last.
    pub fn next(&mut self) -> Result<Option<Work>> {
        Ok(match self {
            Self::Single(block) => block.take().map(Work::Block),
            Self::Compressed(stream) => stream.next()?.map(Work::Raw),
            Self::Group(reader) => reader.next()?.map(|batch| Work::Raw(Raw::Rows(batch))),
        })
    }
}

/// What a thread has to do for one segment.
pub enum Work {
    /// Read it too.
    Block(Block),
    /// It has been read.
    Raw(Raw),
}

/// Lines of a compressed file: a segment is as many as reach the target, wherever the decoder pauses.
pub struct LineStream {
    name: String,
    decoder: zstd::stream::read::Decoder<'static, BufReader<FileStream>>,
    carry: Vec<u8>,
    position: u64,
    target: usize,
    done: bool,
}

struct FileStream {
    file: File,
    position: u64,
}

impl Read for FileStream {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let length = (self.file.size() - self.position).min(out.len() as u64) as usize;
        if length > 0 {
            let bytes = self.file.read(self.position, length).map_err(std::io::Error::other)?;
            out[..length].copy_from_slice(&bytes);
            self.position += length as u64;
        }
        Ok(length)
    }
}

impl LineStream {
    pub(crate) fn open(file: File, target: usize) -> Result<Self> {
        let name = file.name().to_owned();
        let buffered = BufReader::with_capacity(1 << 18, FileStream { file, position: 0 });
        let decoder = zstd::stream::read::Decoder::with_buffer(buffered).map_err(|e| Error::from(e).in_file(&name))?;
        Ok(Self { name, decoder, carry: Vec::new(), position: 0, target: target.max(1), done: false })
    }

    pub(crate) fn next(&mut self) -> Result<Option<Raw>> {
        let mut bytes = std::mem::take(&mut self.carry);
        let mut known = self.target - 1; // the line that holds this byte is the last
        loop {
            if known < bytes.len() {
                if let Some(i) = memchr::memchr(b'\n', &bytes[known..]) {
                    self.carry = bytes.split_off(known + i + 1);
                    break;
                }
                known = bytes.len();
            }
            if self.done {
                break;
            }
            if bytes.len() > LONGEST_RECORD.max(self.target) {
                return Err(too_long("a line").in_file(&self.name).at(format!("byte {} of the text", self.position)));
            }
            let from = bytes.len();
            bytes.resize(from + self.target.saturating_sub(from).clamp(TAIL, PIECE), 0);
            let got = self.decoder.read(&mut bytes[from..]).map_err(|error| self.wrong(&error, from))?;
            bytes.truncate(from + got);
            self.done = got == 0;
        }
        let start = self.position;
        self.position += bytes.len() as u64;
        Ok((!bytes.is_empty()).then(|| Raw::Lines { file: self.name.clone(), start, skip: 0, bytes }))
    }

    fn wrong(&self, error: &std::io::Error, read: usize) -> Error {
        let place = format!("byte {} of the text", self.position + read as u64);
        if let Some(ours) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            return ours.clone().in_file(&self.name).at(place); // the file could not be read
        }
        Error::data(format!("not zstd that can be read: {error}")).in_file(&self.name).at(place)
    }
}

/// Reads a block of one segment. `order` permutes the documents of `Shuffle::Global`.
pub fn read(source: &Source, block: Block, order: u64, common: &Common) -> Result<Raw> {
    match block {
        Block::Lines { file, start, end } => read_lines(&source.file(file, &common.stop)?, start, end),
        Block::Small { first, count } => {
            let mut parts = Vec::with_capacity(count);
            for index in first..first + count {
                let lines = source.file(index, &common.stop).and_then(|file| read_lines(&file, 0, file.size()));
                match lines {
                    Ok(lines) => parts.push(lines),
                    Err(error) => leave_out(error, common)?,
                }
            }
            Ok(Raw::Several(parts))
        }
        Block::Files { first, count } => {
            let mut texts = Vec::with_capacity(count);
            for index in first..first + count {
                match read_whole(source, index, common) {
                    Ok(text) => texts.push(text),
                    Err(error) => leave_out(error, common)?,
                }
            }
            Ok(Raw::Texts(texts))
        }
        Block::Shard { file, first, count } => {
            let (map, start, tokens, ends) = source.shards[file].run(first, count)?;
            // In this thread, so that the consumer meets no page fault; a kernel that cannot changes nothing else.
            let _ = map.advise_range(memmap2::Advice::PopulateRead, 4 * start, 4 * tokens);
            Ok(Raw::Tokens(Segment { tokens: Tokens::Mapped { map, start, count: tokens }, ends }))
        }
        Block::Permuted { first, count } => read_permuted(source, &source.permuted(first, count, order), common),
        Block::Compressed { .. } | Block::Group { .. } => unreachable!("read in order by BlockReader"),
    }
}

/// By policy counts and lists what cannot be read, or hands the error on.
pub fn leave_out(error: Error, common: &Common) -> Result<()> {
    if common.on_error == OnError::Error || error.kind == Kind::Misuse || common.stop.is_set() {
        return Err(error);
    }
    common.stats.skip(&error);
    Ok(())
}

fn too_long(what: &str) -> Error {
    Error::data(format!("{what} of more than {} MiB", LONGEST_RECORD >> 20))
}

fn read_whole(source: &Source, index: usize, common: &Common) -> Result<(String, Bytes)> {
    let file = source.file(index, &common.stop)?;
    if file.size() as usize > LONGEST_RECORD {
        return Err(too_long("a document").in_file(file.name()));
    }
    Ok((file.name().to_owned(), file.read(0, file.size() as usize)?))
}

/// Lines whose first byte lies in `start..end`: the last of them may reach beyond.
fn read_lines(file: &File, start: u64, end: u64) -> Result<Raw> {
    let from = start.saturating_sub(1); // a line starts at `start` only if the byte before ends one
    let ahead = (end + TAIL as u64).min(file.size());
    let mut bytes = SCRATCH.take();
    file.read_into(from, (ahead - from) as usize, &mut bytes)?;
    let name = file.name().to_owned();
    let first = if start == 0 { Some(0) } else { memchr::memchr(b'\n', &bytes).map(|i| i + 1) };
    let Some(skip) = first.filter(|skip| from + (*skip as u64) < end) else {
        bytes.clear();
        return Ok(Raw::Lines { file: name, start, skip: 0, bytes });
    };
    let mut known = (end - 1 - from) as usize; // the last byte at which a line of ours may start
    let longest = LONGEST_RECORD.max((end - start) as usize);
    while known < bytes.len() {
        if let Some(i) = memchr::memchr(b'\n', &bytes[known..]) {
            bytes.truncate(known + i + 1);
            break;
        }
        known = bytes.len();
        if known > longest {
            return Err(too_long("a line").in_file(&name).at(format!("line after byte {end}")));
        }
        let position = from + known as u64;
        bytes.extend_from_slice(&file.read(position, known.max(TAIL).min((file.size() - position) as usize))?);
    }
    Ok(Raw::Lines { file: name, start: from, skip, bytes })
}

thread_local! {
    /// Memory for the text of a segment, used again by its thread.
    static SCRATCH: std::cell::Cell<Vec<u8>> = const { std::cell::Cell::new(Vec::new()) };
}

impl Raw {
    /// Bytes of text, about.
    fn len(&self) -> usize {
        match self {
            Self::Lines { bytes, .. } => bytes.len(),
            Self::Several(parts) => parts.iter().map(Self::len).sum(),
            Self::Rows(batch) => batch.get_array_memory_size(),
            Self::Texts(texts) => texts.iter().map(|(_, bytes)| bytes.len()).sum(),
            Self::Picked(lines) => lines.iter().map(|(_, _, bytes)| bytes.len()).sum(),
            Self::Tokens(_) => 0,
        }
    }

    /// Its memory may be used for the next segment of this thread.
    fn give_back(self) {
        if let Self::Lines { bytes, .. } = self
            && bytes.capacity() <= 64 << 20
        {
            SCRATCH.set(bytes);
        }
    }
}

fn read_permuted(source: &Source, documents: &[u64], common: &Common) -> Result<Raw> {
    let Some(index) = &source.documents else { return Err(Error::input("this source has no index")) };
    match index {
        Documents::Files => {
            let mut texts = Vec::with_capacity(documents.len());
            for index in documents {
                match read_whole(source, *index as usize, common) {
                    Ok(text) => texts.push(text),
                    Err(error) => leave_out(error, common)?,
                }
            }
            Ok(Raw::Texts(texts))
        }
        Documents::Starts(index) => {
            let mut files: Vec<Option<File>> = Vec::new();
            files.resize_with(source.manifest.files.len(), || None);
            let mut lines = Vec::with_capacity(documents.len());
            for document in documents {
                match read_line(source, index, *document as usize, &mut files, common) {
                    Ok(line) => lines.push(line),
                    Err(error) => leave_out(error, common)?,
                }
            }
            Ok(Raw::Picked(lines))
        }
        Documents::Shards(before) => {
            let mut tokens = Vec::new();
            let mut ends = Vec::with_capacity(documents.len());
            for document in documents {
                common.stop.check()?;
                let shard = before.partition_point(|count| count <= document) - 1;
                let (map, start, count, _) = source.shards[shard].run(document - before[shard], 1)?;
                tokens.extend_from_slice(Tokens::Mapped { map, start, count }.as_slice());
                ends.push(tokens.len() as u32);
            }
            Ok(Raw::Tokens(Segment { tokens: Tokens::Owned(Arc::new(tokens)), ends }))
        }
    }
}

/// One line by its number in the index, from the files that are open already or from one more.
fn read_line(
    source: &Source,
    index: &Index,
    document: usize,
    files: &mut [Option<File>],
    common: &Common,
) -> Result<(usize, u64, Bytes)> {
    common.stop.check()?;
    let (start, end) = (index.at(document), index.at(document + 1));
    let number = source.offsets.partition_point(|offset| *offset <= start) - 1;
    let before = source.offsets[number];
    let (start, end) = (start - before, end.min(source.offsets[number + 1]) - before);
    let file = match &mut files[number] {
        Some(file) => file,
        none => none.insert(source.file(number, &common.stop)?),
    };
    if end - start > LONGEST_RECORD as u64 {
        return Err(too_long("a line").in_file(file.name()).at(format!("line at byte {start}")));
    }
    Ok((number, start, file.read(start, (end - start) as usize)?))
}

// ------------------------------------------------------------------------------------ decode and tokenize
/// Text to tokens. `order` permutes the documents of the segment under `Shuffle::Block`.
pub fn tokenize(
    source: &Source,
    raw: Raw,
    tokenizer: Option<&Tokenizer>,
    order: u64,
    common: &Common,
) -> Result<Segment> {
    let stats = &common.stats;
    let raw = match raw {
        Raw::Tokens(segment) => {
            stats.documents.fetch_add(segment.ends.len() as u64, Ordering::Relaxed);
            stats.tokens.fetch_add(segment.tokens.as_slice().len() as u64, Ordering::Relaxed);
            return Ok(if common.shuffle == Shuffle::Block { reordered(&segment, order) } else { segment });
        }
        raw => raw,
    };
    let Some(tokenizer) = tokenizer else { return Err(Error::input("text needs a tokenizer")) };
    let end = tokenizer.end.cast_signed();
    let mut tokens = Vec::with_capacity(raw.len() / 3);
    let mut ends = Vec::new();
    let mut text_bytes = 0;
    // Document by document, so that text is still in the core's own cache when it is tokenized.
    let mut clock = Clock::start();
    each_document(source, &raw, order, common, |text| {
        clock.lap(Stage::Decode);
        tokenizer.encode(text, &mut tokens)?;
        tokens.push(end);
        ends.push(tokens.len() as u32);
        text_bytes += text.len();
        clock.lap(Stage::Tokenize);
        Ok(())
    })?;
    raw.give_back();
    clock.lap(Stage::Decode);
    stats.add(&clock);
    stats.documents.fetch_add(ends.len() as u64, Ordering::Relaxed);
    stats.text_bytes.fetch_add(text_bytes as u64, Ordering::Relaxed);
    stats.tokens.fetch_add(tokens.len() as u64, Ordering::Relaxed);
    Ok(Segment { tokens: Tokens::Owned(Arc::new(tokens)), ends })
}

/// Where one document lies, before it is decoded.
enum Item<'a> {
    /// A line of JSON, with its file and first byte.
    Line(&'a str, u64, &'a [u8]),
    /// A whole file.
    File(&'a str, &'a [u8]),
    /// A value of a column.
    Text(&'a str),
}

/// Calls `use_` with each document that has text, in the order of the segment.
pub fn each_document(
    source: &Source,
    raw: &Raw,
    order: u64,
    common: &Common,
    mut use_: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut items = items(source, raw);
    if common.shuffle == Shuffle::Block {
        permute(&mut items, order);
    }
    let mut scratch = Vec::new();
    for item in items {
        common.stop.check()?;
        let text = match item {
            Item::Text(text) => Ok(Some(text)),
            Item::Line(file, at, line) => json::text(line, &common.field, &mut scratch)
                .map_err(|e| e.in_file(file).at(format!("line at byte {at}"))),
            Item::File(file, bytes) => simdutf8::compat::from_utf8(bytes)
                .map(Some)
                .map_err(|e| Error::data(format!("not UTF-8: {e}")).in_file(file)),
        };
        match text {
            Ok(Some(text)) if !text.is_empty() => use_(text)?,
            Ok(_) => {
                common.stats.empty.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => leave_out(error, common)?,
        }
    }
    Ok(())
}

fn items<'a>(source: &'a Source, raw: &'a Raw) -> Vec<Item<'a>> {
    match raw {
        Raw::Lines { file, start, skip, bytes } => {
            let mut found = Vec::new();
            let (mut position, start) = (0, start + *skip as u64);
            let bytes = &bytes[*skip..];
            for at in memchr::memchr_iter(b'\n', bytes).chain([bytes.len()]) {
                let line = &bytes[position.min(at)..at];
                if !line.iter().all(u8::is_ascii_whitespace) {
                    found.push(Item::Line(file, start + position as u64, line));
                }
                position = at + 1;
            }
            found
        }
        Raw::Several(parts) => parts.iter().flat_map(|part| items(source, part)).collect(),
        Raw::Picked(lines) => {
            lines.iter().map(|(number, at, line)| Item::Line(&source.manifest.files[*number].name, *at, line)).collect()
        }
        Raw::Texts(texts) => texts.iter().map(|(file, bytes)| Item::File(file, bytes)).collect(),
        Raw::Rows(batch) => parquet_file::texts(batch).into_iter().map(|text| Item::Text(text.unwrap_or(""))).collect(),
        Raw::Tokens(_) => Vec::new(),
    }
}

fn permute<T>(items: &mut Vec<T>, order: u64) {
    if items.is_empty() {
        return;
    }
    let permutation = Permutation::new(items.len() as u64, key(&[order, 1]));
    let mut old: Vec<Option<T>> = items.drain(..).map(Some).collect();
    items.extend((0..old.len()).filter_map(|i| old[permutation.at(i as u64) as usize].take()));
}

fn reordered(segment: &Segment, order: u64) -> Segment {
    let all = segment.tokens.as_slice();
    let starts = std::iter::once(0).chain(segment.ends.iter().map(|end| *end as usize));
    let mut runs: Vec<&[i32]> = starts.zip(&segment.ends).map(|(start, end)| &all[start..*end as usize]).collect();
    permute(&mut runs, order);
    let mut ends = Vec::with_capacity(runs.len());
    let mut tokens = Vec::with_capacity(all.len());
    for run in runs {
        tokens.extend_from_slice(run);
        ends.push(tokens.len() as u32);
    }
    Segment { tokens: Tokens::Owned(Arc::new(tokens)), ends }
}
