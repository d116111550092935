//! A source of documents: its files, how they fall into blocks, and the manifest that identifies them.
//!
//! A *block* is the smallest run of documents that can be read without reading what lies before it: a byte
//! range of lines, a row group, a whole compressed file, a run of text files, a run of documents of a shard,
//! or, under `Shuffle::Global`, a run of permuted documents. A block holds one *segment* or, where it is
//! large, several in order; a segment is packed alone.

use std::fs::File as LocalFile;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::parquet_file;
use crate::permutation::Permutation;
use crate::shards;
use crate::stop::Stop;
use crate::store::{File, Patience, Stamp, Store};

/// How documents lie in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// The same, compressed by zstd; read from the start of each file.
    #[serde(rename = "jsonl.zst")]
    JsonlZst,
    /// One string column of Parquet files.
    Parquet,
    /// One document a file, UTF-8.
    Text,
    /// Shards written by `stackbench tokenize`.
    Tokens,
}

/// In which order documents are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shuffle {
    /// As they lie: files by name, documents in order.
    None,
    /// Blocks permuted, and the documents inside each segment.
    Block,
    /// All documents permuted; needs a document index, and files that can be read anywhere.
    Global,
}

impl Format {
    /// Names, as users write them.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("jsonl", Self::Jsonl),
        ("jsonl.zst", Self::JsonlZst),
        ("parquet", Self::Parquet),
        ("text", Self::Text),
        ("tokens", Self::Tokens),
    ];

    fn of_name(name: &str) -> Self {
        let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        if ends(&[".jsonl", ".ndjson", ".json"]) {
            Self::Jsonl
        } else if ends(&[".jsonl.zst", ".ndjson.zst", ".json.zst", ".jsonl.zstd"]) {
            Self::JsonlZst
        } else if ends(&[".parquet"]) {
            Self::Parquet
        } else if ends(&[".tokens"]) {
            Self::Tokens
        } else {
            Self::Text
        }
    }
}

/// One file of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// As the store names it.
    pub name: String,
    /// What must not change.
    pub stamp: Stamp,
    /// (rows, bytes of the text column) of each row group: Parquet only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<(u64, u64)>,
    /// Documents: shards of tokens only.
    #[serde(default)]
    pub documents: u64,
}

/// What a source consists of. Built once; `hash` goes into every state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// How documents lie in these files.
    pub format: Format,
    /// Bytes of text a segment aims at.
    pub segment_bytes: u64,
    /// In the order of their names.
    pub files: Vec<Entry>,
    /// Of relative names, sizes and sampled blocks: the same corpus copied elsewhere has the same hash.
    pub hash: String,
}

const VERSION: u32 = 1;
const SAMPLED_FILES: usize = 64;
const SAMPLE_BYTES: u64 = 4096;

/// Documents of files that can be read anywhere, as positions in all files one after another.
#[derive(Debug)]
pub enum Documents {
    /// Start of each document, and the end of the last: `n + 1` numbers.
    Starts(Index),
    /// One a file.
    Files,
    /// Of shards: number of documents before each.
    Shards(Vec<u64>),
}

/// `u64` numbers in memory or in a mapped file.
#[derive(Debug)]
pub enum Index {
    /// In memory.
    Owned(Vec<u64>),
    /// In a file.
    Mapped(memmap2::Mmap),
}

impl Index {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Owned(v) => v.len(),
            Self::Mapped(map) => map.len() / 8,
        }
    }

    /// The `i`-th.
    pub fn at(&self, i: usize) -> u64 {
        match self {
            Self::Owned(v) => v[i],
            Self::Mapped(map) => shards::number(map, i),
        }
    }
}

/// What is read as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Lines whose first byte lies in `start..end` of a file.
    Lines { file: usize, start: u64, end: u64 },
    /// A run of whole files of lines, each smaller than a segment.
    Small { first: usize, count: usize },
    /// A whole compressed file.
    Compressed { file: usize },
    /// A row group.
    Group { file: usize, group: usize },
    /// A run of text files.
    Files { first: usize, count: usize },
    /// A run of documents of a shard.
    Shard { file: usize, first: u64, count: u64 },
    /// A run of permuted documents.
    Permuted { first: u64, count: u64 },
}

