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
    /// Documents of a block that holds about `bytes` of text (four bytes a token).
    pub fn documents_a_block(&self, bytes: u64) -> u64 {
        let tokens = (self.tokens.len() as u64 / BYTES_A_TOKEN).max(1);
        (bytes / BYTES_A_TOKEN * self.documents / tokens).clamp(1, self.documents.max(1))
    }

    fn end(&self, document: u64) -> u64 {
        let i = 8 * document as usize;
        u64::from_le_bytes(self.ends[i..i + 8].try_into().expect("eight bytes"))
    }

    /// Tokens of documents `first..first + count`: where they lie, and the end of each, counted from there.
    pub fn run(&self, first: u64, count: u64) -> Result<(Arc<memmap2::Mmap>, usize, usize, Vec<u32>)> {
        let start = if first == 0 { 0 } else { self.end(first - 1) };
        let mut ends = Vec::with_capacity(count as usize);
        let mut last = start;
        for document in first..first + count {
            let end = self.end(document);
            if end < last || end * BYTES_A_TOKEN > self.tokens.len() as u64 {
                let message = format!("document {document} ends at token {end}: the index is not of this shard");
                return Err(Error::data(message).in_file(&self.name));
            }
            ends.push((end - start) as u32);
            last = end;
        }
        Ok((self.tokens.clone(), start as usize, (last - start) as usize, ends))
    }
}

/// Opens the shards of a manifest; their documents are counted from the index beside each.
pub fn open_all(store: &Store, files: &[Entry], stop: &Stop) -> Result<Vec<Shard>> {
    files
        .iter()
        .map(|entry| {
            let Some(path) = store.local_path(&entry.name) else {
                let message = "shards are mapped: copy them to a local path first";
                return Err(Error::input(message).in_file(&entry.name));
            };
            store.file(&entry.name, &entry.stamp, stop)?; // still the one of the manifest
            let tokens = map(&path)?;
            let ends = map(&path.with_extension("tokens.ends"))?;
            if tokens.len() % 4 != 0 || ends.len() % 8 != 0 {
                return Err(Error::data("truncated: its length is no multiple of a token").in_file(&entry.name));
            }
            let documents = ends.len() as u64 / 8;
            Ok(Shard { documents, name: entry.name.clone(), tokens: Arc::new(tokens), ends })
        })
        .collect()
}

/// The header of a directory of shards.
pub fn header(directory: &Path) -> Result<Header> {
    let path = directory.join(INDEX);
    let place = path.to_string_lossy().into_owned();
    let text = std::fs::read_to_string(&path).map_err(|e| Error::from(e).in_file(&place))?;
    let header: Header =
        serde_json::from_str(&text).map_err(|e| Error::data(format!("no index of shards: {e}")).in_file(&place))?;
    if header.format != FORMAT || header.version != VERSION {
        let message = format!("{} version {}; valid: {FORMAT} version {VERSION}", header.format, header.version);
        return Err(Error::data(message).in_file(&place));
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
        Ok(Self { directory: directory.to_owned(), header, current: None })
    }

    /// Whole documents, each with its end-of-text; `ends` counts from the first token given.
    pub fn add(&mut self, tokens: &[i32], ends: &[u32]) -> Result<()> {
        if self.current.as_ref().is_some_and(|c| c.count as usize + tokens.len() > TOKENS_A_SHARD) {
            self.close_shard()?;
        }
        if self.current.is_none() {
            let path = self.directory.join(self.name());
            self.current = Some(Current {
                ends: BufWriter::new(LocalFile::create(path.with_extension("tokens.ends"))?),
                tokens: BufWriter::new(LocalFile::create(path)?),
                hasher: blake3::Hasher::new(),
                count: 0,
                documents: 0,
            });
        }
        let current = self.current.as_mut().expect("opened above");
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
        if self.header.shards.is_empty() {
            return Err(Error::new(Kind::Data, "no document to write"));
        }
        crate::source::write_atomic(&self.directory.join(INDEX), self.header.to_json().as_bytes())?;
        Ok(self.header)
    }
}
