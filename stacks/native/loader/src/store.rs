//! Files by name: the local file system by `pread`, everything else through `object_store`.

use std::fs::File as LocalFile;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path as ObjectPath;
use object_store::{ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use url::Url;

use crate::error::{Error, Kind, Result};
use crate::stop::Stop;

/// Identity of a file: what must not change between building the manifest and reading.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Modification time in nanoseconds (local) or seconds x 1e9 (stores).
    pub modified_ns: i128,
    /// The store's own version of the object, where it gives one.
    pub etag: Option<String>,
}

/// How patient remote reads are.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts after the first for answers that may be better the next time (5xx, 429, time-outs).
    pub retries: usize,
    /// Longest wait for one request, seconds.
    pub timeout_s: f64,
}

impl Default for Patience {
    fn default() -> Self {
        Self { retries: 4, timeout_s: 30.0 }
    }
}

/// Where files are.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
enum Inner {
    Local,
    Remote { store: Box<dyn ObjectStore>, base: Url, prefix: ObjectPath, runtime: tokio::runtime::Runtime },
}

/// An open file: read by range from any thread.
#[derive(Clone, Debug)]
pub struct File {
    name: Arc<str>,
    size: u64,
    kind: Arc<Open>,
    stop: Stop,
}

#[derive(Debug)]
enum Open {
    Local(LocalFile),
    Remote { store: Store, path: ObjectPath, etag: Option<String> },
}

impl Store {
    /// The store of a URL or path: `s3://`, `gs://`, `http(s)://`, `file://`, or a path. Credentials and
    /// end points of S3 and GCS come from their usual environment variables.
    pub fn open(url: &str, patience: Patience) -> Result<(Self, String)> {
        if !url.contains("://") {
            return Ok((Self { inner: Arc::new(Inner::Local) }, url.to_owned()));
        }
        let parsed = Url::parse(url).map_err(|e| Error::input(format!("{url}: no URL: {e}")))?;
        if parsed.scheme() == "file" {
            let path = parsed.to_file_path().map_err(|()| Error::input(format!("{url}: no local path")))?;
            return Ok((Self { inner: Arc::new(Inner::Local) }, path.to_string_lossy().into_owned()));
        }
        let mut base = parsed.clone();
        base.set_path("");
        let retry = RetryConfig {
            max_retries: patience.retries,
            retry_timeout: Duration::from_secs_f64(patience.timeout_s * (1.0 + patience.retries as f64)),
            ..RetryConfig::default()
        };
        let client =
            ClientOptions::new().with_timeout(Duration::from_secs_f64(patience.timeout_s)).with_allow_http(true);
        let fail = |e: object_store::Error| Error::input(format!("{url}: {e}"));
        let store: Box<dyn ObjectStore> = match parsed.scheme() {
            "s3" | "s3a" => Box::new(
                object_store::aws::AmazonS3Builder::from_env()
                    .with_url(base.as_str())
                    .with_retry(retry)
                    .with_client_options(client)
                    .build()
                    .map_err(fail)?,
            ),
            "gs" => Box::new(
                object_store::gcp::GoogleCloudStorageBuilder::from_env()
                    .with_url(base.as_str())
                    .with_retry(retry)
                    .with_client_options(client)
                    .build()
                    .map_err(fail)?,
            ),
            "http" | "https" => Box::new(
                object_store::http::HttpBuilder::new()
                    .with_url(base.as_str())
                    .with_retry(retry)
                    .with_client_options(client)
                    .build()
                    .map_err(fail)?,
            ),
            other => {
                return Err(Error::input(format!(
                    "{url}: unknown scheme {other:?}; valid: a path, file, s3, gs, http, https"
                )));
            }
        };
        let prefix = ObjectPath::from_url_path(parsed.path()).map_err(|e| Error::input(format!("{url}: {e}")))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .thread_name("stackbench-io")
            .build()?;
        let inner = Inner::Remote { store, base, prefix: prefix.clone(), runtime };
        Ok((Self { inner: Arc::new(inner) }, prefix.to_string()))
    }

