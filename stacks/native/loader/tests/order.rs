//! Batch k is a function of corpus, tokenizer, seed, epoch and k: not of threads, depth, ranks or interruptions.

mod common;

use std::collections::BTreeSet;

use common::{Corpus, Plain, drain, plain, resume, run, sorted, texts};
use proptest::prelude::*;
use stackbench_loader::{Config, Format, Loader, Shuffle, SourceConfig, State};

const FORMATS: [Format; 5] = [Format::Jsonl, Format::JsonlZst, Format::Parquet, Format::Text, Format::Tokens];

/// What can be shuffled how.
fn shuffles(format: Format) -> &'static [Shuffle] {
    match format {
        Format::JsonlZst | Format::Parquet => &[Shuffle::None, Shuffle::Block],
        _ => &[Shuffle::None, Shuffle::Block, Shuffle::Global],
    }
}

fn each(corpus: &Corpus, mut check: impl FnMut(Config, &str)) {
    for format in FORMATS {
        for shuffle in shuffles(format) {
            let mut config = corpus.config(&corpus.of(format));
            (config.shuffle, config.seed) = (*shuffle, 3);
            check(config, &format!("{format:?} {shuffle:?}"));
        }
    }
}

#[test]
fn threads_and_depth_change_nothing_and_every_document_comes_once() {
    let corpus = Corpus::new(400);
    each(&corpus, |config, what| {
        let expected = run(Config { threads: 1, depth: 1, ..config.clone() });
        assert_eq!(sorted(texts(&expected)), sorted(corpus.documents.clone()), "{what}");
        for (threads, depth) in [(1, 8), (2, 1), (2, 3), (3, 8), (8, 2), (8, 16)] {
            let got = run(Config { threads, depth, ..config.clone() });
            assert!(got == expected, "{what}: other batches with {threads} threads, depth {depth}");
        }
        let other = run(Config { seed: 4, ..config.clone() });
        assert_eq!(other != expected, config.shuffle != Shuffle::None, "{what}: the seed decides the order");
    });
}

#[test]
fn without_shuffle_documents_come_as_they_lie() {
    let corpus = Corpus::new(300);
    for format in [Format::Jsonl, Format::JsonlZst, Format::Parquet, Format::Text, Format::Tokens] {
        assert!(texts(&run(corpus.config(&corpus.of(format)))) == corpus.documents, "{format:?}");
    }
}

#[test]
fn an_epoch_has_another_order_and_the_same_documents() {
    let corpus = Corpus::new(200);
    each(&corpus, |config, what| {
        let both = texts(&run(Config { epochs: Some(2), ..config.clone() }));
        let (first, second) = both.split_at(corpus.documents.len());
        assert_eq!(sorted(first.to_vec()), sorted(second.to_vec()), "{what}");
        assert_eq!(first != second, config.shuffle != Shuffle::None, "{what}");
    });
}

/// One rank's batches, `most` at the most, and its loader.
fn rank(config: &Config, rank: u64, world_size: u64, states: &[State], most: usize) -> (Vec<Plain>, Loader) {
    let loader = resume(Config { rank, world_size, lanes: Some(4), ..config.clone() }, states);
    let (batches, error) = drain(&loader, most);
    assert_eq!(error, None);
    (batches, loader)
}

/// The order over all ranks: a batch of each in turn.
fn global(ranks: &[Vec<Plain>]) -> Vec<Plain> {
    let most = ranks.iter().map(Vec::len).max().unwrap_or(0);
    (0..most).flat_map(|k| ranks.iter().filter_map(move |r| r.get(k).cloned())).collect()
}

#[test]
fn ranks_share_the_documents_and_tokenize_only_their_own() {
    let corpus = Corpus::new(400);
    each(&corpus, |config, what| {
        for world_size in [1, 2, 4] {
            let (mut all, mut tokenized, mut delivered) = (Vec::new(), 0, 0);
            let mut lanes = BTreeSet::new();
            for number in 0..world_size {
                let (batches, loader) = rank(&config, number, world_size, &[], usize::MAX);
                let own: BTreeSet<u64> = batches.iter().map(|b| b.lane).collect();
                assert!(own.iter().all(|lane| lanes.insert(*lane)), "{what}: a lane of two ranks");
                tokenized += loader.shared().common.stats.tokens.load(std::sync::atomic::Ordering::Relaxed);
                delivered += batches.iter().flat_map(|b| &b.lengths).map(|n| u64::try_from(*n).unwrap()).sum::<u64>();
                all.extend(texts(&batches));
            }
            assert_eq!(sorted(all), sorted(corpus.documents.clone()), "{what} in {world_size} ranks");
            assert!(tokenized * 100 <= delivered * 102, "{what}: {tokenized} tokenized, {delivered} delivered");
        }
    });
}

