//! Pre-tokenized shards: `NAME.tokens` holds little-endian int32 ids, each document followed by end-of-text;
//! `NAME.tokens.ends` the running number of tokens after each document, as little-endian u64; `index.json`
//! says which tokenizer made them, with a hash of each file.

use std::fs::File as LocalFile;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::source::Entry;
use crate::stop::Stop;
use crate::store::Store;

/// How the files of tokens end.
pub const SUFFIX: &str = ".tokens";
const INDEX: &str = "index.json";
const TOKENS_A_SHARD: usize = 1 << 28;
const BYTES_A_TOKEN: u64 = 4;

/// What `index.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    format: String,
    version: u32,
    /// Id of end-of-text.
    pub end: u32,
    /// blake3 of the tokenizer.json.
    pub tokenizer: String,
    /// Its shards, in order.
    pub shards: Vec<HeaderEntry>,
}

/// One shard of `index.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderEntry {
    /// File name in the same directory.
    pub file: String,
    /// Documents in it.
    pub documents: u64,
    /// Tokens in it, end-of-text included.
    pub tokens: u64,
    /// blake3 of the file of tokens.
    pub blake3: String,
}

impl Header {
    /// As `index.json` has it.
    ///
    /// # Panics
    /// Never: it is plain data.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data")
    }
}

const FORMAT: &str = "stackbench-tokens";
const VERSION: u32 = 1;

/// A shard, mapped.
#[derive(Debug)]
pub struct Shard {
    /// Documents in it.
    pub documents: u64,
    name: String,
    tokens: Arc<memmap2::Mmap>,
    ends: memmap2::Mmap,
}

impl Shard {
    /// Of bytes that need not be a shard.
    pub fn from_bytes(tokens: &[u8], ends: &[u8]) -> std::io::Result<Self> {
        let mapped = |bytes: &[u8]| {
            let mut map = memmap2::MmapMut::map_anon(bytes.len().max(1))?;
            map[..bytes.len()].copy_from_slice(bytes);
            map.make_read_only()
        };
        let documents = ends.len() as u64 / 8;
        Ok(Self { documents, name: "memory".into(), tokens: Arc::new(mapped(tokens)?), ends: mapped(ends)? })
    }

    /// Documents of a block that holds about `bytes` of text (four bytes a token).
    pub fn documents_a_block(&self, bytes: u64) -> u64 {
        let tokens = (self.tokens.len() as u64 / BYTES_A_TOKEN).max(1);
        let aim = u128::from(bytes / BYTES_A_TOKEN) * u128::from(self.documents) / u128::from(tokens);
        u64::try_from(aim).unwrap_or(u64::MAX).clamp(1, self.documents.max(1))
    }

    fn end(&self, document: u64) -> u64 {
        number(&self.ends, document as usize)
    }

    /// Tokens of documents `first..first + count`: where they lie, and the end of each, counted from there.
    pub fn run(&self, first: u64, count: u64) -> Result<(Arc<memmap2::Mmap>, usize, usize, Vec<u32>)> {
        let start = if first == 0 { 0 } else { self.end(first - 1) };
        let mut ends = Vec::with_capacity(count as usize);
        let mut last = start;
        for document in first..first + count {
            let end = self.end(document);
            let length = u32::try_from(end.saturating_sub(start));
            let Some(length) = length.ok().filter(|_| end >= last && end <= self.tokens.len() as u64 / BYTES_A_TOKEN)
            else {
                let message = format!("document {document} ends at token {end}: the index is not of this shard");
                return Err(Error::data(message).in_file(&self.name));
            };
            ends.push(length);
            last = end;
        }
        Ok((self.tokens.clone(), start as usize, (last - start) as usize, ends))
    }
}

/// The `i`-th of mapped or read little-endian numbers.
pub fn number(bytes: &[u8], i: usize) -> u64 {
    bytes[8 * i..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight))
}

/// `count` tokens from token `start` of a mapped shard.
pub fn numbers(map: &memmap2::Mmap, start: usize, count: usize) -> &[i32] {
    let bytes = &map[4 * start..4 * (start + count)];
    // SAFETY: every bit pattern is an i32 (the format is little-endian, as are the machines that this crate
    // supports: see the check in lib.rs).
    let (before, numbers, after) = unsafe { bytes.align_to::<i32>() };
    assert!(before.is_empty() && after.is_empty(), "a mapped file starts on a page");
    numbers
}

/// Opens the shards of a manifest, which must be as long as their index says.
pub fn open_all(store: &Store, files: &[Entry], stop: &Stop) -> Result<Vec<Shard>> {
    let mut indexes: std::collections::BTreeMap<PathBuf, Header> = std::collections::BTreeMap::new();
    let mut shards = Vec::with_capacity(files.len());
    for entry in files {
        let Some(path) = store.local_path(&entry.name) else {
            let message = "shards are mapped: copy them to a local path first";
            return Err(Error::input(message).in_file(&entry.name));
        };
        store.file(&entry.name, &entry.stamp, stop)?; // still the one of the manifest
        let directory = path.parent().unwrap_or(Path::new("")).to_owned();
        let index = match indexes.entry(directory) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let read = header(new.key())?;
                new.insert(read)
            }
        };
        let (tokens, ends) = (map(&path)?, map(&path.with_extension("tokens.ends"))?);
        let Some(said) = index.shards.iter().find(|said| path.file_name().is_some_and(|name| *name == *said.file))
        else {
            return Err(Error::data("index.json does not name this shard").in_file(&entry.name));
        };
        let documents = ends.len() as u64 / 8;
        let whole = ends.len() as u64 == said.documents.saturating_mul(8)
            && tokens.len() as u64 == said.tokens.saturating_mul(BYTES_A_TOKEN)
            && documents.checked_sub(1).map_or(0, |last| number(&ends, last as usize)) == said.tokens;
        if !whole {
            let message = "truncated, or of another corpus: its length is not the one in index.json";
            return Err(Error::data(message).in_file(&entry.name));
        }
        shards.push(Shard { documents, name: entry.name.clone(), tokens: Arc::new(tokens), ends });
    }
    Ok(shards)
}