    /// Files under a path, or the file itself, in the order of their names.
    pub fn list(&self, path: &str, stop: &Stop) -> Result<Vec<(String, Stamp)>> {
        let mut found = match &*self.inner {
            Inner::Local => list_local(Path::new(path))?,
            Inner::Remote { store, prefix, base, runtime } => {
                if base.scheme().starts_with("http") || !path.ends_with('/') {
                    let head = runtime.block_on(stop.race(store.head(prefix)))?;
                    match head {
                        Ok(meta) => return Ok(vec![(meta.location.to_string(), stamp_of(&meta))]),
                        Err(object_store::Error::NotFound { .. }) if !base.scheme().starts_with("http") => {}
                        Err(error) => return Err(remote(&error).in_file(path)),
                    }
                }
                let listing = runtime.block_on(stop.race(store.list(Some(prefix)).collect::<Vec<_>>()))?;
                let mut files = Vec::new();
                for meta in listing {
                    let meta = meta.map_err(|e| remote(&e).in_file(path))?;
                    files.push((meta.location.to_string(), stamp_of(&meta)));
                }
                files
            }
        };
        if found.is_empty() {
            return Err(Error::input("no such file, and no file under it").in_file(path));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Opens a file that must still be the one with this stamp.
    pub fn file(&self, name: &str, stamp: &Stamp, stop: &Stop) -> Result<File> {
        let kind = match &*self.inner {
            Inner::Local => {
                let file = LocalFile::open(name).map_err(|e| Error::from(e).in_file(name))?;
                let now = stamp_local(&file.metadata().map_err(|e| Error::from(e).in_file(name))?);
                if now != *stamp {
                    return Err(changed(name, stamp.size, now.size));
                }
                Open::Local(file)
            }
            Inner::Remote { .. } => {
                Open::Remote { store: self.clone(), path: ObjectPath::from(name), etag: stamp.etag.clone() }
            }
        };
        Ok(File { name: name.into(), size: stamp.size, kind: Arc::new(kind), stop: stop.clone() })
    }

    /// The path on the local file system, where there is one.
    pub fn local_path(&self, name: &str) -> Option<PathBuf> {
        matches!(&*self.inner, Inner::Local).then(|| PathBuf::from(name))
    }
}

fn changed(name: &str, was: u64, is: u64) -> Error {
    let what =
        if was == is { "its modification time is another".into() } else { format!("{was} bytes then, {is} now") };
    Error::new(Kind::Changed, format!("the file changed since the manifest was built: {what}; build a new loader"))
        .in_file(name)
}

fn stamp_local(meta: &std::fs::Metadata) -> Stamp {
    let modified_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    Stamp { size: meta.len(), modified_ns, etag: None }
}

fn stamp_of(meta: &object_store::ObjectMeta) -> Stamp {
    let modified_ns = i128::from(meta.last_modified.timestamp()) * 1_000_000_000;
    Stamp { size: meta.size, modified_ns, etag: meta.e_tag.clone() }
}

fn remote(error: &object_store::Error) -> Error {
    match error {
        object_store::Error::Precondition { .. } => {
            Error::new(Kind::Changed, "the object changed since the manifest was built; build a new loader")
        }
        other => Error::new(Kind::Io, other.to_string()),
    }
}

fn list_local(path: &Path) -> Result<Vec<(String, Stamp)>> {
    let fail = |e: std::io::Error| Error::from(e).in_file(&path.to_string_lossy());
    let meta = std::fs::metadata(path).map_err(fail)?;
    if meta.is_file() {
        return Ok(vec![(path.to_string_lossy().into_owned(), stamp_local(&meta))]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue; // hidden files are nobody's corpus
        }
        found.extend(list_local(&entry.path())?);
    }
    Ok(found)
}

impl File {
    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes, as the manifest says.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `length` bytes from `start`; an error where the file is shorter.
    pub fn read(&self, start: u64, length: usize) -> Result<Bytes> {
        let end = self.end_of(start, length)?;
        if let Open::Remote { store, path, etag } = &*self.kind {
            return self.fetch(store, path, etag.clone(), start..end);
        }
        let mut buffer = Vec::new();
        self.read_into(start, length, &mut buffer)?;
        Ok(buffer.into())
    }

    /// The same into memory that is there already; what it held is overwritten.
    pub fn read_into(&self, start: u64, length: usize, buffer: &mut Vec<u8>) -> Result<()> {
        let end = self.end_of(start, length)?;
        match &*self.kind {
            Open::Local(file) => {
                buffer.resize(length, 0);
                file.read_exact_at(buffer, start).map_err(|error| {
                    if error.kind() == std::io::ErrorKind::UnexpectedEof {
                        changed(&self.name, self.size, file.metadata().map_or(0, |m| m.len()))
                    } else {
                        Error::from(error).in_file(&self.name)
                    }
                })
            }
            Open::Remote { store, path, etag } => {
                buffer.clear();
                buffer.extend_from_slice(&self.fetch(store, path, etag.clone(), start..end)?);
                Ok(())
            }
        }
    }

    fn end_of(&self, start: u64, length: usize) -> Result<u64> {
        start.checked_add(length as u64).filter(|end| *end <= self.size).ok_or_else(|| {
            let message = format!("truncated: bytes {start}..+{length} of a file of {}", self.size);
            Error::data(message).in_file(&self.name)
        })
    }

    fn fetch(&self, store: &Store, path: &ObjectPath, etag: Option<String>, range: Range<u64>) -> Result<Bytes> {
        let Inner::Remote { store, runtime, .. } = &*store.inner else { unreachable!("a remote file") };
        let wanted = range.end - range.start;
        let mut options = GetOptions { if_match: etag, ..GetOptions::default() };
        options.range = Some(range.into());
        let bytes = runtime.block_on(self.stop.race(async {
            match store.get_opts(path, options).await {
                Ok(answer) => answer.bytes().await,
                Err(error) => Err(error),
            }
        }))?;
        let bytes = bytes.map_err(|e| remote(&e).in_file(&self.name))?;
        if bytes.len() as u64 == wanted {
            Ok(bytes)
        } else {
            let message = format!("the store gave {} of {wanted} bytes", bytes.len());
            Err(Error::new(Kind::Io, message).in_file(&self.name))
        }
    }
}

impl parquet::file::reader::Length for File {
    fn len(&self) -> u64 {
        self.size
    }
}
