//! A little text of the corpus, for comparing tokenizers at the start.

use std::sync::Arc;

use crate::loader::Config;
use crate::segment::{self, BlockReader, Common, OnError, Work};
use crate::source::{Shuffle, Source};
use crate::stats::Stats;
use crate::stop::Stop;

const DOCUMENTS: usize = 8;
const BYTES: usize = 8 << 10;

/// Beginnings of the first documents of each source; fewer where they cannot be read, which is said later by
/// whoever reads them for use.
pub fn texts(sources: &[Arc<Source>], config: &Config, stop: &Stop) -> Vec<String> {
    let common = Common {
        field: config.text_field.clone(),
        on_error: OnError::Skip,
        shuffle: Shuffle::None,
        stats: Stats::default(),
        stop: stop.clone(),
    };
    let mut out = Vec::new();
    for source in sources.iter().filter(|source| source.blocks() > 0) {
        let first = BlockReader::open(source, source.block(0), 0, &common).and_then(|mut reader| reader.next());
        let raw = match first {
            Ok(Some(Work::Block(block))) => segment::read(source, block, 0, &common),
            Ok(Some(Work::Raw(raw))) => Ok(raw),
            _ => continue,
        };
        let Ok(raw) = raw else { continue };
        let mut found = 0;
        let _ = segment::each_document(source, &raw, 0, &common, |text| {
            if found < DOCUMENTS {
                let end = (0..=BYTES.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
                out.push(text[..end].to_owned());
            }
            found += 1;
            Ok(())
        });
    }
    out
}
