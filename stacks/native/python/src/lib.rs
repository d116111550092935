//! The Python binding of stackbench-loader: arguments in, arrays out, nothing decided here.

mod array;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::create_exception;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyStopIteration, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use stackbench_loader as core;

use array::Array;

create_exception!(
    stackbench_native,
    DataError,
    PyValueError,
    "Data that is not what it claims to be: file and record are named."
);
create_exception!(stackbench_native, ChangedError, PyOSError, "A file changed since the loader was made.");

/// How long a wait lasts before Python's signals are looked at.
const GLANCE: Duration = Duration::from_millis(50);

#[expect(clippy::needless_pass_by_value, reason = "map_err gives it away")]
fn raise(error: core::Error) -> PyErr {
    let text = error.to_string();
    match error.kind {
        core::Kind::Input => PyValueError::new_err(text),
        core::Kind::Data => DataError::new_err(text),
        core::Kind::Io => PyOSError::new_err(text),
        core::Kind::Changed => ChangedError::new_err(text),
        core::Kind::Misuse | core::Kind::Bug => PyRuntimeError::new_err(text),
    }
}

#[expect(clippy::redundant_closure_for_method_calls, reason = "the method alone is not general enough")]
/// Work that may wait for a store, in a thread of its own, so that Ctrl-C ends it.
fn interruptible<T: Send>(py: Python<'_>, work: impl FnOnce(&core::Stop) -> core::Result<T> + Send) -> PyResult<T> {
    let stop = core::Stop::default();
    let mut interrupt = None;
    let made = py.detach(|| {
        let (send, receive) = sync_channel(1);
        std::thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || send.send(work(stop)));
            loop {
                match receive.recv_timeout(GLANCE) {
                    Ok(made) => return Some(made),
                    Err(RecvTimeoutError::Disconnected) => return None, // it panicked: the scope says so
                    Err(RecvTimeoutError::Timeout) if interrupt.is_none() => {
                        interrupt = Python::attach(|py| py.check_signals()).err();
                        if interrupt.is_some() {
                            stop.set();
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        })
    });
    match (interrupt, made) {
        (Some(error), _) => Err(error),
        (None, Some(made)) => made.map_err(raise),
        (None, None) => Err(PyRuntimeError::new_err("a thread of the loader panicked: see standard error")),
    }
}

/// One of a few names, or an error that lists them.
fn choose<T: Copy>(what: &str, given: &str, valid: &[(&str, T)]) -> PyResult<T> {
    valid.iter().find(|(name, _)| *name == given).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = valid.iter().map(|(name, _)| *name).collect();
        PyValueError::new_err(format!("{what} {given:?}; valid: {}", names.join(", ")))
    })
}

const SHUFFLES: [(&str, core::Shuffle); 3] =
    [("none", core::Shuffle::None), ("block", core::Shuffle::Block), ("global", core::Shuffle::Global)];
const POLICIES: [(&str, core::OnError); 2] = [("error", core::OnError::Error), ("skip", core::OnError::Skip)];
const ENGINES: [(&str, core::Engine); 3] =
    [("auto", core::Engine::Auto), ("fast", core::Engine::Fast), ("hf", core::Engine::Hf)];

#[derive(FromPyObject)]
enum Sources {
    One(PathBuf),
    Weighted(std::collections::BTreeMap<PathBuf, f64>),
    Several(Vec<PathBuf>),
}

impl Sources {
    fn configs(self) -> Vec<core::SourceConfig> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let one = |urls, weight| core::SourceConfig { urls, weight };
        match self {
            Self::One(path) => vec![one(vec![text(path)], 1.0)],
            Self::Several(paths) => vec![one(paths.into_iter().map(text).collect(), 1.0)],
            Self::Weighted(paths) => paths.into_iter().map(|(path, weight)| one(vec![text(path)], weight)).collect(),
        }
    }
}

#[derive(FromPyObject)]
enum Pinned {
    Wanted(bool),
    Runtime(PathBuf),
}

/// One batch: `tokens`, `positions` and `segments` are int32 [batch, sequence + 1], `lengths` int32 [batch].
#[pyclass(frozen, module = "stackbench_native")]
struct Batch {
    inner: core::Batch,
    rows: usize,
    row: usize,
}

#[pymethods]
impl Batch {
    /// int32 [batch, sequence + 1]: inputs are [:, :-1], targets [:, 1:].
    #[getter]
    fn tokens(&self) -> Array {
        Array::new(self.inner.tokens.clone(), &[self.rows, self.row])
    }

    /// int32 [batch, sequence + 1]: place of each token in its document; None unless asked for.
    #[getter]
    fn positions(&self) -> Option<Array> {
        self.inner.positions.clone().map(|data| Array::new(data, &[self.rows, self.row]))
    }

    /// int32 [batch, sequence + 1]: each token's document in its row, from 1, 0 where filled up; None unless asked for.
    #[getter]
    fn segments(&self) -> Option<Array> {
        self.inner.segments.clone().map(|data| Array::new(data, &[self.rows, self.row]))
    }

