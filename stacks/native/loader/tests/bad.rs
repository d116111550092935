//! Data that is not what it should be: the error comes where the bad batch would be, and names file and record;
//! under `skip` it is counted and listed, and all other documents come.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Corpus, Plain, drain, jsonl, sorted, texts};
use stackbench_loader::{Config, Error, Format, Kind, Loader, Next, OnError, Shuffle, SourceConfig};

/// What ends takes milliseconds; what does not, 20 seconds or for ever. A bound between is no matter of speed.
const HANG: Duration = Duration::from_secs(5);

/// Batches and the error at their end, which must be the same whoever does the work.
fn failing(config: &Config) -> (Vec<Plain>, Error) {
    let mut expected: Option<(Vec<Plain>, Option<Error>)> = None;
    for (threads, depth) in [(1, 1), (2, 8), (8, 4)] {
        let loader = Loader::new(Config { threads, depth, ..config.clone() }).unwrap();
        let got = drain(&loader, usize::MAX);
        assert_eq!(loader.take().err(), got.1, "an error stays");
        let expected = expected.get_or_insert_with(|| got.clone());
        assert!(
            *expected == got,
            "{threads} threads: {} batches, then {:?}; not {} and {:?}",
            got.0.len(),
            got.1,
            expected.0.len(),
            expected.1
        );
    }
    let (batches, error) = expected.unwrap();
    (batches, error.expect("an error"))
}

/// Texts, count and list of what is left out.
fn skipping(config: &Config) -> (Vec<String>, u64, Vec<String>) {
    let mut expected: Option<(Vec<Plain>, u64)> = None;
    let mut listed = Vec::new();
    for threads in [1, 3] {
        let loader = Loader::new(Config { threads, on_error: OnError::Skip, ..config.clone() }).unwrap();
        let (batches, error) = drain(&loader, usize::MAX);
        assert_eq!(error, None);
        for (number, batch) in batches.iter().enumerate() {
            let whole = batch.lengths.iter().all(|length| *length > 0);
            assert!(whole || number + 1 == batches.len(), "batch {number} is short: {:?}", batch.lengths);
        }
        let stats = &loader.shared().common.stats;
        let got = (batches, stats.skipped.load(Ordering::Relaxed));
        listed = stats.skips();
        assert!(*expected.get_or_insert_with(|| got.clone()) == got, "{threads} threads");
    }
    let (batches, count) = expected.unwrap();
    (texts(&batches), count, listed)
}

fn write(path: &Path, parts: &[&[u8]]) {
    std::fs::write(path, parts.concat()).unwrap();
}

#[test]
fn lines_that_are_no_json_or_no_utf8() {
    let corpus = Corpus::new(120);
    let directory = corpus.path("lines");
    std::fs::create_dir(&directory).unwrap();
    let (before, after) = (jsonl(&corpus.documents[..70]), jsonl(&corpus.documents[70..]));
    let bad: [(&[u8], &str); 6] = [
        (b"{\"text\": \"never ends\n", "malformed JSON"),
        (b"{\"text\": \"\xff\xfe\"}\n", "not UTF-8"),
        (b"{\"other\": \"x\"}\n", "no key \"text\""),
        (b"{\"text\": 12}\n", "a string or null"),
        (b"[1, 2]\n", "malformed JSON"),
        (b"\x00\x01\x02\n", "malformed JSON"),
    ];
    for (line, message) in bad {
        let path = Path::new(&directory).join("a.jsonl");
        write(&path, &[before.as_bytes(), line, after.as_bytes()]);
        for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
            let config = Config { shuffle, ..corpus.config(&directory) };
            let (batches, error) = failing(&config);
            assert_eq!(error.kind, Kind::Data);
            assert!(error.message.contains(message), "{error}");
            assert!(error.file.as_ref().unwrap().ends_with("a.jsonl"), "{error}");
            assert_eq!(error.record.unwrap(), format!("line at byte {}", before.len()));
            if shuffle == Shuffle::None {
                let all =
                    drain(&Loader::new(Config { on_error: OnError::Skip, ..config.clone() }).unwrap(), usize::MAX).0;
                assert!(!batches.is_empty() && batches.len() < all.len() && all.starts_with(&batches));
            }
            let (texts, count, listed) = skipping(&config);
            assert_eq!((count, listed.len()), (1, 1));
            assert!(listed[0].contains("a.jsonl, line at byte"), "{}", listed[0]);
            assert_eq!(sorted(texts), sorted(corpus.documents.clone()));
        }
    }
}