#[test]
fn the_order_stays_when_the_world_size_changes() {
    let corpus = Corpus::new(400);
    each(&corpus, |mut config, what| {
        config.epochs = None; // without end: no lane runs out before the others
        let expected = rank(&config, 0, 1, &[], 48).0;
        let mut states: Vec<State> = Vec::new();
        let mut got = Vec::new();
        for world_size in [2, 4, 1, 2] {
            let made: Vec<(Vec<Plain>, Loader)> =
                (0..world_size).map(|r| rank(&config, r, world_size, &states, 12 / world_size as usize)).collect();
            states = made.iter().map(|(_, loader)| loader.state()).collect();
            got.extend(global(&made.into_iter().map(|(batches, _)| batches).collect::<Vec<_>>()));
        }
        assert!(got == expected, "{what}: another order after the world size changed");
    });
}

#[test]
fn a_stream_goes_on_from_every_batch_and_from_there_again() {
    let corpus = Corpus::new(40);
    each(&corpus, |mut config, what| {
        (config.epochs, config.lanes, config.segment_bytes) = (Some(2), Some(2), Some(900));
        if config.format == Some(Format::Parquet) {
            config.segment_bytes = Some(400);
        }
        let expected = run(config.clone());
        let loader = Loader::new(config.clone()).unwrap();
        for k in 0..=expected.len() {
            let state = loader.state();
            let json = state.to_json();
            assert!(json.len() < 600, "{what}: a state of {} bytes", json.len());
            let state = stackbench_loader::states_from_json(&format!("[{json}]")).unwrap();
            let second = resume(Config { threads: 1 + k % 3, ..config.clone() }, &state);
            let some = drain(&second, 3).0;
            assert!(some == expected[k..(k + 3).min(expected.len())], "{what}: from batch {k} on");
            let third = second.resumed(&[second.state()]).unwrap();
            assert!(drain(&third, usize::MAX).0 == expected[(k + 3).min(expected.len())..], "{what}: {k} and again");
            if k < expected.len() {
                assert_eq!(plain(&loader.take().unwrap().unwrap()), expected[k]);
            }
        }
        assert!(loader.take().unwrap().is_none() && loader.take().unwrap().is_none());
    });
}

#[test]
fn sources_are_mixed_by_weight_the_same_after_a_resume() {
    let corpus = Corpus::new(300);
    let (big, small) = (corpus.path("big"), corpus.path("small"));
    for (path, documents) in [(&big, &corpus.documents[..250]), (&small, &corpus.documents[250..])] {
        std::fs::create_dir(path).unwrap();
        std::fs::write(format!("{path}/a.jsonl"), common::jsonl(documents)).unwrap();
    }
    for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
        let mut config = corpus.config(&big);
        let source = |url: &String, weight| SourceConfig { urls: vec![url.clone()], weight };
        config.sources = vec![source(&big, 3.0), source(&small, 1.0)];
        (config.shuffle, config.epochs, config.lanes) = (shuffle, None, Some(2)); // `small` ends many times
        let take = |config: Config, states: &[State], most| {
            let loader = resume(config, states);
            let (batches, error) = drain(&loader, most);
            assert_eq!(error, None);
            (batches, loader.state())
        };
        let (expected, _) = take(config.clone(), &[], 200);
        let mut states = vec![];
        let mut got = Vec::new();
        for (threads, count) in [(1, 7), (3, 50), (2, 1), (8, 90), (2, 52)] {
            let (batches, state) = take(Config { threads, ..config.clone() }, &states, count);
            got.extend(batches);
            states = vec![state];
        }
        assert!(got == expected, "{shuffle:?}");
        let number =
            |text: &str| text.strip_prefix("document ").and_then(|t| t.split(':').next()?.parse::<usize>().ok());
        let starts: Vec<usize> = expected
            .iter()
            .flat_map(|b| b.tokens.split(|id| *id == common::END))
            .filter_map(|ids| {
                let bytes: Option<Vec<u8>> = ids.iter().map(|id| u8::try_from(*id).ok()).collect();
                number(&String::from_utf8(bytes?).ok()?)
            })
            .collect();
        let of_small = starts.iter().filter(|n| **n >= 250).count() as f64 / starts.len() as f64;
        assert!((0.1..0.4).contains(&of_small), "{shuffle:?}: {of_small} of the documents are of the small source");
    }
}

