//! A store over HTTP: a small server whose answers are chosen.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Corpus, drain, run, texts};
use stackbench_loader::{Config, Kind, Loader, OnError, Patience, Shuffle, Stop};

/// What ends takes milliseconds; what does not, 20 seconds or for ever. A bound between is no matter of speed.
const HANG: Duration = Duration::from_secs(5);

// ------------------------------------------------------------------------------------------------- HTTP
/// What the server does with a request for an object.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Good,
    Status(u16),
    /// Says nothing.
    Hang,
    /// Half of the body, then the connection ends.
    Half,
    /// The beginning of the body, then nothing.
    Stall,
}

type Choose = dyn Fn(usize, &str, &str) -> Answer + Send + Sync;

/// One object, served to ranges, by a thread a connection.
struct Server {
    port: u16,
    requests: Arc<AtomicUsize>,
    object: Arc<Mutex<(Vec<u8>, String)>>,
}

impl Server {
    /// `choose` is given the number of the GET (0 for a HEAD), method and path.
    fn new(body: &[u8], choose: impl Fn(usize, &str, &str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let object = Arc::new(Mutex::new((body.to_vec(), "\"one\"".to_owned())));
        let requests = Arc::new(AtomicUsize::new(0));
        let choose: Arc<Choose> = Arc::new(choose);
        let (shared, counter) = (object.clone(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, counter, choose) = (shared.clone(), counter.clone(), choose.clone());
                std::thread::spawn(move || stream.map(|stream| serve(stream, &shared, &counter, &*choose)));
            }
        });
        Self { port, requests, object }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/data/a.jsonl", self.port)
    }

    fn count(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

fn serve(
    mut stream: TcpStream,
    object: &Mutex<(Vec<u8>, String)>,
    counter: &AtomicUsize,
    choose: &Choose,
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let (mut line, mut headers) = (String::new(), Vec::new());
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok().filter(|n| *n > 0)?;
            if header.trim().is_empty() {
                break;
            }
            headers.push(header.trim().to_ascii_lowercase());
        }
        let (method, path) = line.split_once(' ')?;
        let path = path.split(' ').next()?;
        let header =
            |name: &str| headers.iter().find_map(|h| h.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned));
        let (body, etag) = object.lock().unwrap().clone();
        let number = if method == "GET" { counter.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let answer = choose(number, method, path);
        if let Answer::Status(status) = answer {
            write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n").ok()?;
            continue;
        }
        if answer == Answer::Hang {
            std::thread::sleep(Duration::from_secs(20));
            return None;
        }
        if header("if-match").is_some_and(|wanted| wanted != etag && !etag.starts_with("W/")) {
            write!(stream, "HTTP/1.1 412 Precondition Failed\r\ncontent-length: 0\r\n\r\n").ok()?;
            continue;
        }
        let common =
            format!("etag: {etag}\r\nlast-modified: Wed, 21 Oct 2015 07:28:00 GMT\r\naccept-ranges: bytes\r\n");
        if method == "HEAD" {
            write!(stream, "HTTP/1.1 200 OK\r\n{common}content-length: {}\r\n\r\n", body.len()).ok()?;
            continue;
        }
        let range = header("range").unwrap_or(format!("bytes=0-{}", body.len() - 1));
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        let last = last.min(body.len() - 1);
        let part = &body[first..=last];
        write!(stream, "HTTP/1.1 206 Partial Content\r\n{common}content-range: bytes {first}-{last}/{}\r\ncontent-length: {}\r\n\r\n",
            body.len(), part.len()).ok()?;
        match answer {
            Answer::Half => {
                stream.write_all(&part[..part.len() / 2]).ok()?;
                return None;
            }
            Answer::Stall => {
                stream.write_all(&part[..part.len() / 2]).ok()?;
                std::thread::sleep(Duration::from_secs(20));
                return None;
            }
            _ => stream.write_all(part).ok()?,
        }
    }
}

fn config(corpus: &Corpus, url: &str) -> Config {
    let patience = Patience { retries: 3, timeout_s: 0.4 };
    Config { patience, threads: 2, ..corpus.config(url) }
}

#[test]
fn http_gives_the_same_batches_as_a_file() {
    let corpus = Corpus::new(100);
    let text = common::jsonl(&corpus.documents);
    std::fs::write(corpus.path("a.jsonl"), &text).unwrap();
    let server = Server::new(text.as_bytes(), |_, _, _| Answer::Good);
    for shuffle in [Shuffle::None, Shuffle::Block, Shuffle::Global] {
        let local = run(Config { shuffle, ..corpus.config(&corpus.path("a.jsonl")) });
        assert!(run(Config { shuffle, ..config(&corpus, &server.url()) }) == local, "{shuffle:?}");
    }
    let error = Loader::new(config(&corpus, &format!("http://127.0.0.1:{}/data/", server.port))).err().unwrap();
    assert!(error.message.contains("no listing"), "{error}");
}