#[test]
fn an_error_of_a_rarely_drawn_source_comes_at_one_batch_whatever_the_threads() {
    let corpus = Corpus::new(400);
    let (good, bad) = (corpus.path("good"), corpus.path("bad"));
    for (path, extra) in [(&good, ""), (&bad, "{\n")] {
        std::fs::create_dir(path).unwrap();
        std::fs::write(format!("{path}/a.jsonl"), jsonl(&corpus.documents) + extra).unwrap();
    }
    let mut config = corpus.config(&good);
    let source = |url: &String, weight| SourceConfig { urls: vec![url.clone()], weight };
    config.sources = vec![source(&good, 1.0), source(&bad, 0.5)];
    config.epochs = None;
    let (batches, error) = failing(&config);
    assert!(batches.len() > 100 && error.file.unwrap().contains("/bad/"), "{}", batches.len());
}

#[test]
fn text_that_is_no_utf8_and_files_that_vanish() {
    let corpus = Corpus::new(60);
    let directory = corpus.of(Format::Text);
    let mut names: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    std::fs::write(&names[20], b"abc\xffdef").unwrap();
    for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
        let config = Config { shuffle, ..corpus.config(&directory) };
        let error = failing(&config).1;
        assert_eq!((error.kind, error.file.as_deref()), (Kind::Data, names[20].to_str()));
        let (texts, count, listed) = skipping(&config);
        assert_eq!((texts.len(), count, listed.len()), (59, 1, 1));
    }
    std::fs::write(&names[20], "fine").unwrap();
    // The manifest is built, and then a file goes: the error is at its batch, and `skip` lists it.
    for on_error in [OnError::Error, OnError::Skip] {
        let config = Config { on_error, epochs: Some(2), threads: 2, depth: 1, ..corpus.config(&directory) };
        let loader = Loader::new(config).unwrap();
        let first = loader.take().unwrap();
        assert!(first.is_some());
        std::fs::rename(&names[59], corpus.path("elsewhere")).unwrap();
        let (batches, error) = drain(&loader, usize::MAX);
        if on_error == OnError::Error {
            let error = error.unwrap();
            assert_eq!((error.kind, error.file.as_deref()), (Kind::Io, names[59].to_str()));
        } else {
            assert_eq!(error, None);
            assert!(loader.shared().common.stats.skips().iter().any(|line| line.contains(names[59].to_str().unwrap())));
            assert!(batches.len() > 20);
        }
        std::fs::rename(corpus.path("elsewhere"), &names[59]).unwrap();
    }
}

#[test]
fn a_file_that_changes_after_the_manifest_was_built() {
    let corpus = Corpus::new(300);
    for format in [Format::Jsonl, Format::JsonlZst, Format::Parquet, Format::Text] {
        let directory = corpus.of(format);
        let mut names: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|e| e.unwrap().path()).collect();
        names.sort();
        let last = names.last().unwrap();
        let loader = Loader::new(Config { epochs: None, depth: 1, ..corpus.config(&directory) }).unwrap();
        loader.take().unwrap();
        let bytes = std::fs::read(last).unwrap();
        std::fs::write(last, [&bytes[..], b"x"].concat()).unwrap();
        let error = drain(&loader, usize::MAX).1.unwrap();
        assert_eq!((error.kind, error.file.as_deref()), (Kind::Changed, last.to_str()), "{format:?}: {error}");
        assert!(error.message.contains(&format!("{} bytes then, {} now", bytes.len(), bytes.len() + 1)), "{error}");
        std::fs::write(last, bytes).unwrap();
    }
}