#[test]
fn rows_say_where_documents_begin_and_where_they_are_filled_up() {
    let corpus = Corpus::new(200);
    each(&corpus, |config, what| {
        for batch in run(config) {
            let row = batch.tokens.len() / batch.lengths.len();
            let mut padding = 0;
            for (i, length) in batch.lengths.iter().enumerate() {
                let length = *length as usize;
                padding += row - length;
                let range = i * row..(i + 1) * row;
                let (tokens, positions, segments) =
                    (&batch.tokens[range.clone()], &batch.positions[range.clone()], &batch.segments[range]);
                let (mut position, mut segment) = (0, 1);
                for at in 0..row {
                    let expected = if at < length { (position, segment) } else { (0, 0) };
                    assert_eq!((positions[at], segments[at]), expected, "{what}: {tokens:?}");
                    assert!(at < length || tokens[at] == common::END);
                    position += 1;
                    if tokens[at] == common::END {
                        (position, segment) = (0, segment + 1);
                    }
                }
            }
            assert_eq!(padding as u64, batch.padding);
        }
    });
}

#[test]
fn little_is_filled_up_at_the_default_segment_size() {
    let corpus = Corpus::new(40);
    let directory = corpus.path("large");
    std::fs::create_dir(&directory).unwrap();
    let text = common::jsonl(&common::documents(60_000)); // 8 MB
    let cut = text[..text.len() / 2].rfind('\n').unwrap() + 1;
    std::fs::write(format!("{directory}/0.jsonl"), &text[..cut]).unwrap();
    std::fs::write(format!("{directory}/1.jsonl"), &text[cut..]).unwrap();
    for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
        let config = Config { segment_bytes: None, shuffle, sequence: 512, batch: 8, ..corpus.config(&directory) };
        let (tokens, padding) =
            run(config).iter().fold((0, 0), |sum, b| (sum.0 + b.tokens.len() as u64, sum.1 + b.padding));
        assert!(padding * 200 <= tokens, "{shuffle:?}: {padding} of {tokens}");
    }
}

#[test]
fn small_files_are_packed_together() {
    let corpus = Corpus::new(900);
    let directory = corpus.path("small");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(format!("{directory}/0000.jsonl"), common::jsonl(&corpus.documents[..300])).unwrap(); // large
    for (number, part) in corpus.documents[300..].chunks(2).enumerate() {
        let text = if number % 10 == 3 { String::new() } else { common::jsonl(part) };
        std::fs::write(format!("{directory}/{:04}.jsonl", number + 1), text).unwrap();
    }
    let mut expected = corpus.documents[..300].to_vec();
    let parts = corpus.documents[300..].chunks(2).enumerate();
    expected.extend(parts.filter(|(number, _)| number % 10 != 3).flat_map(|(_, part)| part.to_vec()));
    for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
        let config = Config { shuffle, segment_bytes: Some(20_000), ..corpus.config(&directory) };
        let batches = run(Config { threads: 1, ..config.clone() });
        assert!(run(Config { threads: 3, ..config }) == batches);
        assert_eq!(sorted(texts(&batches)), sorted(expected.clone()), "{shuffle:?}");
        assert!(shuffle != Shuffle::None || texts(&batches) == expected);
        let sum = |count: fn(&Plain) -> u64| batches.iter().map(count).sum::<u64>();
        let (tokens, padding) = (sum(|b| b.tokens.len() as u64), sum(|b| b.padding));
        assert!(padding * 50 <= tokens, "{shuffle:?}: {padding} of {tokens}");
    }
}