/// A source that is ready to be read.
#[derive(Debug)]
pub struct Source {
    /// As the user gave it.
    pub url: String,
    pub(crate) store: Store,
    /// Its files.
    pub manifest: Manifest,
    pub(crate) documents: Option<Documents>,
    /// Blocks before each file, or each run of small ones (one number more); for text the first file of each block.
    cuts: Vec<u64>,
    /// Of lines: the first file of each run, and the number of files.
    runs: Vec<usize>,
    docs_a_block: u64,
    /// Bytes of all files before each: `files + 1` numbers.
    pub(crate) offsets: Vec<u64>,
    pub(crate) shards: Vec<shards::Shard>,
}

/// How a source is opened.
#[derive(Clone, Debug)]
pub struct Opening<'a> {
    /// Path or URL: a file, a directory, a prefix; several are one source.
    pub urls: &'a [String],
    /// None: by the names of the files.
    pub format: Option<Format>,
    /// Order of reading.
    pub shuffle: Shuffle,
    /// Bytes of text a segment aims at.
    pub segment_bytes: u64,
    /// Column or key of the text.
    pub field: &'a str,
    /// Where manifests and indexes are kept; None: in memory.
    pub cache: Option<&'a Path>,
    /// Of remote stores.
    pub patience: Patience,
}

impl Source {
    /// Lists, identifies and, for `Shuffle::Global`, indexes the documents; reads from the cache what is there.
    pub fn open(opening: &Opening<'_>, stop: &Stop) -> Result<Self> {
        let Some(first) = opening.urls.first() else {
            return Err(Error::input("a source without a path; valid: a file, a directory or a URL"));
        };
        let url = opening.urls.join(" ");
        let (store, path) = Store::open(first, opening.patience)?;
        let mut listed = store.list(&path, stop)?;
        for next in &opening.urls[1..] {
            let (here, path) = Store::open(next, opening.patience)?;
            if !here.is(&store) {
                return Err(Error::input(format!("{url}: one source lies in one store; give two sources")));
            }
            listed.extend(store.list(&path, stop)?);
        }
        let format = match opening.format {
            Some(format) => format,
            None => common_format(&mut listed)?,
        };
        if format == Format::Tokens {
            listed.retain(|(name, _)| name.ends_with(shards::SUFFIX));
        }
        let manifest = Self::manifest(opening, &store, format, listed, stop)?;
        let mut source = Self {
            url,
            store,
            offsets: running(manifest.files.iter().map(|f| f.stamp.size)),
            manifest,
            documents: None,
            cuts: Vec::new(),
            runs: Vec::new(),
            docs_a_block: 1,
            shards: Vec::new(),
        };
        if format == Format::Tokens {
            source.shards = shards::open_all(&source.store, &source.manifest.files, stop)?;
        }
        if opening.shuffle == Shuffle::Global {
            source.index_documents(opening, stop)?;
        }
        source.cut();
        Ok(source)
    }

    fn manifest(
        opening: &Opening<'_>,
        store: &Store,
        format: Format,
        listed: Vec<(String, Stamp)>,
        stop: &Stop,
    ) -> Result<Manifest> {
        let root = common_directory(listed.iter().map(|(name, _)| name.as_str()));
        let key = blake3::hash(format!("{VERSION}\0{format:?}\0{:?}\0{listed:?}", opening.field).as_bytes()).to_hex();
        let kept = opening.cache.map(|dir| dir.join(format!("manifest-{}.json", &key[..24])));
        if let Some(path) = &kept
            && let Ok(text) = std::fs::read_to_string(path)
            && let Ok(manifest) = serde_json::from_str::<Manifest>(&text)
            && manifest.version == VERSION
        {
            return Ok(Manifest { segment_bytes: opening.segment_bytes, ..manifest });
        }
        let mut files: Vec<Entry> =
            listed.into_iter().map(|(name, stamp)| Entry { name, stamp, groups: Vec::new(), documents: 0 }).collect();
        if format == Format::Parquet {
            for entry in &mut files {
                let file = store.file(&entry.name, &entry.stamp, stop)?;
                entry.groups = parquet_file::groups(file, opening.field)?;
            }
        }
        let hash = identify(store, &files, root, stop)?;
        let manifest = Manifest { version: VERSION, format, segment_bytes: opening.segment_bytes, files, hash };
        if let Some(path) = kept {
            let text = serde_json::to_string(&manifest).map_err(|e| Error::new(Kind::Bug, e.to_string()))?;
            write_atomic(&path, text.as_bytes())?;
        }
        Ok(manifest)
    }