#[test]
fn an_index_of_documents_is_not_used_for_a_changed_file() {
    let corpus = Corpus::new(0);
    let directory = corpus.path("lines");
    std::fs::create_dir(&directory).unwrap();
    let path = Path::new(&directory).join("a.jsonl");
    // Same size, same beginning, middle and end; another division into lines.
    let filler = |count: usize| jsonl(&(0..count).map(|i| format!("{i:06}")).collect::<Vec<_>>());
    let (head, tail) = (filler(1000), filler(1000));
    for (a, b) in [(3, 30), (30, 3)] {
        let line = |n: usize| format!("{}\n", serde_json::json!({"text": "y".repeat(n)}));
        write(&path, &[head.as_bytes(), line(a).as_bytes(), line(b).as_bytes(), tail.as_bytes(), tail.as_bytes()]);
        let mut config = Config { shuffle: Shuffle::Global, ..corpus.config(&directory) };
        config.cache = Some(corpus.path("cache").into());
        let (batches, error) = drain(&Loader::new(config).unwrap(), usize::MAX);
        assert_eq!(error, None);
        assert_eq!(texts(&batches).len(), 3002);
        std::thread::sleep(Duration::from_millis(20)); // another modification time
    }
}

#[test]
fn a_line_that_begins_with_blanks_where_the_index_reads_its_next_piece() {
    let corpus = Corpus::new(0);
    let directory = corpus.path("lines");
    std::fs::create_dir(&directory).unwrap();
    let piece = 4 << 20;
    let first = format!("{{\"text\":\"{}\"}}\n", "y".repeat(piece - 2 - 12)); // ends two bytes before the piece does
    assert_eq!(first.len(), piece - 2);
    write(&Path::new(&directory).join("a.jsonl"), &[first.as_bytes(), b"   \t {\"text\": \"last\"}\n"]);
    let config = Config { shuffle: Shuffle::Global, segment_bytes: None, ..corpus.config(&directory) };
    let (batches, error) = drain(&Loader::new(config).unwrap(), usize::MAX);
    assert_eq!(error, None);
    assert!(texts(&batches).contains(&"last".to_owned()));
}

#[test]
fn zstd_that_breaks_off_or_is_damaged() {
    let corpus = Corpus::new(400);
    let directory = corpus.path("zst");
    std::fs::create_dir(&directory).unwrap();
    let whole = common::zstd(jsonl(&corpus.documents).as_bytes());
    let path = Path::new(&directory).join("b.jsonl.zst");
    std::fs::write(Path::new(&directory).join("a.jsonl.zst"), common::zstd(jsonl(&corpus.documents[..50]).as_bytes()))
        .unwrap();
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    let none: Vec<u8> = b"this is no zstd at all".to_vec();
    for bytes in
        [whole[..whole.len() - 1].to_vec(), whole[..whole.len() / 2].to_vec(), whole[..3].to_vec(), flipped, none]
    {
        std::fs::write(&path, &bytes).unwrap();
        let config = corpus.config(&directory);
        let (batches, error) = failing(&config);
        assert!(error.file.as_ref().unwrap().ends_with("b.jsonl.zst"), "{error}");
        assert!(!batches.is_empty());
        let (texts, count, listed) = skipping(&config);
        assert!(count >= 1 && listed.iter().all(|line| line.contains("b.jsonl.zst")), "{listed:?}");
        assert!(texts.len() >= 50 && texts[..50] == corpus.documents[..50]);
        assert_eq!(error.kind, Kind::Data, "{error}");
    }
    std::fs::write(&path, [&whole[..], &common::zstd(b""), &whole[..]].concat()).unwrap(); // frames are one stream
    let (batches, error) = drain(&Loader::new(corpus.config(&directory)).unwrap(), usize::MAX);
    assert_eq!((texts(&batches).len(), error), (850, None));
}