/// The header of a directory of shards.
pub fn header(directory: &Path) -> Result<Header> {
    let path = directory.join(INDEX);
    let place = path.to_string_lossy().into_owned();
    let text = std::fs::read(&path).map_err(|e| Error::from(e).in_file(&place))?;
    parse_header(&text).map_err(|e| e.in_file(&place))
}

/// The header from the content of an `index.json`.
pub fn parse_header(text: &[u8]) -> Result<Header> {
    let header: Header = serde_json::from_slice(text).map_err(|e| Error::data(format!("no index of shards: {e}")))?;
    if header.format != FORMAT || header.version != VERSION {
        let message = format!("{} version {}; valid: {FORMAT} version {VERSION}", header.format, header.version);
        return Err(Error::data(message));
    }
    if i32::try_from(header.end).is_err() {
        return Err(Error::data(format!("end-of-text {}: valid: an id below 2^31", header.end)));
    }
    Ok(header)
}

fn map(path: &Path) -> Result<memmap2::Mmap> {
    let fail = |e: std::io::Error| Error::from(e).in_file(&path.to_string_lossy());
    let file = LocalFile::open(path).map_err(fail)?;
    // SAFETY: shards are written once, by rename; whoever truncates one in place gets SIGBUS, as with any
    // mapped file, and the manifest's stamp is checked when it is opened.
    let map = unsafe { memmap2::Mmap::map(&file).map_err(fail)? };
    let _ = map.advise(memmap2::Advice::WillNeed);
    Ok(map)
}

/// Writes shards; `finish` makes them valid.
pub struct Writer {
    directory: PathBuf,
    header: Header,
    current: Option<Current>,
    made: Vec<PathBuf>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        for path in &self.made {
            let _ = std::fs::remove_file(path); // not finished: half a corpus is none
        }
    }
}

struct Current {
    tokens: BufWriter<LocalFile>,
    ends: BufWriter<LocalFile>,
    hasher: blake3::Hasher,
    count: u64,
    documents: u64,
}

impl Writer {
    /// Into a directory that is made, and must be empty.
    pub fn create(directory: &Path, end: u32, tokenizer: &str) -> Result<Self> {
        let fail = |e: std::io::Error| Error::from(e).in_file(&directory.to_string_lossy());
        std::fs::create_dir_all(directory).map_err(fail)?;
        if std::fs::read_dir(directory).map_err(fail)?.next().is_some() {
            let message = "the directory is not empty; valid: a new one";
            return Err(Error::input(message).in_file(&directory.to_string_lossy()));
        }
        let header =
            Header { format: FORMAT.into(), version: VERSION, end, tokenizer: tokenizer.into(), shards: Vec::new() };
        Ok(Self { directory: directory.to_owned(), header, current: None, made: Vec::new() })
    }

    /// Whole documents, each with its end-of-text; `ends` counts from the first token given.
    pub fn add(&mut self, tokens: &[i32], ends: &[u32]) -> Result<()> {
        if self.current.as_ref().is_some_and(|c| c.count as usize + tokens.len() > TOKENS_A_SHARD) {
            self.close_shard()?;
        }
        let current = match &mut self.current {
            Some(current) => current,
            none => {
                let path = self.directory.join(format!("shard-{:05}{SUFFIX}", self.header.shards.len()));
                let ends = path.with_extension("tokens.ends");
                self.made.extend([path.clone(), ends.clone()]);
                none.insert(Current {
                    ends: BufWriter::new(LocalFile::create(ends)?),
                    tokens: BufWriter::new(LocalFile::create(path)?),
                    hasher: blake3::Hasher::new(),
                    count: 0,
                    documents: 0,
                })
            }
        };
        let mut bytes = Vec::with_capacity(4 * tokens.len());
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        current.hasher.update(&bytes);
        current.tokens.write_all(&bytes)?;
        for end in ends {
            current.ends.write_all(&(current.count + u64::from(*end)).to_le_bytes())?;
        }
        current.count += tokens.len() as u64;
        current.documents += ends.len() as u64;
        Ok(())
    }

    fn name(&self) -> String {
        format!("shard-{:05}{SUFFIX}", self.header.shards.len())
    }

    fn close_shard(&mut self) -> Result<()> {
        let Some(mut current) = self.current.take() else { return Ok(()) };
        for file in [&mut current.tokens, &mut current.ends] {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        let entry = HeaderEntry {
            file: self.name(),
            documents: current.documents,
            tokens: current.count,
            blake3: current.hasher.finalize().to_hex().to_string(),
        };
        self.header.shards.push(entry);
        Ok(())
    }

    /// Closes the last shard and writes the index. Refuses a corpus without a document.
    pub fn finish(mut self) -> Result<Header> {
        self.close_shard()?;
        if self.header.shards.iter().all(|shard| shard.documents == 0) {
            return Err(Error::new(Kind::Data, "no document to write"));
        }
        crate::source::write_atomic(&self.directory.join(INDEX), self.header.to_json().as_bytes())?;
        self.made.clear();
        Ok(self.header.clone())
    }
}
