"""Token batches for training, read, tokenized and packed by Rust threads.

Batch k is a pure function of (corpus, tokenizer, choices, seed, k): the same for any number of threads and
any depth of prefetch, sharded over ranks without overlap, and resumed exactly from a small state. No token
becomes a Python object: arrays are the loader's own memory.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, final

import jax as _jax
import numpy as np
import torch as _torch

_Path: TypeAlias = str | PathLike[str]
#: A path or URL (`s3://`, `gs://`, `http(s)://`, `file://`) of a file, a directory or a prefix; several
#: are one source; a mapping of path to weight is several sources, mixed row by row in that proportion.
_Sources: TypeAlias = _Path | Sequence[_Path] | Mapping[_Path, float]
_Format: TypeAlias = Literal["jsonl", "jsonl.zst", "parquet", "text", "tokens"]
_Shuffle: TypeAlias = Literal["none", "block", "global"]

__version__: str

class DataError(ValueError):
    """Data that is not what it claims to be: malformed JSON, invalid UTF-8, a truncated file.

    The message begins with file and record: `part-3.jsonl, line at byte 120833: not UTF-8: …`.
    """

class ChangedError(OSError):
    """A file is no longer the one that the manifest describes: another size, modification time or ETag."""

@final
class Array:
    """int32 memory of a batch, C-contiguous, aligned to 64 bytes (shards: as the file lies).

    `numpy.asarray`, `memoryview`, `torch.from_dlpack` and `jax.dlpack.from_dlpack` take it as it is, without
    a copy. It lives as long as any of them, the loader need not. Memory of text batches may be written; that
    of mapped shards is read-only: a consumer of DLPack before 1.0 gets a copy of it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """`(batch, sequence + 1)`, or `(batch,)`."""
    def numpy(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """A NumPy array of this memory."""
    def torch(self) -> _torch.Tensor:
        """A torch tensor of this memory, on the CPU."""
    def jax(self) -> _jax.Array:
        """A JAX array of this memory, on the CPU. JAX believes that it never changes: leave it alone."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __array__(self, dtype: Any = ..., copy: bool | None = ...) -> np.ndarray[Any, Any]: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule; BufferError where it would be on a device, or read-only memory without a copy."""

@final
class Batch:
    """One batch. Rows are disjoint windows of documents, each of which ends with end-of-text; only the last
    row of a segment is filled up, with end-of-text."""

    @property
    def tokens(self) -> Array:
        """int32 `[batch, sequence + 1]`: inputs are `[:, :-1]`, targets `[:, 1:]`."""
    @property
    def positions(self) -> Array | None:
        """int32 `[batch, sequence + 1]`: place of each token in its document, from the row's start at the
        earliest; 0 where the row is filled up. None unless asked for."""
    @property
    def segments(self) -> Array | None:
        """int32 `[batch, sequence + 1]`: number of each token's document in its row, from 1; 0 where the row
        is filled up. None unless asked for."""
    @property
    def lengths(self) -> Array:
        """int32 `[batch]`: tokens of each row before it is filled up; 0 in rows that fill up a batch."""
    @property
    def lane(self) -> int:
        """The lane it comes from."""
    @property
    def padding(self) -> int:
        """Tokens of this batch that fill up."""

@final
class Loader:
    """Iterates over the batches of this rank.

    A torch loop::

        loader = Loader("s3://corpus/train/", "tokenizer.json", batch=8, sequence=2048, seed=1,
                        shuffle="block", rank=rank, world_size=world_size, lanes=64, epochs=None,
                        pinned=True, cache="/var/cache/corpus",
                        state=checkpoint.get("loader"))
        for step, batch in enumerate(loader):
            tokens = batch.tokens.torch().to("cuda", non_blocking=True)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            ...
            if step % 1000 == 0:
                save(loader=loader.state_dict())

    A JAX loop::

        with Loader("corpus/", "tokenizer.json", batch=8, sequence=2048) as loader:
            for batch in loader:
                tokens = jax.device_put(batch.tokens.jax(), sharding)
                params, loss = train_step(params, tokens[:, :-1], tokens[:, 1:])

    Batches are taken by one thread or by several. `next` waits with the GIL released, and Ctrl-C ends the
    wait. A forked child must make its own loader: it is refused with RuntimeError. Dropping the loader ends
    and joins its threads; one that tokenizes ends with its document.

    Errors come where the bad batch would be, after all batches before it, and stay: `ValueError` (arguments,
    with what is valid), `DataError`, `ChangedError`, `OSError` (a file or store that cannot be read, after
    retries), `RuntimeError` (closed, forked, or a defect of the loader).
    """

    def __new__(
        cls,
        sources: _Sources,
        tokenizer: _Path | None = None,
        *,
        batch: int,
        sequence: int,
        seed: int = 0,
        shuffle: _Shuffle = "none",
        format: _Format | None = None,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        epochs: int | None = 1,
        threads: int = 0,
        depth: int = 8,
        positions: bool = False,
        segments: bool = False,
        drop_last: bool = False,
        on_error: Literal["error", "skip"] = "error",
        engine: Literal["auto", "fast", "hf"] = "auto",
        text_field: str = "text",
        end_of_text: str | None = None,
        pinned: bool | _Path = False,
        cache: _Path | None = None,
        segment_bytes: int | None = None,
        retries: int = 4,
        timeout_s: float = 30.0,
        state: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Self:
        """Opens the sources and starts the threads; the first use of a corpus builds its manifest.

        Args:
            sources: what is read, see `_Sources`. Hidden files are left out. HTTP has no listing: give files.
                Credentials and end points of S3 and GCS come from their usual environment variables.
            tokenizer: path of a Hugging Face `tokenizer.json`; not needed where all sources hold tokens.
            batch: rows a batch, of this rank.
            sequence: a row has `sequence + 1` tokens; up to 2^24.
            seed: of shuffling and mixing.
            shuffle: `none`: as documents lie, files by name. `block`: byte ranges of lines, row groups,
                compressed files or runs of files are permuted, and the documents in each segment. `global`:
                all documents; needs an index, built once (see `cache`), and files that can be read anywhere:
                JSONL, text, tokens.
            format: None: by the names of the files (`.jsonl`, `.jsonl.zst`, `.parquet`, `.tokens`; else text,
                one document a file).
            rank: this consumer, 0 to `world_size - 1`.
            world_size: number of consumers. Each document goes to one.
            lanes: independent sequences of batches, dealt to ranks in turn; a multiple of every world size
                that is to go on from a state (64 suits most). None: the world size. Each lane must have a
                block.
            epochs: how often each source is read; None: without end. With finite epochs ranks may end a few
                batches apart: the global order is that of any world size up to the first lane's end.
            threads: that read, tokenize and pack; 0: as many as the process may use.
            depth: batches made ahead, at most.
            positions, segments: whether batches have them.
            drop_last: leave out an incomplete last batch instead of filling it up.
            on_error: `error`: raise where the bad batch would be. `skip`: leave out the record, or the rest
                of a block that cannot be read; counted and listed in `stats()`.
            engine: `hf`: Hugging Face `tokenizers`. `fast`: fastokens, ValueError where it cannot read the
                tokenizer. `auto`: fastokens where it gives the same ids on a sample of text and of this
                corpus, else `tokenizers`, with a RuntimeWarning that says why.
            text_field: key or column of the text. A document that is null or empty is left out.
            end_of_text: name of the token that ends documents and fills up rows; None: the first there is of
                `<|endoftext|>`, `<|end_of_text|>`, `</s>`, `<eos>`, `[SEP]`.
            pinned: batches in memory registered with CUDA; True: the runtime that is found, or its path.
            cache: directory for manifests, document indexes and the comparison of tokenizers: what makes the
                second start quick. None: nothing is kept.
            segment_bytes: bytes of text packed as one (for tokens: 4 a token), up to 2^30. None: by
                `sequence`, so that little is filled up. Every value is another order of batches.
            retries: of requests to a store that may be answered the next time (5xx, 429, time-outs, bodies
                that break off).
            timeout_s: longest wait for one request, seconds.
            state: of `state_dict()`, where to go on. One where the world size is the same; else a list of
                those of all ranks, after the same step. ValueError where it is of another corpus, tokenizer
                or choice: all but threads, depth, rank, world_size, epochs, positions, segments, pinned and
                cache must be the same.
        """
    def __iter__(self) -> Self: ...
    def __next__(self) -> Batch:
        """The next batch of this rank. The same error again, once one has come."""
    def state_dict(self) -> dict[str, Any]:
        """Where the rank stands after the batches that were taken (not those made ahead): JSON, some 200
        bytes a lane. Can still be taken after `close`."""
    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Goes on from a state, see `state`; sources and tokenizer stay open."""
    def stats(self) -> dict[str, Any]:
        """Counts since the start or the last `load_state_dict`: `documents`, `empty_documents`, `text_bytes`,
        `tokens` (made, delivered or not), `skipped` and the first 1000 `skips`; CPU seconds of all threads:
        `read_cpu_s`, `decode_cpu_s`, `tokenize_cpu_s`, `pack_cpu_s`."""
    def waiting(self) -> int:
        """Batches that are ready, so that taking one does not wait."""
    @property
    def engine(self) -> str | None:
        """The tokenizer in force, such as `fastokens 0.3.5`; None where shards are read."""
    @property
    def end(self) -> int:
        """Id of end-of-text, with which rows are filled up."""
    def close(self) -> None:
        """Ends and joins the threads. `next` raises RuntimeError afterwards."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

def tokenize(
    sources: _Sources,
    tokenizer: _Path,
    out: _Path,
    *,
    format: _Format | None = None,
    threads: int = 0,
    on_error: Literal["error", "skip"] = "error",
    engine: Literal["auto", "fast", "hf"] = "auto",
    text_field: str = "text",
    end_of_text: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Writes a corpus as pre-tokenized shards into `out`, a new or empty directory, in the order of its
    documents.

    `progress` is called with the tokens written so far, at least every 50 ms; what it raises ends the work,
    as Ctrl-C does, and what was written is removed. Returns the content of `index.json`: `end`, the
    tokenizer's hash, and of each shard `file`, `documents`, `tokens`, `blake3`. `NAME.tokens` is
    little-endian int32, each document followed by end-of-text; `NAME.tokens.ends` the running number of
    tokens after each document, as u64.
    """

def index(
    sources: _Sources,
    cache: _Path,
    *,
    sequence: int = 2048,
    shuffle: _Shuffle = "none",
    format: _Format | None = None,
    text_field: str = "text",
    segment_bytes: int | None = None,
) -> tuple[str, int, int]:
    """Builds the manifest and, for `shuffle="global"`, the document index of a corpus in `cache`.

    Returns the manifest's hash, the number of blocks that can be read independently (the most lanes there can
    be at this `sequence` or `segment_bytes`), and the number of documents (0 unless `global`).
    """