#[test]
fn parquet_that_is_truncated_damaged_or_without_the_column() {
    let corpus = Corpus::new(300);
    let directory = corpus.path("parquet");
    std::fs::create_dir(&directory).unwrap();
    let path = Path::new(&directory).join("a.parquet");
    common::write_parquet(&path, &corpus.documents, 100);
    let whole = std::fs::read(&path).unwrap();
    let opened = |config: Config| Loader::new(config).err().expect("an error at the start");
    for length in [0, 7, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = opened(corpus.config(&directory));
        assert_eq!((error.kind, error.file.as_deref()), (Kind::Data, path.to_str()), "{error}");
    }
    std::fs::write(&path, &whole).unwrap();
    let error = opened(Config { text_field: "content".into(), ..corpus.config(&directory) });
    assert!(error.to_string().contains("no column \"content\"; valid: id, text"), "{error}");
    assert!(opened(Config { text_field: "id".into(), ..corpus.config(&directory) }).to_string().contains("not text"));
    // A damaged page in the middle of the second row group.
    let reader = parquet::file::reader::SerializedFileReader::try_from(path.as_path()).unwrap();
    let meta = parquet::file::reader::FileReader::metadata(&reader).clone();
    let start = |group: usize| usize::try_from(meta.row_group(group).column(1).data_page_offset()).unwrap();
    let at =
        usize::midpoint(start(1), usize::try_from(meta.row_group(1).column(1).compressed_size()).unwrap() + start(1));
    let mut damaged = whole.clone();
    for byte in &mut damaged[at..at + 300] {
        *byte = !*byte;
    }
    std::fs::write(&path, &damaged).unwrap();
    let config = corpus.config(&directory);
    let (batches, error) = failing(&config);
    assert_eq!((error.kind, error.file.as_deref()), (Kind::Data, path.to_str()), "{error}");
    assert!(error.record.as_ref().unwrap().contains("row group 1"), "{error}");
    assert!(!batches.is_empty());
    let (texts, count, listed) = skipping(&config);
    assert_eq!(count, 1, "{listed:?}");
    assert!(listed[0].contains("a.parquet, row group 1"), "{listed:?}");
    assert!(texts.starts_with(&corpus.documents[..100]) && texts.ends_with(&corpus.documents[200..]));
}

#[test]
fn shards_that_are_truncated_or_of_another_corpus() {
    let corpus = Corpus::new(100);
    let directory = corpus.of(Format::Tokens);
    let (tokens, index) = (format!("{directory}/shard-00000.tokens"), format!("{directory}/index.json"));
    let (all, said) = (std::fs::read(&tokens).unwrap(), std::fs::read_to_string(&index).unwrap());
    let opened = || Loader::new(corpus.config(&directory)).err().expect("an error at the start");
    for length in [0, all.len() - 4, all.len() - 1] {
        std::fs::write(&tokens, &all[..length]).unwrap();
        assert!(opened().to_string().contains("shard-00000.tokens: truncated"), "{}", opened());
    }
    std::fs::write(&tokens, &all).unwrap();
    for text in ["", "{}", &said.replace("stackbench-tokens", "x"), &said.replace("\"version\": 1", "\"version\": 9")] {
        std::fs::write(&index, text).unwrap();
        assert!(opened().to_string().contains("index.json"), "{}", opened());
    }
    std::fs::write(&index, said.replace("shard-00000", "shard-00007")).unwrap();
    assert!(opened().to_string().contains("does not name this shard"), "{}", opened());
    std::fs::write(&index, &said).unwrap();
    let ends = format!("{directory}/shard-00000.tokens.ends");
    let mut numbers = std::fs::read(&ends).unwrap();
    numbers[800 - 24..800 - 16].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    std::fs::write(&ends, numbers).unwrap();
    for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
        let (_, error) = failing(&Config { shuffle, ..corpus.config(&directory) });
        assert!(error.to_string().contains("the index is not of this shard"), "{error}");
    }
}

