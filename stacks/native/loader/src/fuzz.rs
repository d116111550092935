//! Each decoder on bytes that are anything: for the fuzz targets, and for a test that mutates good input. None may
//! panic, hang or take memory without bound; what they accept is checked against another reader where there is one.

use bytes::Bytes;

use crate::loader::{Config, Loader, State};
use crate::parquet_file::{GroupReader, groups, texts};
use crate::segment::{LineStream, Raw};
use crate::shards::{Shard, parse_header};
use crate::store::File;

/// A line of JSON: what is accepted is what `serde_json` reads.
///
/// # Panics
/// Where the two differ.
pub fn json_line(data: &[u8]) {
    let mut scratch = Vec::new();
    if let Ok(Some(text)) = crate::json::text(data, "text", &mut scratch) {
        let value: Result<serde_json::Value, _> = serde_json::from_slice(data);
        // Numbers beyond f64 and deep nesting, in keys that are not ours, are left to whoever needs them.
        if let Ok(value) = value {
            assert_eq!(value["text"].as_str(), Some(text));
        }
    }
}

/// A compressed file of lines: its segments are its text.
///
/// # Panics
/// Where the segments are not the text.
pub fn zstd_lines(data: &[u8]) {
    let Some((target, data)) = data.split_first() else { return };
    let file = File::memory("memory", Bytes::copy_from_slice(data));
    let Ok(mut stream) = LineStream::open(file, 1 + usize::from(*target)) else { return };
    let mut position = 0;
    while let Ok(Some(Raw::Lines { start, bytes, .. })) = stream.next() {
        assert_eq!(start, position);
        position += bytes.len() as u64;
        if position > 1 << 24 {
            return;
        }
    }
}

/// A Parquet file: its row groups, a few rows at a time, from the first segment and from the second.
pub fn parquet(data: &[u8]) {
    let file = File::memory("memory", Bytes::copy_from_slice(data));
    let Ok(found) = groups(file.clone(), "text") else { return };
    for (group, (rows, _)) in found.iter().enumerate().take(4) {
        for segment in 0..2 {
            let Ok(mut reader) = GroupReader::open(file.clone(), "text", group, (*rows).clamp(1, 7), segment) else {
                continue;
            };
            for _ in 0..100 {
                let Ok(Some(batch)) = reader.next() else { break };
                let _: usize = texts(&batch).iter().flatten().map(|text| text.len()).sum();
            }
        }
    }
}

/// An `index.json`, and an index of documents over shards that do not fit it.
pub fn shard_index(data: &[u8]) {
    let _ = parse_header(data);
    let half = data.len() / 2 / 8 * 8;
    let Ok(shard) = Shard::from_bytes(&data[half..], &data[..half]) else { return };
    for first in 0..shard.documents {
        if let Ok((map, start, count, ends)) = shard.run(first, (shard.documents - first).min(3)) {
            let tokens = crate::shards::numbers(&map, start, count);
            let _ = (tokens.len(), ends.last());
        }
    }
    let _ = shard.documents_a_block(data.len() as u64);
}

/// A state, and what goes on from it.
pub fn state(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(states) = crate::loader::states_from_json(text) else { return };
    let config = Config::new("", "", 2, 8);
    for identity in states.iter().map(State::identity) {
        let _ = Loader::begin(&config, &states, 4, identity);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parquet_file() -> Vec<u8> {
        use std::sync::Arc;
        let texts = (0..50).map(|i| (i % 7 != 0).then(|| format!("document {i} ").repeat(i)));
        let column: arrow_array::ArrayRef = Arc::new(texts.collect::<arrow_array::StringArray>());
        let batch = arrow_array::RecordBatch::try_from_iter_with_nullable([("text", column, true)]).unwrap();
        let properties = parquet::file::properties::WriterProperties::builder()
            .set_max_row_group_row_count(Some(20))
            .set_data_page_row_count_limit(5)
            .set_write_batch_size(5)
            .set_compression(parquet::basic::Compression::SNAPPY)
            .build();
        let mut out = Vec::new();
        let mut writer = parquet::arrow::ArrowWriter::try_new(&mut out, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        out
    }

    type Decoder = fn(&[u8]);

    /// Good input and a decoder for it.
    fn seeds() -> Vec<(Vec<u8>, Decoder)> {
        let lines = b"{\"text\": \"abc\\u00e9\"}\n{\"a\": [1, {}], \"text\": \"x\"}\n".repeat(20);
        let zst = [vec![9], zstd::encode_all(&lines[..], 3).unwrap()].concat();
        let ends: Vec<u8> = (1..9u64).flat_map(u64::to_le_bytes).collect();
        let header = br#"{"format": "stackbench-tokens", "version": 1, "end": 0, "tokenizer": "x", "shards": []}"#;
        let state = br#"[{"version": 1, "identity": "x", "delivered": 4, "world_size": 1, "lanes": {"0": {"batches": 1,
            "rows": 2, "sources": [{"epoch": 0, "turn": 0, "segment": 0, "row": 2}]}}}]"#;
        vec![
            (lines[..21].to_vec(), json_line),
            (br#"{"text" : "\ud83d\ude00", "b": null}"#.to_vec(), json_line),
            (zst, zstd_lines),
            (parquet_file(), parquet),
            ([ends, vec![1; 40]].concat(), shard_index),
            (header.to_vec(), shard_index),
            (state.to_vec(), self::state),
        ]
    }

    #[test]
    fn good_input_is_read() {
        for (seed, decode) in seeds() {
            decode(&seed);
        }
        let file = File::memory("memory", parquet_file().into());
        assert_eq!(groups(file, "text").unwrap().iter().map(|(rows, _)| rows).sum::<u64>(), 50);
    }

    #[test]
    fn nesting_without_end_is_an_error() {
        for open in ["[", "{\"a\":"] {
            let line = format!("{{\"a\": {}", open.repeat(2_000_000));
            json_line(line.as_bytes());
            let line = format!("{{\"text\": {}", open.repeat(2_000_000));
            json_line(line.as_bytes());
        }
        state("[".repeat(1_000_000).as_bytes());
        shard_index("[".repeat(1_000_000).as_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn damaged_input_is_an_error_or_is_read(
            which in 0usize..7, cut in any::<prop::sample::Index>(), whole: bool,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let (mut bytes, decode) = seeds().swap_remove(which);
            for (at, to) in changes {
                let at = at.index(bytes.len());
                bytes[at] = to;
            }
            if !whole {
                bytes.truncate(cut.index(bytes.len() + 1));
            }
            decode(&bytes);
        }
    }
}