    /// int32 [batch]: tokens of each row before it is filled up.
    #[getter]
    fn lengths(&self) -> Array {
        Array::new(self.inner.lengths.clone(), &[self.rows])
    }

    /// The lane it comes from.
    #[getter]
    fn lane(&self) -> u64 {
        self.inner.lane
    }

    /// Tokens of this batch that fill up.
    #[getter]
    fn padding(&self) -> u64 {
        self.inner.padding
    }

    fn __repr__(&self) -> String {
        format!(
            "Batch(tokens=int32[{}, {}], lane={}, padding={})",
            self.rows, self.row, self.inner.lane, self.inner.padding
        )
    }
}

/// Iterates over token batches of this rank: deterministic, sharded, resumed from `state_dict()`.
///
/// `Loader(sources, tokenizer, batch=8, sequence=2048)`; every argument is described in the type stub,
/// `stackbench_native.pyi`.
#[pyclass(frozen, module = "stackbench_native")]
struct Loader {
    inner: Mutex<std::sync::Arc<core::Loader>>,
}

impl Loader {
    fn get(&self) -> std::sync::Arc<core::Loader> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn states(state: &Bound<'_, PyAny>) -> PyResult<Vec<core::State>> {
    let py = state.py();
    let list = if state.is_instance_of::<PyDict>() { PyList::new(py, [state])?.into_any() } else { state.clone() };
    let text: String = py.import("json")?.call_method1("dumps", (list,))?.extract()?;
    core::states_from_json(&text).map_err(raise)
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (sources, tokenizer=None, *, batch, sequence, seed=0, shuffle="none", format=None, rank=0,
        world_size=1, lanes=None, epochs=Some(1), threads=0, depth=8, positions=false, segments=false, drop_last=false,
        on_error="error", engine="auto", text_field="text", end_of_text=None, pinned=Pinned::Wanted(false), cache=None,
        segment_bytes=None, retries=4, timeout_s=30.0, state=None))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        py: Python<'_>,
        sources: Sources,
        tokenizer: Option<PathBuf>,
        batch: usize,
        sequence: usize,
        seed: u64,
        shuffle: &str,
        format: Option<&str>,
        rank: u64,
        world_size: u64,
        lanes: Option<u64>,
        epochs: Option<u64>,
        threads: usize,
        depth: usize,
        positions: bool,
        segments: bool,
        drop_last: bool,
        on_error: &str,
        engine: &str,
        text_field: &str,
        end_of_text: Option<String>,
        pinned: Pinned,
        cache: Option<PathBuf>,
        segment_bytes: Option<u64>,
        retries: usize,
        timeout_s: f64,
        state: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        if !(timeout_s.is_finite() && timeout_s > 0.0) {
            return Err(PyValueError::new_err(format!("timeout_s {timeout_s}; valid: a number above 0")));
        }
        let config = core::Config {
            sources: sources.configs(),
            tokenizer,
            end_of_text,
            batch,
            sequence,
            seed,
            shuffle: choose("shuffle", shuffle, &SHUFFLES)?,
            format: format.map(|name| choose("format", name, &core::Format::NAMES)).transpose()?,
            rank,
            world_size,
            lanes,
            epochs,
            threads,
            depth,
            positions,
            segments,
            drop_last,
            on_error: choose("on_error", on_error, &POLICIES)?,
            engine: choose("engine", engine, &ENGINES)?,
            text_field: text_field.to_owned(),
            cache,
            segment_bytes,
            pinned: match pinned {
                Pinned::Wanted(wanted) => wanted.then(String::new),
                Pinned::Runtime(path) => Some(path.to_string_lossy().into_owned()),
            },
            patience: core::Patience { retries, timeout_s },
        };
        let states = state.map(states).transpose()?.unwrap_or_default();
        let loader = interruptible(py, |stop| core::Loader::open(config, &states, stop))?;
        if let Some(tokenizer) = loader.tokenizer().filter(|tokenizer| !tokenizer.warning.is_empty()) {
            let category = py.get_type::<pyo3::exceptions::PyRuntimeWarning>();
            let text = std::ffi::CString::new(tokenizer.warning.replace('\0', " "))?;
            PyErr::warn(py, &category, &text, 1)?;
        }
        Ok(Self { inner: Mutex::new(std::sync::Arc::new(loader)) })
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Batch> {
        let loader = self.get();
        loop {
            match py.detach(|| loader.next(GLANCE)).map_err(raise)? {
                core::Next::Batch(inner) => {
                    let config = loader.config();
                    return Ok(Batch { inner, rows: config.batch, row: config.sequence + 1 });
                }
                core::Next::End => return Err(PyStopIteration::new_err(())),
                core::Next::Late => py.check_signals()?,
            }
        }
    }