#[test]
fn arguments_that_cannot_be() {
    let corpus = Corpus::new(50);
    let good = corpus.config(&corpus.of(Format::Jsonl));
    let bad: Vec<(Config, &str)> = vec![
        (Config { batch: 0, ..good.clone() }, "batch 0"),
        (Config { sequence: usize::MAX, ..good.clone() }, "sequence"),
        (Config { batch: usize::MAX, ..good.clone() }, "batch"),
        (Config { world_size: 0, ..good.clone() }, "rank 0 of world_size 0"),
        (Config { rank: 2, world_size: 2, ..good.clone() }, "rank 2 of world_size 2"),
        (Config { lanes: Some(0), ..good.clone() }, "lanes 0"),
        (Config { lanes: Some(3), world_size: 2, ..good.clone() }, "a multiple of world_size 2"),
        (Config { lanes: Some(1 << 19), ..good.clone() }, "blocks for 524288 lanes"),
        (Config { lanes: Some(u64::MAX), ..good.clone() }, "lanes"),
        (Config { depth: 0, ..good.clone() }, "depth"),
        (Config { depth: usize::MAX, ..good.clone() }, "depth"),
        (Config { threads: usize::MAX, ..good.clone() }, "threads"),
        (Config { epochs: Some(0), ..good.clone() }, "epochs"),
        (Config { segment_bytes: Some(0), ..good.clone() }, "segment_bytes"),
        (Config { segment_bytes: Some(u64::MAX), ..good.clone() }, "segment_bytes"),
        (Config { sources: vec![], ..good.clone() }, "no source"),
        (Config { tokenizer: None, ..good.clone() }, "tokenizer.json"),
        (Config { end_of_text: Some("<none>".into()), ..good.clone() }, "<none>"),
        (Config { shuffle: Shuffle::Global, ..corpus.config(&corpus.of(Format::Parquet)) }, "stackbench tokenize"),
        (Config { shuffle: Shuffle::Global, ..corpus.config(&corpus.of(Format::JsonlZst)) }, "stackbench tokenize"),
        (corpus.config(&corpus.path("nowhere")), "nowhere"),
        (corpus.config("ftp://host/x"), "unknown scheme"),
        (corpus.config("http://"), "http"),
    ];
    for (config, message) in bad {
        let error = Loader::new(config).err().unwrap_or_else(|| panic!("{message}: taken"));
        assert!(
            matches!(error.kind, Kind::Input | Kind::Io) && error.to_string().contains(message),
            "{message}: {error}"
        );
    }
    let weights = |weight| {
        let mut config = good.clone();
        config.sources[0].weight = weight;
        Loader::new(config).err().expect("refused").message
    };
    assert!([0.0, -1.0, f64::NAN, f64::INFINITY].into_iter().all(|weight| weights(weight).contains("weights")));
    let empty = corpus.path("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(Loader::new(corpus.config(&empty)).err().unwrap().message.contains("no file under it"));
    std::fs::write(format!("{empty}/a.jsonl"), "").unwrap();
    assert!(Loader::new(corpus.config(&empty)).err().unwrap().message.contains("no document"));
    std::fs::write(format!("{empty}/b.parquet"), "").unwrap();
    assert!(Loader::new(corpus.config(&empty)).err().unwrap().message.contains("two formats"));
}

#[test]
fn a_directory_that_may_not_be_read() {
    let corpus = Corpus::new(10);
    let directory = corpus.of(Format::Jsonl);
    let inner = format!("{directory}/inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o000)).unwrap();
    let opened = Loader::new(corpus.config(&directory));
    if std::fs::read_dir(&inner).is_err() {
        let error = opened.err().unwrap(); // root reads everything
        assert_eq!((error.kind, error.file.as_deref()), (Kind::Io, Some(inner.as_str())));
    }
    std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_corpus_without_text_ends_or_is_an_error_but_never_a_wait() {
    let corpus = Corpus::new(0);
    let directory = corpus.path("lines");
    std::fs::create_dir(&directory).unwrap();
    let bad = Path::new(&directory).join("a.jsonl");
    for (content, on_error) in [("{\"text\": \"\"}\n".repeat(500), OnError::Error), ("{\n".repeat(500), OnError::Skip)]
    {
        std::fs::write(&bad, content).unwrap();
        for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
            let config = Config { shuffle, on_error, ..corpus.config(&directory) };
            assert!(Loader::new(config.clone()).unwrap().take().unwrap().is_none());
            let endless = Loader::new(Config { epochs: None, ..config }).unwrap();
            assert!(endless.take().err().unwrap().message.contains("no text"));
        }
    }
    std::fs::remove_file(&bad).unwrap();
    let zst = Path::new(&directory).join("a.jsonl.zst");
    std::fs::write(&zst, b"nothing").unwrap();
    let endless = Config { epochs: None, on_error: OnError::Skip, ..corpus.config(&directory) };
    assert!(Loader::new(endless).unwrap().take().err().unwrap().message.contains("no text"));
}

/// A tokenizer that is slow: Hugging Face's, on long documents.
fn slow(corpus: &Corpus) -> Config {
    let directory = corpus.path("slow");
    std::fs::create_dir(&directory).unwrap();
    let text = jsonl(&vec!["some words that take their time ".repeat(300); 3000]);
    std::fs::write(format!("{directory}/a.jsonl"), text).unwrap();
    Config {
        engine: stackbench_loader::Engine::Hf,
        segment_bytes: None,
        epochs: None,
        threads: 4,
        ..corpus.config(&directory)
    }
}

#[test]
fn closing_and_dropping_while_threads_work() {
    let corpus = Corpus::new(0);
    let config = slow(&corpus);
    for wait in [0, 5, 50, 200] {
        let loader = Loader::new(config.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        let begin = Instant::now();
        loader.close();
        let took = begin.elapsed();
        assert!(took < HANG, "closing after {wait} ms took {took:?}");
        assert_eq!(loader.take().err().unwrap().kind, Kind::Misuse);
        loader.close();
        assert!(loader.state().to_json().contains("\"delivered\":0"));
    }
    for _ in 0..50 {
        drop(Loader::new(Config { engine: stackbench_loader::Engine::Fast, ..config.clone() }).unwrap());
    }
}

#[test]
fn closing_ends_a_wait_in_another_thread() {
    let corpus = Corpus::new(0);
    let loader = Loader::new(Config { threads: 1, ..slow(&corpus) }).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            loop {
                match loader.next(Duration::from_secs(60)) {
                    Ok(Next::Batch(_)) => {}
                    Ok(_) => panic!("no end, and nothing as late"),
                    Err(error) => return (error, Instant::now()),
                }
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        let begin = Instant::now();
        loader.close();
        let (error, ended) = waiting.join().unwrap();
        assert_eq!(error.kind, Kind::Misuse);
        assert!(ended.duration_since(begin) < HANG);
    });
}

#[test]
fn several_consumers_get_each_batch_once_and_the_state_is_the_last() {
    let corpus = Corpus::new(400);
    let config = Config { lanes: Some(2), ..corpus.config(&corpus.of(Format::Jsonl)) };
    let expected = common::run(config.clone());
    let loader = Loader::new(config.clone()).unwrap();
    let got: Vec<Plain> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| drain(&loader, 10).0)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(got.len(), 40);
    assert!(expected[..40].iter().all(|batch| got.contains(batch)));
    assert!(drain(&common::resume(config, &[loader.state()]), usize::MAX).0 == expected[40..]);
}

#[test]
fn nothing_is_made_ahead_without_bound() {
    let corpus = Corpus::new(2000);
    let config = Config { threads: 4, depth: 2, epochs: None, ..corpus.config(&corpus.of(Format::Jsonl)) };
    let loader = Loader::new(config).unwrap();
    loader.take().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let stats = &loader.shared().common.stats;
    let made = stats.tokens.load(Ordering::Relaxed);
    assert!(loader.waiting() <= 2 && made < 20 * 3000, "{} batches wait, {made} tokens", loader.waiting());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(stats.tokens.load(Ordering::Relaxed), made, "threads go on though nobody takes");
}

#[test]
fn tokenizing_into_shards_fails_whole_and_is_ended_by_its_caller() {
    let corpus = Corpus::new(100);
    let out = corpus.directory.path().join("out");
    let directory = corpus.of(Format::Jsonl);
    let make = |config: &Config, progress: &mut dyn FnMut(u64) -> stackbench_loader::Result<()>| {
        stackbench_loader::tokenize(config, &out, &stackbench_loader::Stop::default(), progress)
    };
    let config = corpus.config(&directory);
    let ended = make(&config, &mut |_| Err(Error::input("enough"))).err().unwrap();
    assert_eq!(ended.message, "enough");
    let path = format!("{directory}/9.jsonl");
    std::fs::write(&path, "{\n").unwrap();
    let error = make(&config, &mut |_| Ok(())).err().unwrap();
    assert!(error.file.unwrap().ends_with("9.jsonl"));
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0, "half a corpus is left");
    let header = make(&Config { on_error: OnError::Skip, ..config.clone() }, &mut |_| Ok(())).unwrap();
    assert_eq!(header.shards.iter().map(|shard| shard.documents).sum::<u64>(), 100);
    assert!(make(&config, &mut |_| Ok(())).err().unwrap().message.contains("not empty"));
    assert_eq!(texts(&common::run(corpus.config(&out.to_string_lossy()))), corpus.documents);
}
