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
use object_store::{ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};
use tokio::runtime::Runtime;
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
    Remote(Box<Remote>),
}

#[derive(Debug)]
struct Remote {
    store: Box<dyn ObjectStore>,
    base: Url,
    retries: usize,
    runtime: Option<Runtime>,
    process: u32,
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
    Remote { store: Store, path: ObjectPath, stamp: Stamp },
    Memory(Bytes),
}

/// A wait before a request is made again; doubled each time.
const PAUSE: Duration = Duration::from_millis(100);

impl Store {
    /// The store of a URL or path: `s3://`, `gs://`, `http(s)://`, `file://`, or a path; and the path in it.
    /// Credentials and end points of S3 and GCS come from their usual environment variables.
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
        let timeout = Duration::from_secs_f64(patience.timeout_s.clamp(1e-3, 86_400.0));
        let retry = RetryConfig {
            max_retries: patience.retries,
            retry_timeout: timeout * u32::try_from(patience.retries.saturating_add(1)).unwrap_or(u32::MAX).min(1000),
            ..RetryConfig::default()
        };
        let client = ClientOptions::new()
            .with_timeout(timeout)
            .with_connect_timeout(timeout.min(Duration::from_secs(5)))
            .with_allow_http(true);
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
        let path = ObjectPath::from_url_path(parsed.path()).map_err(|e| Error::input(format!("{url}: {e}")))?;
        let path = if parsed.path().ends_with('/') { format!("{path}/") } else { path.to_string() };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .thread_name("stackbench-io")
            .build()?;
        let process = std::process::id();
        let remote = Remote { store, base, retries: patience.retries, runtime: Some(runtime), process };
        Ok((Self { inner: Arc::new(Inner::Remote(Box::new(remote))) }, path))
    }

    /// Whether names of the other store mean the same files here.
    pub fn is(&self, other: &Self) -> bool {
        match (&*self.inner, &*other.inner) {
            (Inner::Local, Inner::Local) => true,
            (Inner::Remote(a), Inner::Remote(b)) => a.base == b.base,
            _ => false,
        }
    }

    /// Files under a path, or the file itself, in the order of their names.
    pub fn list(&self, path: &str, stop: &Stop) -> Result<Vec<(String, Stamp)>> {
        let mut found = match &*self.inner {
            Inner::Local => list_local(Path::new(path), stop)?,
            Inner::Remote(remote) => remote.list(path, stop)?,
        };
        if found.is_empty() {
            return Err(Error::input("no such file, and no file under it").in_file(&self.display(path)));
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
                    return Err(changed(stamp, &now).in_file(name));
                }
                Open::Local(file)
            }
            Inner::Remote(_) => {
                Open::Remote { store: self.clone(), path: ObjectPath::from(name), stamp: stamp.clone() }
            }
        };
        Ok(File { name: self.display(name).into(), size: stamp.size, kind: Arc::new(kind), stop: stop.clone() })
    }

    /// A file's name as messages have it: with its store.
    pub fn display(&self, name: &str) -> String {
        match &*self.inner {
            Inner::Local => name.to_owned(),
            Inner::Remote(remote) => {
                let mut url = remote.base.clone();
                let _ = url.set_password(None);
                url.set_query(None);
                format!("{}/{name}", url.as_str().trim_end_matches('/'))
            }
        }
    }

    /// The path on the local file system, where there is one.
    pub fn local_path(&self, name: &str) -> Option<PathBuf> {
        matches!(&*self.inner, Inner::Local).then(|| PathBuf::from(name))
    }
}

impl Remote {
    fn wait<T>(&self, stop: &Stop, work: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        let Some(runtime) = self.runtime.as_ref().filter(|_| std::process::id() == self.process) else {
            return Err(Error::new(Kind::Misuse, "a store of another process: make a loader in each process"));
        };
        runtime.block_on(stop.race(work))?.map_err(|error| wrong(&error))
    }

    fn list(&self, path: &str, stop: &Stop) -> Result<Vec<(String, Stamp)>> {
        let place = |e: Error| e.in_file(&format!("{}/{path}", self.base.as_str().trim_end_matches('/')));
        let prefix = ObjectPath::from(path);
        let only_files = self.base.scheme().starts_with("http");
        if only_files && path.ends_with('/') {
            return Err(place(Error::input("HTTP has no listing; valid: the URL of each file")));
        }
        let mut found = Vec::new();
        if !only_files {
            let listing = async {
                let mut objects = self.store.list(Some(&prefix));
                while let Some(meta) = objects.next().await {
                    found.push(meta?);
                }
                Ok(())
            };
            self.wait(stop, listing).map_err(place)?;
        }
        if found.is_empty() && !path.is_empty() && !path.ends_with('/') {
            let head = async {
                match self.store.head(&prefix).await {
                    Err(object_store::Error::NotFound { .. }) if !only_files => Ok(None), // the caller says so
                    other => other.map(Some),
                }
            };
            found.extend(self.wait(stop, head).map_err(place)?);
        }
        let hidden = |meta: &ObjectMeta| {
            let mut parts = meta.location.prefix_match(&prefix).into_iter().flatten();
            parts.any(|part| part.as_ref().starts_with('.'))
        };
        Ok(found.iter().filter(|meta| !hidden(meta)).map(|meta| (meta.location.to_string(), stamp_of(meta))).collect())
    }