    /// Where this rank stands after the batches that were taken: small, and JSON.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("json")?.call_method1("loads", (self.get().state().to_json(),))
    }

    /// Goes on from a state, or from those of all ranks.
    fn load_state_dict(&self, py: Python<'_>, state: &Bound<'_, PyAny>) -> PyResult<()> {
        let (old, states) = (self.get(), states(state)?);
        let new = py.detach(|| old.resumed(&states)).map_err(raise)?;
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = std::sync::Arc::new(new);
        py.detach(|| old.close());
        Ok(())
    }

    /// Batches that are ready, so that taking one does not wait.
    fn waiting(&self) -> usize {
        self.get().waiting()
    }

    /// Counts of documents, tokens and what was skipped, and CPU seconds of each stage.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let loader = self.get();
        loader.check_process().map_err(raise)?;
        let stats = &loader.shared().common.stats;
        let out = PyDict::new(py);
        for (name, counter) in [
            ("documents", &stats.documents),
            ("empty_documents", &stats.empty),
            ("text_bytes", &stats.text_bytes),
            ("tokens", &stats.tokens),
            ("skipped", &stats.skipped),
        ] {
            out.set_item(name, counter.load(Ordering::Relaxed))?;
        }
        for (name, stage) in core::STAGES.into_iter().zip(core::Stage::ALL) {
            out.set_item(format!("{name}_cpu_s"), stats.cpu_ns(stage) as f64 / 1e9)?;
        }
        out.set_item("skips", stats.skips())?;
        Ok(out)
    }

    /// The tokenizer in force, such as `fastokens 0.3.5`; None where shards are read.
    #[getter]
    fn engine(&self) -> Option<&'static str> {
        self.get().tokenizer().map(core::Tokenizer::engine)
    }

    /// Id of end-of-text, with which rows are filled up.
    #[getter]
    fn end(&self) -> i32 {
        self.get().shared().shape.end
    }

    /// Ends and joins the threads; the state can still be taken.
    fn close(&self, py: Python<'_>) {
        let loader = self.get();
        py.detach(|| loader.close());
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.close(py);
    }
}

/// Writes a corpus as pre-tokenized shards into `out`, and returns the content of `index.json`.
#[pyfunction]
#[pyo3(signature = (sources, tokenizer, out, *, format=None, threads=0, on_error="error", engine="auto",
    text_field="text", end_of_text=None, progress=None))]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "keywords in Python")]
fn tokenize<'py>(
    py: Python<'py>,
    sources: Sources,
    tokenizer: PathBuf,
    out: PathBuf,
    format: Option<&str>,
    threads: usize,
    on_error: &str,
    engine: &str,
    text_field: &str,
    end_of_text: Option<String>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let config = core::Config {
        sources: sources.configs(),
        end_of_text,
        threads,
        format: format.map(|name| choose("format", name, &core::Format::NAMES)).transpose()?,
        on_error: choose("on_error", on_error, &POLICIES)?,
        engine: choose("engine", engine, &ENGINES)?,
        text_field: text_field.to_owned(),
        ..core::Config::new("", tokenizer, 1, 2048)
    };
    let mut failed = None;
    let done = interruptible(py, |stop| {
        core::tokenize(&config, &out, stop, |tokens| {
            let Some(call) = &progress else { return Ok(()) };
            Python::attach(|py| call.call1(py, (tokens,)).map(|_| ())).map_err(|error| {
                failed = Some(error);
                core::Error::new(core::Kind::Misuse, "ended by the caller")
            })
        })
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let header = done?;
    py.import("json")?.call_method1("loads", (header.to_json(),))
}

/// Builds manifest and, for shuffle "global", document index of a corpus in `cache`: (hash, blocks, documents).
#[pyfunction]
#[pyo3(signature = (sources, cache, *, sequence=2048, shuffle="none", format=None, text_field="text", segment_bytes=None))]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
fn index(
    py: Python<'_>,
    sources: Sources,
    cache: PathBuf,
    sequence: usize,
    shuffle: &str,
    format: Option<&str>,
    text_field: &str,
    segment_bytes: Option<u64>,
) -> PyResult<(String, u64, u64)> {
    let config = core::Config {
        sources: sources.configs(),
        tokenizer: None,
        cache: Some(cache),
        segment_bytes,
        shuffle: choose("shuffle", shuffle, &SHUFFLES)?,
        format: format.map(|name| choose("format", name, &core::Format::NAMES)).transpose()?,
        text_field: text_field.to_owned(),
        ..core::Config::new("", "", 1, sequence)
    };
    let made = interruptible(py, |stop| core::Opened::index(&config, stop))?;
    Ok((made.manifest.clone(), made.blocks, made.documents))
}

/// Token batches for training, read, tokenized and packed by Rust threads.
#[pymodule]
fn stackbench_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Loader>()?;
    module.add_class::<Batch>()?;
    module.add_class::<Array>()?;
    module.add_function(wrap_pyfunction!(tokenize, module)?)?;
    module.add_function(wrap_pyfunction!(index, module)?)?;
    module.add("DataError", module.py().get_type::<DataError>())?;
    module.add("ChangedError", module.py().get_type::<ChangedError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
