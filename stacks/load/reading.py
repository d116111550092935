"""What the Python loaders share: reading documents, opening a tokenizer, packing rows, and the stage clock.

    documents       text out of files, as a user of Python's fast libraries reads it, one format a function
    open_tokenizer  one interface over `tokenizers` and fastokens: `encode_batch(texts) -> (ids, offsets)`
    Packer          a stream of token ids into batches, without one Python object a token
    shares          files over workers so that reading the workers round-robin keeps the order of documents
    Stages          CPU nanoseconds of a stage of the pipeline, for the breakdown alone

Empty documents are left out by whoever packs (`Packer.add` takes the ids of documents that are not empty).
No STACK is in here, so this file is no competitor; it imports its libraries where they are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

READ_BYTES = 1 << 20  # decompressed or read at a time
WINDOW = 1024  # documents that shuffle `block` mixes after permuting files


# ------------------------------------------------------------------------------------------ documents
def documents(files: Iterable[Path], format: str, stages: Stages | None = None) -> Iterator[str]:
    """Documents in the order of `files` and of their records, empty ones left out.

    Raises FileNotFoundError for a file that is gone, and what the library raises for one it cannot read.
    """
    read = READERS[format]
    for path in files if format != "text" else text_files(files):
        for text in read(path, stages):
            if text:
                yield text


def chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` documents, the last one shorter."""
    texts = iter(texts)
    while chunk := list(islice(texts, size)):
        yield chunk


def clocked(items: Iterable[Any], stages: Stages | None, stage: str) -> Iterator[Any]:
    """`items`, the CPU time of making them counted as `stage`, 64 at a time."""
    if stages is None:
        yield from items
        return
    items, block = (item for item in items), [None] * 64  # a generator: `iter` of some begins an epoch anew
    while len(block) == 64:
        with stages.of(stage):
            block = list(islice(items, 64))
        yield from block


def _loads() -> Callable[[bytes], Any]:
    """orjson where it is installed: 1.8 times as fast as the standard library's json."""
    try:
        from orjson import loads
    except ImportError:
        from json import loads
    return loads


def _decoded(lines: Iterable[bytes], stages: Stages | None) -> Iterator[str]:
    loads = _loads()
    if stages is None:
        for line in lines:
            yield loads(line)["text"]
        return
    lines = iter(lines)
    while True:
        with stages.of("read"):
            block = list(islice(lines, 64))
        if not block:
            return
        with stages.of("decode"):
            texts = [loads(line)["text"] for line in block]
        yield from texts


def read_jsonl(path: Path, stages: Stages | None = None) -> Iterator[str]:
    with path.open("rb", buffering=READ_BYTES) as file:
        yield from _decoded(file, stages)


def read_jsonl_zst(path: Path, stages: Stages | None = None) -> Iterator[str]:
    yield from _decoded(_zst_lines(path), stages)


def _zst_lines(path: Path) -> Iterator[bytes]:
    """Lines of all frames, decompressed as a stream. Raises ValueError where the last frame is cut off:
    `stream_reader` would take that for the end."""
    import zstandard

    decoder, rest = None, b""
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES // 8):
            while data:
                decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + decoder.decompress(data)).split(b"\n")
                yield from lines
                data, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        raise ValueError(f"{path}: truncated in the middle of a zstandard frame")
    if rest:
        yield rest


def read_parquet(path: Path, stages: Stages | None = None) -> Iterator[str]:
    """A row group at a time through pyarrow where it is installed, else the file through polars."""
    for column in parquet_columns(path, stages):
        if stages is None:
            yield from column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
        else:
            with stages.of("build"):
                texts = column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
            yield from texts