    /// A range of an object. `object_store` makes requests again that fail before their body begins; a body
    /// that breaks off or comes too late is asked for again here.
    async fn get(&self, path: &ObjectPath, stamp: &Stamp, range: Range<u64>) -> object_store::Result<Bytes> {
        // If-Match compares strongly: a weak tag would never match, and is compared in the answer.
        let strong = stamp.etag.clone().filter(|etag| !etag.starts_with("W/"));
        let mut pause = PAUSE;
        for attempt in 0.. {
            let options =
                GetOptions { if_match: strong.clone(), range: Some(range.clone().into()), ..GetOptions::default() };
            let answer = self.store.get_opts(path, options).await?;
            let now = stamp_of(&answer.meta);
            let same = match (&stamp.etag, &now.etag) {
                (Some(then), Some(now)) => then == now,
                _ => stamp.modified_ns == now.modified_ns,
            };
            if !same || now.size != stamp.size {
                let source = changed(stamp, &now).into();
                return Err(object_store::Error::Precondition { path: path.to_string(), source });
            }
            let wanted = range.end - range.start;
            let problem = match answer.bytes().await {
                Ok(bytes) if bytes.len() as u64 == wanted => return Ok(bytes),
                Ok(bytes) => {
                    let message = format!("the store gave {} of {wanted} bytes", bytes.len());
                    object_store::Error::Generic { store: "remote", source: message.into() }
                }
                Err(error) => error,
            };
            if attempt >= self.retries {
                return Err(problem);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
        unreachable!("the last attempt returns")
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            if std::process::id() == self.process {
                runtime.shutdown_background(); // a look-up of a name that hangs is not waited for
            } else {
                std::mem::forget(runtime); // a fork has not copied its thread
            }
        }
    }
}

fn changed(then: &Stamp, now: &Stamp) -> Error {
    let what = if then.size == now.size {
        "it was written again".into()
    } else {
        format!("{} bytes then, {} now", then.size, now.size)
    };
    Error::new(Kind::Changed, format!("the file changed since the manifest was built: {what}; build a new loader"))
}

fn stamp_local(meta: &std::fs::Metadata) -> Stamp {
    let modified_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    Stamp { size: meta.len(), modified_ns, etag: None }
}

fn stamp_of(meta: &ObjectMeta) -> Stamp {
    let modified_ns = i128::from(meta.last_modified.timestamp()) * 1_000_000_000;
    Stamp { size: meta.size, modified_ns, etag: meta.e_tag.clone() }
}

fn wrong(error: &object_store::Error) -> Error {
    match error {
        object_store::Error::Precondition { source, .. } => {
            source.downcast_ref::<Error>().cloned().unwrap_or_else(|| {
                Error::new(Kind::Changed, "the object changed since the manifest was built; build a new loader")
            })
        }
        other => Error::new(Kind::Io, other.to_string()),
    }
}

fn list_local(path: &Path, stop: &Stop) -> Result<Vec<(String, Stamp)>> {
    stop.check()?;
    let fail = |e: std::io::Error| Error::from(e).in_file(&path.to_string_lossy());
    let meta = std::fs::metadata(path).map_err(fail)?;
    if meta.is_file() {
        return Ok(vec![(path.to_string_lossy().into_owned(), stamp_local(&meta))]);
    }
    if !meta.is_dir() {
        return Err(Error::input("neither a file nor a directory").in_file(&path.to_string_lossy()));
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue; // hidden files are nobody's corpus
        }
        found.extend(list_local(&entry.path(), stop)?);
    }
    Ok(found)
}

impl File {
    /// Bytes that are there already.
    pub fn memory(name: &str, bytes: Bytes) -> Self {
        let size = bytes.len() as u64;
        Self { name: name.into(), size, kind: Arc::new(Open::Memory(bytes)), stop: Stop::default() }
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes, as the manifest says.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether each read is a request.
    pub fn is_remote(&self) -> bool {
        matches!(*self.kind, Open::Remote { .. })
    }

    /// `length` bytes from `start`; an error where the file is shorter.
    pub fn read(&self, start: u64, length: usize) -> Result<Bytes> {
        let end = self.end_of(start, length)?;
        if let Open::Remote { store, path, stamp } = &*self.kind {
            return self.fetch(store, path, stamp, start..end);
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
                    let error = if error.kind() == std::io::ErrorKind::UnexpectedEof {
                        let then = Stamp { size: self.size, modified_ns: 0, etag: None };
                        changed(&then, &Stamp { size: file.metadata().map_or(0, |m| m.len()), ..then.clone() })
                    } else {
                        Error::from(error)
                    };
                    error.in_file(&self.name)
                })
            }
            Open::Remote { store, path, stamp } => {
                buffer.clear();
                buffer.extend_from_slice(&self.fetch(store, path, stamp, start..end)?);
                Ok(())
            }
            Open::Memory(bytes) => {
                buffer.clear();
                buffer.extend_from_slice(&bytes[start as usize..end as usize]);
                Ok(())
            }
        }
    }

    fn end_of(&self, start: u64, length: usize) -> Result<u64> {
        self.stop.check()?;
        start.checked_add(length as u64).filter(|end| *end <= self.size).ok_or_else(|| {
            let message = format!("truncated: bytes {start}..+{length} of a file of {}", self.size);
            Error::data(message).in_file(&self.name)
        })
    }

    fn fetch(&self, store: &Store, path: &ObjectPath, stamp: &Stamp, range: Range<u64>) -> Result<Bytes> {
        let Inner::Remote(remote) = &*store.inner else { return Err(Error::input("no store")) };
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        remote.wait(&self.stop, remote.get(path, stamp, range)).map_err(|e| e.in_file(&self.name))
    }
}