    fn index_documents(&mut self, opening: &Opening<'_>, stop: &Stop) -> Result<()> {
        let refused = |what: &str| {
            Err(Error::input(format!(
                "shuffle \"global\" needs files that can be read anywhere, and {what} cannot; valid: shuffle \
                 \"block\", or write shards first with `stackbench tokenize` and shuffle those"
            ))
            .in_file(&self.url))
        };
        self.documents = Some(match self.manifest.format {
            Format::JsonlZst => return refused("a compressed file"),
            Format::Parquet => return refused("a row group of Parquet"),
            Format::Text => Documents::Files,
            Format::Tokens => Documents::Shards(running(self.shards.iter().map(|s| s.documents))),
            Format::Jsonl => Documents::Starts(self.line_index(opening, stop)?),
        });
        Ok(())
    }

    /// Starts of all lines that are not blank. Kept beside the manifest, and mapped from there.
    fn line_index(&self, opening: &Opening<'_>, stop: &Stop) -> Result<Index> {
        let stamps: Vec<&Stamp> = self.manifest.files.iter().map(|file| &file.stamp).collect();
        let key = blake3::hash(format!("{VERSION}\0{}\0{stamps:?}", self.manifest.hash).as_bytes()).to_hex();
        let kept = opening.cache.map(|dir| dir.join(format!("documents-{}.idx", &key[..24])));
        if let Some(path) = &kept
            && path.exists()
        {
            return map_index(path, self.bytes());
        }
        let Some(path) = kept else {
            let mut starts = Vec::new();
            self.each_line(stop, |start| {
                starts.push(start);
                Ok(())
            })?;
            return Ok(Index::Owned(starts));
        };
        let mut file = Atomic::create(&path)?;
        self.each_line(stop, |start| file.write(&start.to_le_bytes()))?;
        file.finish()?;
        map_index(&path, self.bytes())
    }