def parquet_columns(path: Path, stages: Stages | None = None, groups: range | None = None) -> Iterator[Any]:
    """The column `text` in pieces: pyarrow arrays (a row group each), or the polars series of the file."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        import polars as pl

        with (stages or NOTHING).of("decode"):
            column = pl.read_parquet(path, columns=["text"], glob=False)["text"]
        yield column
        return
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups) if groups is None else groups:
            with (stages or NOTHING).of("decode"):
                column = file.read_row_group(group, columns=["text"], use_threads=False)["text"]
            yield column


def text_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Text files as they are given; of a directory, its files by name."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.glob("*.txt"))
        else:
            yield path


def read_text(path: Path, stages: Stages | None = None) -> Iterator[str]:
    with (stages or NOTHING).of("read"):
        data = path.read_bytes()
    yield data.decode()


READERS: dict[str, Callable[[Path, Any], Iterator[str]]] = {
    "jsonl": read_jsonl,
    "jsonl.zst": read_jsonl_zst,
    "parquet": read_parquet,
    "text": read_text,
}


def permuted(files: Sequence[Path], shuffle: str, seed: int) -> list[Path]:
    """The files in their order, or for shuffle `block` in one that the seed determines."""
    files = list(files)
    if shuffle == "block":
        random.Random(seed).shuffle(files)
    return files


def windowed(texts: Iterable[str], shuffle: str, seed: int, size: int = WINDOW) -> Iterator[str]:
    """The documents in their order; for shuffle `block` through a buffer of `size`, each drawn at random."""
    if shuffle == "none":
        yield from texts
        return
    texts, draw = iter(texts), random.Random(seed)
    window = list(islice(texts, size))
    for text in texts:
        place = draw.randrange(size)
        window[place], text = text, window[place]
        yield text
    draw.shuffle(window)
    yield from window


def shares(files: Sequence[Path], workers: int) -> list[list[Path]]:
    """Files dealt out: worker w has files w, w + workers, …; every worker's share keeps the order."""
    return [list(files[w::workers]) for w in range(workers)]


# ------------------------------------------------------------------------------------------ parts
@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A piece of the corpus that is read by itself: bytes of JSONL, a row group, a file, some text files."""

    paths: tuple[Path, ...]
    start: int = 0  # byte, or row group
    stop: int = -1  # byte behind the part; -1: to the end


def parts(files: Sequence[Path], format: str, size: int, shuffle: str = "none", seed: int = 0) -> list[Part]:
    """The corpus in order (for shuffle `block`: permuted), in parts of about `size` bytes where that can be.

    A line of JSONL belongs to the part in which it starts. A .zst file cannot be entered and stays whole.
    Raises FileNotFoundError for a file that is gone.
    """
    found: list[Part] = []
    if format == "text":
        group: list[Path] = []
        room = size
        for path in text_files(files):
            group.append(path)
            room -= path.stat().st_size
            if room <= 0:
                found.append(Part(tuple(group)))
                group, room = [], size
        found += [Part(tuple(group))] if group else []
    for path in files if format != "text" else ():
        if format == "jsonl":
            end = path.stat().st_size
            found += [Part((path,), start, min(start + size, end)) for start in range(0, end, size)]
        elif format == "parquet":
            found += [Part((path,), group, group + 1) for group in range(row_groups(path))]
        else:
            path.stat()
            found.append(Part((path,)))
    if shuffle == "block":
        random.Random(seed).shuffle(found)
    return found


def row_groups(path: Path) -> int:
    """How many a Parquet file has; 1 where only polars is there to read it, which reads whole files."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        path.stat()
        return 1
    with pq.ParquetFile(path) as file:
        return int(file.num_row_groups)


def read_part(
    part: Part, format: str, shuffle: str = "none", seed: int = 0, stages: Stages | None = None
) -> list[str]:
    """The documents of a part that are not empty, in order (for shuffle `block`: permuted within it)."""
    if format == "jsonl":
        with (stages or NOTHING).of("read"):
            data = _line_range(part)
        with (stages or NOTHING).of("decode"):
            loads = _loads()
            texts = [loads(line)["text"] for line in data.split(b"\n") if line]
    elif format == "parquet":
        texts = []
        for column in parquet_columns(part.paths[0], stages, range(part.start, part.stop)):
            with (stages or NOTHING).of("build"):
                texts += column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
    else:
        texts = list(documents(part.paths, format, stages))
    texts = [text for text in texts if text]
    if shuffle == "block":
        random.Random(f"{seed}:{part.paths[0].name}:{part.start}").shuffle(texts)
    return texts