#[test]
fn a_state_of_something_else_or_a_damaged_one_is_refused() {
    let corpus = Corpus::new(100);
    let config = corpus.config(&corpus.of(Format::Jsonl));
    let loader = Loader::new(config.clone()).unwrap();
    loader.take().unwrap();
    let state = loader.state();
    let refused = |config: Config, states: &[State]| {
        Loader::open(config, states, &stackbench_loader::Stop::default()).err().expect("refused").message
    };
    for other in [
        Config { seed: 1, ..config.clone() },
        Config { batch: 5, ..config.clone() },
        Config { shuffle: Shuffle::Block, ..config.clone() },
        Config { end_of_text: Some("a".into()), ..config.clone() },
        corpus.config(&corpus.of(Format::Parquet)),
    ] {
        assert!(refused(other, std::slice::from_ref(&state)).contains("another corpus"));
    }
    let two = Config { world_size: 2, lanes: Some(2), ..config.clone() };
    let ranks = [0, 1].map(|rank| Loader::new(Config { rank, ..two.clone() }).unwrap());
    ranks[0].take().unwrap();
    let one = Config { lanes: Some(2), ..config.clone() };
    assert!(refused(one.clone(), &ranks.each_ref().map(Loader::state)).contains("different moments"));
    ranks[1].take().unwrap();
    assert!(refused(one.clone(), &[ranks[1].state()]).contains("lane 0"));
    assert!(Loader::open(one, &ranks.each_ref().map(Loader::state), &stackbench_loader::Stop::default()).is_ok());
    let json = state.to_json();
    for (from, to) in [
        ("\"row\":4", "\"row\":18446744073709551615"),
        ("\"turn\":0", "\"turn\":9223372036854775807"),
        ("\"sources\":[", "\"sources\":[{\"epoch\":0,\"turn\":0,\"segment\":0,\"row\":0},"),
    ] {
        assert!(json.contains(from), "{json}");
        let damaged = stackbench_loader::states_from_json(&format!("[{}]", json.replace(from, to))).unwrap();
        assert!(refused(config.clone(), &damaged).contains("damaged"));
    }
    assert!(stackbench_loader::states_from_json("[{\"version\": -1}]").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Lines of any shape, any size of segment, any ranks: each document once, and the same for any threads.
    #[test]
    fn any_lines_come_once(
        lines in proptest::collection::vec(("[ \t]{0,3}", "[a-zé\"\\\\\n ]{0,60}", 0usize..4), 1..60),
        segment_bytes in 1u64..400, files in 1usize..4, row in 1usize..20, batch in 1usize..4, lanes in 1u64..4,
        shuffle in prop_oneof![Just(Shuffle::None), Just(Shuffle::Block), Just(Shuffle::Global)], seed: u64, ends: bool,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let tokenizer = common::tokenizer(directory.path());
        let corpus = directory.path().join("corpus");
        std::fs::create_dir(&corpus).unwrap();
        let mut expected = Vec::new();
        for (number, part) in lines.chunks(lines.len().div_ceil(files)).enumerate() {
            let mut text = String::new();
            for (blank, content, empty) in part {
                let line = serde_json::json!({"text": content}).to_string();
                text.extend([blank, &line, &"\n".repeat(1 + empty)].map(String::as_str));
                expected.extend((!content.is_empty()).then(|| content.clone()));
            }
            let text = if ends { text.as_str() } else { text.trim_end_matches('\n') };
            std::fs::write(corpus.join(format!("{number}.jsonl")), text).unwrap();
        }
        let mut config = Config::new(corpus.to_string_lossy(), tokenizer, batch, row);
        config.segment_bytes = Some(segment_bytes);
        (config.engine, config.shuffle, config.seed) = (stackbench_loader::Engine::Fast, shuffle, seed);
        config.cache = seed.is_multiple_of(2).then(|| directory.path().join("cache"));
        let one = Loader::new(Config { threads: 1, ..config.clone() });
        prop_assume!(one.is_ok() || !expected.is_empty());
        let (batches, error) = drain(&one.unwrap(), usize::MAX);
        prop_assert_eq!(error, None);
        prop_assert_eq!(sorted(texts(&batches)), sorted(expected.clone()));
        if shuffle == Shuffle::None {
            prop_assert_eq!(texts(&batches), expected);
        }
        prop_assert!(run(Config { threads: 3, ..config.clone() }) == batches, "three threads give other batches");
        if let Ok(loader) = Loader::new(Config { lanes: Some(lanes), ..config }) {
            prop_assert_eq!(sorted(texts(&drain(&loader, usize::MAX).0)), sorted(texts(&batches)));
        }
    }
}
