//! A small corpus in every format, a tokenizer of bytes, and runs of a loader over them.
#![allow(dead_code, clippy::missing_panics_doc, reason = "each test file uses a part, and a panic is a failed test")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stackbench_loader::{Batch, Config, Error, Format, Loader, State};

/// Id of end-of-text in the tokenizer of bytes.
pub const END: i32 = 256;

/// A tokenizer.json whose ids are the bytes of the text, so that text can be had back from ids.
pub fn tokenizer(directory: &Path) -> PathBuf {
    // GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on.
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..256u32 {
        let code = if printable(&byte) { byte } else { next };
        next += u32::from(!printable(&byte));
        vocabulary.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    vocabulary.insert("<|endoftext|>".into(), END.into());
    let level =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": END, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []},
    });
    let path = directory.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

/// Documents that differ, of very different lengths, some with more than ASCII.
pub fn documents(count: usize) -> Vec<String> {
    let words = ["alpha ", "beta\n", "γάμμα ", "\"delta\" ", "naïve\t", "語 ", "x", "{}\\ "];
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    (0..count)
        .map(|number| {
            let mut text = format!("document {number}: ");
            let length = if random() % 20 == 0 { 300 } else { random() % 30 };
            for _ in 0..length {
                text.push_str(words[random() % words.len()]);
            }
            text
        })
        .collect()
}

pub fn jsonl(documents: &[String]) -> String {
    documents.iter().fold(String::new(), |mut all, text| {
        writeln!(all, "{}", serde_json::json!({"text": text})).unwrap();
        all
    })
}

pub fn write_parquet(path: &Path, documents: &[String], rows_a_group: usize) {
    use arrow_array::{ArrayRef, RecordBatch, StringArray};
    let column: ArrayRef = Arc::new(StringArray::from_iter_values(documents));
    let other: ArrayRef = Arc::new(arrow_array::Int64Array::from_iter_values(0..documents.len() as i64));
    let batch = RecordBatch::try_from_iter([("id", other), ("text", column)]).unwrap();
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_max_row_group_row_count(Some(rows_a_group))
        .set_data_page_row_count_limit(10)
        .set_write_batch_size(10)
        .set_dictionary_enabled(false)
        .build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

pub fn zstd(text: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// A directory with a tokenizer and the same documents in every format.
pub struct Corpus {
    pub directory: tempfile::TempDir,
    pub documents: Vec<String>,
}

impl Corpus {
    pub fn new(count: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let documents = documents(count);
        tokenizer(directory.path());
        Self { directory, documents }
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_string_lossy().into_owned()
    }

    /// The corpus in a format, in a directory of that name, made when it is asked for first.
    pub fn of(&self, format: Format) -> String {
        let name = Format::NAMES.iter().find(|(_, f)| *f == format).unwrap().0;
        let path = self.directory.path().join(name);
        if path.exists() {
            return path.to_string_lossy().into_owned();
        }
        if format == Format::Tokens {
            let mut config = self.config(&self.of(Format::Jsonl));
            config.threads = 2;
            stackbench_loader::tokenize(&config, &path, &stackbench_loader::Stop::default(), |_| Ok(())).unwrap();
            return path.to_string_lossy().into_owned();
        }
        std::fs::create_dir(&path).unwrap();
        let files = self.documents.len().div_ceil(5);
        for (number, part) in self.documents.chunks(files).enumerate() {
            match format {
                Format::Jsonl => std::fs::write(path.join(format!("{number}.jsonl")), jsonl(part)).unwrap(),
                Format::JsonlZst => {
                    std::fs::write(path.join(format!("{number}.jsonl.zst")), zstd(jsonl(part).as_bytes())).unwrap();
                }
                Format::Parquet => write_parquet(&path.join(format!("{number}.parquet")), part, 37),
                Format::Text => {
                    for (i, text) in part.iter().enumerate() {
                        std::fs::write(path.join(format!("{number}-{i:05}.txt")), text).unwrap();
                    }
                }
                Format::Tokens => unreachable!(),
            }
        }
        path.to_string_lossy().into_owned()
    }

    /// Small rows and small segments, so that all boundaries occur.
    pub fn config(&self, url: &str) -> Config {
        let mut config = Config::new(url, self.directory.path().join("tokenizer.json"), 4, 60);
        config.segment_bytes = Some(3000);
        config.engine = stackbench_loader::Engine::Fast;
        config.positions = true;
        config.segments = true;
        config
    }
}

/// A batch, by value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plain {
    pub lane: u64,
    pub tokens: Vec<i32>,
    pub lengths: Vec<i32>,
    pub positions: Vec<i32>,
    pub segments: Vec<i32>,
    pub padding: u64,
}

pub fn plain(batch: &Batch) -> Plain {
    let optional = |data: &Option<stackbench_loader::Data>| data.as_ref().map_or(Vec::new(), |d| d.as_slice().to_vec());
    Plain {
        lane: batch.lane,
        tokens: batch.tokens.as_slice().to_vec(),
        lengths: batch.lengths.as_slice().to_vec(),
        positions: optional(&batch.positions),
        segments: optional(&batch.segments),
        padding: batch.padding,
    }
}

/// All batches, up to `most`, and the error that ended them.
pub fn drain(loader: &Loader, most: usize) -> (Vec<Plain>, Option<Error>) {
    let mut batches = Vec::new();
    while batches.len() < most {
        match loader.take() {
            Ok(Some(batch)) => batches.push(plain(&batch)),
            Ok(None) => break,
            Err(error) => return (batches, Some(error)),
        }
    }
    (batches, None)
}

/// All batches of a configuration that has no error.
pub fn run(config: Config) -> Vec<Plain> {
    let (batches, error) = drain(&Loader::new(config).unwrap(), usize::MAX);
    assert_eq!(error, None);
    batches
}

/// Batches from a state on.
pub fn resume(config: Config, states: &[State]) -> Loader {
    Loader::open(config, states, &stackbench_loader::Stop::default()).unwrap()
}

/// The documents of batches, in the order of each lane.
pub fn texts(batches: &[Plain]) -> Vec<String> {
    let mut lanes: BTreeMap<u64, Vec<i32>> = BTreeMap::new();
    for batch in batches {
        let row = batch.tokens.len() / batch.lengths.len();
        for (tokens, length) in batch.tokens.chunks(row).zip(&batch.lengths) {
            lanes.entry(batch.lane).or_default().extend(&tokens[..*length as usize]);
        }
    }
    let mut texts = Vec::new();
    for stream in lanes.values() {
        assert!(stream.is_empty() || *stream.last().unwrap() == END, "a document without its end");
        for document in stream.split(|id| *id == END) {
            texts.push(String::from_utf8(document.iter().map(|id| u8::try_from(*id).unwrap()).collect()).unwrap());
        }
        texts.pop(); // after the last end-of-text
    }
    texts
}

pub fn sorted(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts
}