def _line_range(part: Part) -> bytes:
    """The bytes of the lines that start in [start, stop)."""
    with part.paths[0].open("rb", buffering=0) as file:
        file.seek(max(part.start - 1, 0))
        data = file.read(part.stop - file.tell())
        if part.start:  # the line that began before belongs to the part before
            first = data.find(b"\n") + 1
            data = data[first:] if first else b""
        if data and not data.endswith(b"\n"):  # the last line goes on behind the part
            tail = bytearray()
            while b"\n" not in tail and (more := file.read(1 << 16)):
                tail += more
            data += tail.partition(b"\n")[0]
    return data


# ------------------------------------------------------------------------------------------ tokenizers
Encoded = tuple[np.ndarray, np.ndarray]  # ids int32 [tokens] of all documents, offsets int64 [documents + 1]


class HfTokenizer:
    """Hugging Face `tokenizers`: ids come as Python lists, which is that library's only interface.

    `batch`: False encodes a document at a time, True with `encode_batch_fast` (threads of its own).
    """

    name = "tokenizers"

    def __init__(self, path: Path, batch: bool = True) -> None:
        import tokenizers

        tok = tokenizers.Tokenizer.from_file(str(path))
        tok.no_truncation()
        tok.no_padding()
        tok.encode_special_tokens = True  # text never becomes a special token
        self.path, self.batch, self._tok = path, batch, tok

    def __reduce__(self) -> Any:
        return HfTokenizer, (self.path, self.batch)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tok.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> Encoded:
        if self.batch:
            lists = [e.ids for e in self._tok.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            lists = [self._tok.encode(text, add_special_tokens=False).ids for text in texts]
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, count=int(offsets[-1]))
        return ids, offsets


class FastTokenizer:
    """fastokens: a batch into one flat buffer, with its threads (Rayon) and without Python's lock."""

    name = "fastokens"

    def __init__(self, path: Path, batch: bool = True) -> None:
        import fastokens

        self.path, self.batch = path, batch
        self._tok = fastokens.Tokenizer.from_file(str(path))
        self._tok.no_truncation()
        self._tok.no_padding()

    def __reduce__(self) -> Any:
        return FastTokenizer, (self.path, self.batch)

    def encode(self, text: str) -> np.ndarray:
        ids, _ = self._tok.encode_batch_flat([text], False, True)
        return np.frombuffer(ids, np.int32)

    def encode_batch(self, texts: list[str]) -> Encoded:
        if self.batch:
            ids, offsets = self._tok.encode_batch_flat(texts, False, True)
            return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64)
        parts = [self.encode(text) for text in texts]
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(ids) for ids in parts], out=offsets[1:])
        return np.concatenate(parts) if parts else np.empty(0, np.int32), offsets


ENGINES: dict[str, type[HfTokenizer] | type[FastTokenizer]] = {"hf": HfTokenizer, "fast": FastTokenizer}


def open_tokenizer(path: Path, engine: str, batch: bool = True) -> HfTokenizer | FastTokenizer:
    """`hf` or `fast` (fastokens); `batch` False encodes one document at a time. Both give int32 ids."""
    if engine not in ENGINES:
        raise ValueError(f"tokenizer engine {engine!r}; valid: {', '.join(ENGINES)}")
    return ENGINES[engine](path, batch)