#[test]
fn what_passes_is_retried() {
    let corpus = Corpus::new(100);
    let text = common::jsonl(&corpus.documents);
    for trouble in
        [Answer::Status(503), Answer::Status(500), Answer::Status(429), Answer::Hang, Answer::Half, Answer::Stall]
    {
        let server =
            Server::new(text.as_bytes(), move |n, _, _| if (3..5).contains(&n) { trouble } else { Answer::Good });
        let batches = run(config(&corpus, &server.url()));
        assert!(texts(&batches) == corpus.documents);
        assert!(server.count() > 5);
    }
}

#[test]
fn what_stays_is_an_error_that_names_the_object_after_the_batches_before_it() {
    let corpus = Corpus::new(200);
    let text = common::jsonl(&corpus.documents);
    for trouble in [Answer::Status(503), Answer::Hang, Answer::Half, Answer::Status(404), Answer::Status(403)] {
        let server = Server::new(text.as_bytes(), move |n, _, _| if n >= 6 { trouble } else { Answer::Good });
        let mut config = config(&corpus, &server.url());
        (config.threads, config.patience) = (1, Patience { retries: 1, timeout_s: 0.2 });
        let (batches, error) = drain(&Loader::new(config.clone()).unwrap(), usize::MAX);
        let error = error.unwrap();
        assert_eq!((error.kind, error.file.as_deref()), (Kind::Io, Some(server.url().as_str())), "{error}");
        assert!(!batches.is_empty());
        let skipping = Loader::new(Config { on_error: OnError::Skip, ..config }).ok();
        if let Some(loader) = skipping.filter(|_| matches!(trouble, Answer::Status(403 | 404))) {
            assert_eq!(drain(&loader, usize::MAX).1, None);
            assert!(loader.shared().common.stats.skips().iter().all(|line| line.contains("/data/a.jsonl")));
        }
    }
}

#[test]
fn an_object_that_changes_is_noticed() {
    let corpus = Corpus::new(200);
    let text = common::jsonl(&corpus.documents);
    for (before, after) in [("\"one\"", "\"two\""), ("W/\"one\"", "W/\"two\"")] {
        let server = Server::new(text.as_bytes(), |_, _, _| Answer::Good);
        server.object.lock().unwrap().1 = before.into();
        let loader = Loader::new(Config { epochs: None, depth: 1, ..config(&corpus, &server.url()) }).unwrap();
        assert!(loader.take().unwrap().is_some());
        server.object.lock().unwrap().1 = after.into();
        let error = drain(&loader, usize::MAX).1.unwrap();
        assert_eq!((error.kind, error.file.as_deref()), (Kind::Changed, Some(server.url().as_str())), "{error}");
    }
    // No version of the object: its size tells.
    let server = Server::new(text.as_bytes(), |_, _, _| Answer::Good);
    let loader = Loader::new(Config { epochs: None, depth: 1, ..config(&corpus, &server.url()) }).unwrap();
    server.object.lock().unwrap().0.push(b'\n');
    assert_eq!(drain(&loader, usize::MAX).1.unwrap().kind, Kind::Changed);
}

#[test]
fn closing_while_the_server_says_nothing() {
    let corpus = Corpus::new(200);
    let text = common::jsonl(&corpus.documents);
    for trouble in [Answer::Hang, Answer::Stall, Answer::Status(503)] {
        let server = Server::new(text.as_bytes(), move |n, _, _| if n >= 3 { trouble } else { Answer::Good });
        let mut config = config(&corpus, &server.url());
        config.patience = Patience { retries: 10, timeout_s: 20.0 };
        let loader = Loader::new(config).unwrap();
        std::thread::sleep(Duration::from_millis(300)); // threads wait for the server, or for a retry
        let begin = Instant::now();
        drop(loader);
        assert!(begin.elapsed() < HANG, "{:?}", begin.elapsed());
    }
}

#[test]
fn opening_can_be_ended_from_outside() {
    let corpus = Corpus::new(10);
    let server = Server::new(b"x", |_, _, _| Answer::Hang);
    let mut config = config(&corpus, &server.url());
    config.patience = Patience { retries: 10, timeout_s: 20.0 };
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| (Loader::open(config, &[], &stop).err(), Instant::now()));
        std::thread::sleep(Duration::from_millis(200));
        let begin = Instant::now();
        stop.set();
        let (error, ended) = opening.join().unwrap();
        assert_eq!(error.unwrap().kind, Kind::Misuse);
        assert!(ended.duration_since(begin) < HANG);
    });
}

#[test]
fn a_server_that_is_not_there() {
    let corpus = Corpus::new(10);
    let mut config = config(&corpus, "http://127.0.0.1:1/data/a.jsonl");
    config.patience = Patience { retries: 1, timeout_s: 0.2 };
    let error = Loader::new(config).err().unwrap();
    assert_eq!(error.kind, Kind::Io);
    assert!(error.to_string().contains("127.0.0.1:1/data/a.jsonl"), "{error}");
}

#[test]
fn the_test_server_answers_ranges() {
    let server = Server::new(b"0123456789", |_, _, _| Answer::Good);
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.write_all(b"GET /x HTTP/1.1\r\nRange: bytes=2-4\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("bytes 2-4/10") && answer.ends_with("234"), "{answer}");
}