    /// Bytes of all files.
    fn bytes(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Calls `put` with the start of each line that is not blank, and at last with the end of all.
    fn each_line(&self, stop: &Stop, mut put: impl FnMut(u64) -> Result<()>) -> Result<()> {
        for (number, entry) in self.manifest.files.iter().enumerate() {
            let file = self.store.file(&entry.name, &entry.stamp, stop)?;
            let (mut start, mut blank, mut position) = (0, true, 0);
            while position < file.size() {
                let length = (file.size() - position).min(4 << 20) as usize;
                let bytes = file.read(position, length)?;
                let mut rest = 0;
                while rest < bytes.len() {
                    let end = memchr::memchr(b'\n', &bytes[rest..]).map(|i| rest + i);
                    let part = &bytes[rest..end.unwrap_or(bytes.len())];
                    if blank && !part.iter().all(u8::is_ascii_whitespace) {
                        blank = false; // a line may begin in one piece and show its text in the next
                        put(self.offsets[number] + start)?;
                    }
                    rest = end.map_or(bytes.len(), |i| i + 1);
                    if end.is_some() {
                        (start, blank) = (position + rest as u64, true);
                    }
                }
                position += length as u64;
            }
        }
        put(self.bytes())
    }

    /// Divides the files into blocks.
    fn cut(&mut self) {
        let target = self.manifest.segment_bytes.max(1);
        let files = &self.manifest.files;
        if self.documents.is_some() {
            let bytes = self.bytes();
            let total = self.document_count().max(1);
            let aim = if self.manifest.format == Format::Tokens { target } else { bytes.min(target) };
            self.docs_a_block =
                (u128::from(aim) * u128::from(total) / u128::from(bytes.max(1))).clamp(1, u128::from(total)) as u64;
            return;
        }
        self.cuts = match self.manifest.format {
            Format::Jsonl => {
                self.runs = small_together(files.iter().map(|f| f.stamp.size), target);
                let blocks = |run: &[usize]| match run[1] - run[0] {
                    1 => files[run[0]].stamp.size.div_ceil(target),
                    _ => 1,
                };
                running(self.runs.windows(2).map(blocks))
            }
            Format::JsonlZst => running(files.iter().map(|_| 1)),
            Format::Parquet => running(files.iter().map(|f| f.groups.len() as u64)),
            Format::Tokens => {
                running(self.shards.iter().map(|shard| shard.documents.div_ceil(shard.documents_a_block(target))))
            }
            Format::Text => {
                let (mut cuts, mut size) = (vec![0], 0);
                for (i, file) in files.iter().enumerate() {
                    size += file.stamp.size;
                    if size >= target {
                        cuts.push(i as u64 + 1);
                        size = 0;
                    }
                }
                if cuts.last().is_some_and(|last| *last < files.len() as u64) {
                    cuts.push(files.len() as u64);
                }
                cuts
            }
        };
    }

    /// Documents, where they are counted: under `Shuffle::Global`.
    pub fn document_count(&self) -> u64 {
        match &self.documents {
            Some(Documents::Starts(index)) => (index.len() as u64).saturating_sub(1),
            Some(Documents::Files) => self.manifest.files.len() as u64,
            Some(Documents::Shards(before)) => before.last().copied().unwrap_or(0),
            None => 0,
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        if self.documents.is_some() {
            return self.document_count().div_ceil(self.docs_a_block);
        }
        match self.manifest.format {
            Format::Text => self.cuts.len() as u64 - 1,
            _ => self.cuts.last().copied().unwrap_or(0),
        }
    }

    /// Whether a block holds exactly one segment, so that blocks can be read in any order by any thread.
    pub fn one_segment_a_block(&self) -> bool {
        !matches!(self.manifest.format, Format::JsonlZst | Format::Parquet)
    }

    /// The `index`-th block as the files lie.
    pub fn block(&self, index: u64) -> Block {
        if self.documents.is_some() {
            let first = index * self.docs_a_block;
            return Block::Permuted { first, count: self.docs_a_block.min(self.document_count() - first) };
        }
        if self.manifest.format == Format::Text {
            let (first, end) = (self.cuts[index as usize] as usize, self.cuts[index as usize + 1] as usize);
            return Block::Files { first, count: end - first };
        }
        let file = self.cuts.partition_point(|cut| *cut <= index) - 1;
        let within = index - self.cuts[file];
        let target = self.manifest.segment_bytes.max(1);
        match self.manifest.format {
            Format::Jsonl => {
                let (first, end) = (self.runs[file], self.runs[file + 1]);
                if end - first > 1 {
                    return Block::Small { first, count: end - first };
                }
                let (file, size) = (first, self.manifest.files[first].stamp.size);
                Block::Lines { file, start: within * target, end: ((within + 1) * target).min(size) }
            }
            Format::JsonlZst => Block::Compressed { file },
            Format::Parquet => Block::Group { file, group: within as usize },
            Format::Tokens => {
                let count = self.shards[file].documents_a_block(target);
                let first = within * count;
                Block::Shard { file, first, count: count.min(self.shards[file].documents - first) }
            }
            Format::Text => unreachable!("text is cut by files"),
        }
    }

    /// Opens a file of the manifest.
    pub(crate) fn file(&self, index: usize, stop: &Stop) -> Result<File> {
        let entry = &self.manifest.files[index];
        self.store.file(&entry.name, &entry.stamp, stop)
    }

    /// Where the permuted documents `first..first + count` lie, in their permuted order.
    pub(crate) fn permuted(&self, first: u64, count: u64, key: u64) -> Vec<u64> {
        let order = Permutation::new(self.document_count(), key);
        (first..first + count).map(|i| order.at(i)).collect()
    }
}

/// Where runs of files begin: a file as large as a segment stands alone, smaller ones are read together until they
/// are as large, so that few rows are filled up. The last number is that of the files.
fn small_together(sizes: impl Iterator<Item = u64>, target: u64) -> Vec<usize> {
    let (mut runs, mut together, mut count) = (Vec::new(), target, 0);
    for (number, size) in sizes.enumerate() {
        if together >= target || size >= target {
            runs.push(number);
            together = 0;
        }
        together += size;
        count = number + 1;
    }
    runs.push(count);
    runs
}

/// `0, a, a + b, …`
fn running(sizes: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut sum = 0;
    let sums = sizes.map(|size| {
        sum += size;
        sum
    });
    std::iter::once(0).chain(sums).collect()
}

/// The one format of all files; files that are none of a data set (a README beside Parquet) are left out.
fn common_format(listed: &mut Vec<(String, Stamp)>) -> Result<Format> {
    for format in [Format::Tokens, Format::Parquet, Format::JsonlZst, Format::Jsonl] {
        if listed.iter().any(|(name, _)| Format::of_name(name) == format) {
            let other = listed.iter().find(|(name, _)| {
                let found = Format::of_name(name);
                found != format && found != Format::Text && !(format == Format::Tokens && found == Format::Jsonl)
            });
            if let Some((name, _)) = other {
                return Err(Error::input(format!(
                    "files of two formats ({format:?} and {:?}) in one source; give two sources, or format=",
                    Format::of_name(name)
                ))
                .in_file(name));
            }
            listed.retain(|(name, _)| Format::of_name(name) == format);
            return Ok(format);
        }
    }
    Ok(Format::Text)
}

fn common_directory<'a>(mut names: impl Iterator<Item = &'a str>) -> usize {
    let Some(first) = names.next() else { return 0 };
    let mut length = first.rfind('/').map_or(0, |i| i + 1);
    for name in names {
        let shared = first.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count().min(length);
        length = first[..shared].rfind('/').map_or(0, |i| i + 1);
    }
    length
}

/// The corpus's identity: names below its root, sizes, and sampled blocks of up to 64 local files (a store's
/// own version stands for its objects).
fn identify(store: &Store, files: &[Entry], root: usize, stop: &Stop) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for entry in files {
        hasher.update(&entry.name.as_bytes()[root..]);
        hasher.update(&entry.stamp.size.to_le_bytes());
        hasher.update(entry.stamp.etag.as_deref().unwrap_or("").as_bytes());
    }
    let every = files.len().div_ceil(SAMPLED_FILES).max(1);
    for entry in files.iter().step_by(every).filter(|entry| store.local_path(&entry.name).is_some()) {
        let file = store.file(&entry.name, &entry.stamp, stop)?;
        for start in [0, file.size() / 2, file.size().saturating_sub(SAMPLE_BYTES)] {
            let length = SAMPLE_BYTES.min(file.size() - start.min(file.size()));
            hasher.update(&file.read(start, length as usize)?);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn map_index(path: &Path, bytes: u64) -> Result<Index> {
    let fail = |e: std::io::Error| Error::from(e).in_file(&path.to_string_lossy());
    let file = LocalFile::open(path).map_err(fail)?;
    // SAFETY: the index is ours, written once under a name made of its content's hash, and replaced only by
    // rename; whoever truncates it by hand gets SIGBUS, as with any mapped file.
    let map = unsafe { memmap2::Mmap::map(&file).map_err(fail)? };
    if map.len() < 8 || map.len() % 8 != 0 || shards::number(&map, map.len() / 8 - 1) != bytes {
        return Err(
            Error::new(Kind::Changed, "no index of these documents; remove it").in_file(&path.to_string_lossy())
        );
    }
    Ok(Index::Mapped(map))
}

/// A file that appears whole under its name: temporary name, fsync, rename.
struct Atomic {
    path: PathBuf,
    temporary: PathBuf,
    writer: BufWriter<LocalFile>,
    done: bool,
}

impl Atomic {
    fn create(path: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0); // several loaders of one process may write the same file
        let fail = |e: std::io::Error| Error::from(e).in_file(&path.to_string_lossy());
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(fail)?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let writer = BufWriter::with_capacity(1 << 16, LocalFile::create(&temporary).map_err(fail)?);
        Ok(Self { path: path.to_owned(), temporary, writer, done: false })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|e| Error::from(e).in_file(&self.temporary.to_string_lossy()))
    }

    fn finish(mut self) -> Result<()> {
        let ended = self.writer.flush().and_then(|()| self.writer.get_ref().sync_all());
        let moved = ended.and_then(|()| std::fs::rename(&self.temporary, &self.path));
        self.done = moved.is_ok();
        moved.map_err(|e| Error::from(e).in_file(&self.path.to_string_lossy()))
    }
}

impl Drop for Atomic {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// A small file, whole: a reader sees the old one or the new one.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = Atomic::create(path)?;
    file.write(bytes)?;
    file.finish()
}
