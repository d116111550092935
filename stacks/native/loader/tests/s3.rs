//! A real S3 server (`s3s-fs`), started here: the same batches as from files, and errors that name the object.
//!
//! It is found on PATH or at `STACKBENCH_S3_SERVER`: `cargo install s3s-fs@0.14.1 --locked --features binary`.

mod common;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Corpus, drain, run, texts};
use stackbench_loader::{Config, Format, Kind, Loader, Patience, Shuffle};

struct Bucket {
    server: Child,
    root: tempfile::TempDir,
}

impl Drop for Bucket {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn server_path() -> Option<PathBuf> {
    let given = std::env::var_os("STACKBENCH_S3_SERVER").map(PathBuf::from);
    let on_path =
        std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    given.into_iter().chain(on_path.map(|directory| directory.join("s3s-fs"))).find(|path| path.is_file())
}

/// A server with a bucket `corpus`, and the environment that points to it.
fn bucket() -> Option<Bucket> {
    let Some(program) = server_path() else {
        eprintln!("skipped: no S3 server: cargo install s3s-fs@0.14.1 --locked --features binary");
        return None;
    };
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("corpus")).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = Command::new(program)
        .args(["--host", "127.0.0.1", "--port", &port.to_string(), "--access-key", "key", "--secret-key", "secret"])
        .arg(root.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let bucket = Bucket { server, root };
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(10), "the S3 server does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    for (name, value) in [
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT", &format!("http://127.0.0.1:{port}")),
        ("AWS_ALLOW_HTTP", "true"),
    ] {
        // SAFETY: this file has one test, and its server runs in another process.
        unsafe { std::env::set_var(name, value) };
    }
    Some(bucket)
}

fn copy(from: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn s3_gives_the_same_batches_as_files() {
    let Some(bucket) = bucket() else { return };
    let corpus = Corpus::new(60);
    let objects = bucket.root.path().join("corpus");
    for format in [Format::Jsonl, Format::JsonlZst, Format::Parquet, Format::Text] {
        let name = Format::NAMES.iter().find(|(_, f)| *f == format).unwrap().0;
        copy(&corpus.of(format), &objects.join("v1").join(name));
        let url = format!("s3://corpus/v1/{name}/");
        for shuffle in [Shuffle::None, Shuffle::Block] {
            let local = run(Config { shuffle, ..corpus.config(&corpus.of(format)) });
            let patience = Patience { retries: 2, timeout_s: 10.0 };
            let remote = Config { shuffle, patience, ..corpus.config(&url) };
            assert!(run(remote.clone()) == local, "{format:?} {shuffle:?}");
            assert!(run(Config { cache: Some(corpus.path("cache").into()), ..remote.clone() }) == local);
            assert!(run(Config { cache: Some(corpus.path("cache").into()), ..remote }) == local, "from the cache");
        }
        let without_slash = corpus.config(url.trim_end_matches('/'));
        assert!(texts(&run(without_slash)) == corpus.documents);
    }
    let one = corpus.config("s3://corpus/v1/jsonl/0.jsonl");
    assert!(texts(&run(one)) == corpus.documents[..12]);
    let mut two = corpus.config("s3://corpus/v1/jsonl/0.jsonl");
    two.sources[0].urls.push("s3://other/x.jsonl".into());
    assert!(Loader::new(two).err().unwrap().message.contains("one store"));
    let error = Loader::new(corpus.config("s3://corpus/nothing/")).err().unwrap();
    assert!(error.to_string().contains("s3://corpus/nothing/: no such file"), "{error}");
    // It changes, vanishes, and is damaged.
    let path = objects.join("v1/jsonl/4.jsonl");
    let text = std::fs::read(&path).unwrap();
    let endless = || Loader::new(Config { epochs: None, depth: 1, ..corpus.config("s3://corpus/v1/jsonl/") }).unwrap();
    let loader = endless();
    loader.take().unwrap();
    std::fs::write(&path, &text[..text.len() - 1]).unwrap();
    let error = drain(&loader, usize::MAX).1.unwrap();
    assert_eq!((error.kind, error.file.as_deref()), (Kind::Changed, Some("s3://corpus/v1/jsonl/4.jsonl")), "{error}");
    let loader = endless();
    loader.take().unwrap();
    std::fs::remove_file(&path).unwrap();
    let error = drain(&loader, usize::MAX).1.unwrap();
    assert_eq!((error.kind, error.file.as_deref()), (Kind::Io, Some("s3://corpus/v1/jsonl/4.jsonl")), "{error}");
    std::fs::write(&path, [&text[..], b"{\n"].concat()).unwrap();
    let error = drain(&endless(), usize::MAX).1.unwrap();
    assert_eq!(
        error.to_string().split(": ").next(),
        Some(&*format!("s3://corpus/v1/jsonl/4.jsonl, line at byte {}", text.len()))
    );
    // The server ends.
    let mut config = corpus.config("s3://corpus/v1/jsonl/");
    config.patience = Patience { retries: 1, timeout_s: 0.5 };
    drop(bucket);
    let error = Loader::new(config).err().unwrap();
    assert_eq!((error.kind, error.file.as_deref()), (Kind::Io, Some("s3://corpus/v1/jsonl/")), "{error}");
}