def with_ends(encoded: Encoded, end: int) -> np.ndarray:
    """One stream of ids: every document that has any, followed by end-of-text. int32 [tokens + documents]."""
    ids, offsets = encoded
    stops = offsets[1:]
    if not (np.diff(offsets) > 0).all():
        stops = stops[np.diff(offsets) > 0]
    out = np.empty(len(ids) + len(stops), np.int32)
    places = stops + np.arange(len(stops))  # of the end-of-text tokens in `out`
    keep = np.ones(len(out), np.bool_)
    keep[places] = False
    out[places] = end
    out[keep] = ids
    return out


def set_threads(threads: int) -> None:
    """Threads of the tokenizers' pools, before the first use of one in this process and its children."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


# ------------------------------------------------------------------------------------------ packing
class Packer:
    """Fills rows of `sequence + 1` from a stream of ids and gives batches out when they are full.

    `add(stream)` takes int32 ids that already carry their ends (`with_ends`); `flush()` fills the last batch
    up with end-of-text. `padding` counts those tokens.
    """

    def __init__(self, batch: int, sequence: int, end: int) -> None:
        self.shape, self.end = (batch, sequence + 1), end
        self.size = batch * (sequence + 1)
        self.padding = 0
        self._buffer = np.empty(self.size, np.int32)
        self._have = 0

    def add(self, stream: np.ndarray) -> Iterator[np.ndarray]:
        """Take `stream` int32 [n]; yield every batch int32 [batch, sequence + 1] that it completes."""
        start = 0
        while start < len(stream):
            take = min(self.size - self._have, len(stream) - start)
            self._buffer[self._have : self._have + take] = stream[start : start + take]
            self._have, start = self._have + take, start + take
            if self._have == self.size:
                full, self._buffer, self._have = self._buffer, np.empty(self.size, np.int32), 0
                yield full.reshape(self.shape)

    def held(self) -> np.ndarray:
        """The ids that are not yet in a batch, for whoever keeps a position."""
        return self._buffer[: self._have].copy()

    def flush(self) -> Iterator[np.ndarray]:
        """The last batch, filled up; nothing where none was begun."""
        if self._have:
            self._buffer[self._have :] = self.end
            self.padding += self.size - self._have
            full, self._buffer, self._have = self._buffer, np.empty(self.size, np.int32), 0
            yield full.reshape(self.shape)


def pack(
    texts: Iterable[list[str]], tokenizer: Any, packer: Packer, stages: Stages | None = None
) -> Iterator[np.ndarray]:
    """Chunks of documents into batches of one stream: tokenize, close every document, pack, fill up."""
    clock = stages or NOTHING
    for chunk in texts:
        with clock.of("tokenize"):
            encoded = tokenizer.encode_batch(chunk)
        with clock.of("pack"):
            full = list(packer.add(with_ends(encoded, packer.end)))
        yield from full
    yield from packer.flush()


# ------------------------------------------------------------------------------------------ stages
class Stages:
    """CPU nanoseconds of each stage, by thread, kept by process: one small file a process in `folder`.

    Picklable; a worker process writes its file with `save`, the parent reads all of them with `totals`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._ns = Path(folder), {}
        self._ns: dict[str, int]

    def __reduce__(self) -> Any:
        return Stages, (self.folder,)

    def add(self, stage: str, cpu_ns: int) -> None:
        self._ns[stage] = self._ns.get(stage, 0) + cpu_ns

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """The CPU time that this thread spends inside."""
        started = time.thread_time_ns()
        try:
            yield
        finally:
            self.add(stage, time.thread_time_ns() - started)

    def save(self) -> None:
        """Write this process's file, by rename; it is a running total, so that saving often is harmless."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"stages-{os.getpid()}-{id(self)}.json"
        temporary = target.with_suffix(".new")
        temporary.write_text(json.dumps(self._ns | {"threads": native_threads()}))
        temporary.replace(target)

    def totals(self) -> dict[str, int]:
        """CPU nanoseconds a stage, over all files of the folder, this process's included."""
        self.save()
        total: dict[str, int] = {}
        for path in self.folder.glob("stages-*.json"):
            table = json.loads(path.read_text())
            threads = table.pop("threads")
            for stage, ns in [*table.items(), *threads.items()]:
                total[stage] = total.get(stage, 0) + ns
        return total


def native_threads() -> dict[str, int]:
    """CPU nanoseconds, by stage, of this process's threads that Python does not know: pools of tokenizers
    (`tokenize`: fastokens names its own, `tokenizers` and gigatoken leave the program's name) and of polars
    (`decode`). Empty where there is no /proc."""
    found: dict[str, int] = {}
    own = {str(thread.native_id) for thread in threading.enumerate()} | {str(os.getpid())}
    program = _comm("self")
    for task in Path("/proc/self/task").glob("*"):
        name = _comm(f"self/task/{task.name}")
        stage = "decode" if name.startswith("polars") else "tokenize"
        if task.name in own or not name.startswith((program or "?", "fastokens", "polars")):
            continue
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        ticks = int(fields[11]) + int(fields[12])
        found[stage] = found.get(stage, 0) + ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return found


def _comm(place: str) -> str:
    try:
        return Path(f"/proc/{place}/comm").read_text().strip()
    except OSError:
        return ""


class _Nothing:
    """Stages that count nothing, where the block is large enough that asking costs nothing."""

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        yield

    def save(self) -> None:
        pass


NOTHING = _Nothing()


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions, for a loader's manifest."""
    return {name: importlib.metadata.version(name) for name in distributions}


# ------------------------------------------------------------------------------------------ loaders
class Base:
    """What every Python loader is given, kept as attributes; a stack's Loader says how batches are made.

    `files` exist when the loader is made; `engine` is the value of the axis `tokenizer`; `end` the id of
    end-of-text; `cache` a directory that is the loader's own; `stages` only in a breakdown.
    """

    def __init__(
        self, *, files: list[Path], format: str, tokenizer: Path, end: int, batch: int, sequence: int,
        shuffle: str, engine: str, cores: int, seed: int, options: dict[str, Any], cache: Path,
        stages: Stages | None = None,
    ) -> None:  # fmt: skip
        self.files, self.format, self.tokenizer, self.end = [Path(f) for f in files], format, tokenizer, end
        self.batch, self.sequence, self.shuffle, self.engine = batch, sequence, shuffle, engine
        self.cores, self.seed, self.options, self.cache = cores, seed, options, Path(cache)
        self.stages = stages
        self.padded = 0

    def padding(self) -> int:
        """End-of-text tokens that fill up, known after the epoch."""
        return self.padded

    def close(self) -> None:
        """Nothing is left to end, unless a stack says otherwise."""

    def facts(self, *distributions: str, **more: Any) -> dict[str, str]:
        """A manifest: versions, the tokenizer, the options in force, and `more`."""
        tokenizers = {"hf": "tokenizers", "fast": "fastokens"}
        own = [tokenizers[self.engine]] if self.engine in tokenizers else []
        found = versions(*{*own, *distributions})
        words = {"tokenizer_engine": ", ".join(own) or self.engine, **self.options, **more}
        return {**{f"version_{k}": v for k, v in found.items()}, **{k: str(v) for k, v in words.items()}}

    def key(self, *more: object) -> str:
        """Names what is kept in `cache`: changes with the files, the tokenizer and `more`."""
        stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in text_files(self.files)]
        given = hashlib.sha256(self.tokenizer.read_bytes()).hexdigest()
        return hashlib.sha256(repr((stats, given, self.end, *more)).encode()).hexdigest()[:24]


def tokenized_part(
    part: Part, format: str, tokenizer: Any, end: int, shuffle: str, seed: int, stages: Stages | None
) -> np.ndarray:
    """A part as int32 ids, end-of-text after every document: what a worker of most loaders does."""
    texts = read_part(part, format, shuffle, seed, stages)
    with (stages or NOTHING).of("tokenize"):
        encoded = tokenizer.encode_batch(texts)
    with (stages or NOTHING).of("pack"):
        return with_ends(encoded, end)
