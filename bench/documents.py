"""Documents of a corpus, in its order: a directory of text files, JSONL (plain or zstandard) or Parquet.

Reading is bounded: it stops when there is enough text, no document exceeds DOCUMENT_BYTES, and records that
hold next to no text (a compressed file may hold petabytes of them) are given up after RAW_FACTOR times the
text that was wanted. A record that cannot be read is an error that names its place. Nothing is dropped in
silence: files of a directory that are not UTF-8 (images, archives) and empty documents are left out and
counted. Packages are imported where they are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import shlex
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from bench.errors import UserError, did_you_mean

MIB: Final = 1 << 20
TRAINER_BYTES: Final = 16 * MIB  # of text, from the start of the corpus, that a tokenizer may be trained on
DOCUMENT_BYTES: Final = 16 * MIB  # of one document, or one line
RAW_FACTOR: Final = 64
ZST_SLICE: Final = 2048  # compressed bytes at a time: at most 64 MiB when decompressed
TEXT_COLUMNS: Final = ("text", "content")
KINDS: Final = ("a directory of text files", "a .jsonl file", "a .jsonl.zst file", "a .parquet file")
NOT_LIBRARY: Final = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
BUILD_FILES: Final = ("_sysconfigdata", "config-")  # differ between machines, and name their directories

Stream = Iterator[tuple[str, str | None]]  # (place, text), or None for a file that is not UTF-8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The documents that were read, none empty; the hashes are of (length, UTF-8) pairs in corpus order."""

    kind: str
    place: str  # for messages
    texts: list[str]
    bytes: int
    sha256: str
    trainable: int  # the first documents, up to TRAINER_BYTES: the same whatever the limit of reading was
    trainable_sha256: str
    whole: bool  # nothing is left in the corpus
    files_skipped: int
    empty: int


def read_documents(corpus: Path | None, limit: int) -> Documents:
    """The first documents of `corpus` (None: the sources of Python's standard library), until they hold
    `limit` bytes. Raises UserError where the corpus is missing, empty, or a record of it unreadable."""
    kind, place, stream = _open(corpus, limit)
    digest = hashlib.sha256()
    texts: list[str] = []
    total = skipped = empty = 0
    trainable: tuple[int, str] | None = None
    whole = True
    for where, text in stream:
        if total + empty >= limit:
            whole = False
            break
        if not text:
            skipped, empty = skipped + (text is None), empty + (text is not None)
            continue
        data = _utf8(text, where)
        if trainable is None and total + len(data) > TRAINER_BYTES:
            trainable = len(texts), digest.hexdigest()
        digest.update(len(data).to_bytes(8, "little") + data)
        texts.append(text)
        total += len(data)
    if not texts:
        raise UserError(
            f"{place}: no text in it ({skipped} files are not UTF-8, {empty} documents are empty)",
            valid=KINDS,
            next_command="--corpus PATH with text, or leave it out for Python's standard library",
        )
    trainable = trainable or (len(texts), digest.hexdigest())
    return Documents(
        kind=kind, place=place, texts=texts, bytes=total, sha256=digest.hexdigest(), trainable=trainable[0],
        trainable_sha256=trainable[1], whole=whole, files_skipped=skipped, empty=empty,
    )  # fmt: skip


def documents_of(kind: str, texts: Iterable[str]) -> Documents:
    """Documents that are text already, up to TRAINER_BYTES of them, for training a tokenizer."""
    digest, kept, total = hashlib.sha256(), [], 0
    for text in texts:
        data = text.encode()
        if total + len(data) > TRAINER_BYTES:
            break
        if data:
            digest.update(len(data).to_bytes(8, "little") + data)
            kept.append(text)
            total += len(data)
    return Documents(
        kind=kind, place=kind, texts=kept, bytes=total, sha256=digest.hexdigest(), trainable=len(kept),
        trainable_sha256=digest.hexdigest(), whole=False, files_skipped=0, empty=0,
    )  # fmt: skip


def _open(corpus: Path | None, limit: int) -> tuple[str, str, Stream]:
    """(kind, place for messages, documents)."""
    if corpus is None:
        sources = _files(Path(sysconfig.get_path("stdlib")), NOT_LIBRARY, BUILD_FILES)
        kind = f"standard library of {platform.python_implementation()} {platform.python_version()}"
        return kind, f"the {kind}", (d for p in sources if p.suffix == ".py" for d in _text_file(p, limit))
    place = f"--corpus {shown(corpus)}"
    if corpus.is_dir():
        return "directory", place, (d for p in _files(corpus) for d in READERS[_suffix(p)](p, limit))
    if not corpus.exists():
        missing(corpus, place, KINDS)
    suffix = _suffix(corpus)
    if not suffix or not corpus.is_file():
        raise UserError(f"{place}: neither a directory nor a file of a known kind", valid=KINDS)
    return suffix[1:], place, READERS[suffix](corpus, limit)


def _suffix(path: Path) -> str:
    """The suffix in READERS that the file's name ends in, "" for any other."""
    return next(suffix for suffix in READERS if path.name.lower().endswith(suffix))


def _files(root: Path, without: Iterable[str] = (), prefixes: tuple[str, ...] = ()) -> list[Path]:
    """Regular files below `root`, sorted; no hidden ones, and no symbolic link that leads out of it."""
    inside = root.resolve()
    found: list[Path] = []

    def fail(error: OSError) -> NoReturn:
        _bad(shown(Path(error.filename)), str(error.strerror), error)

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if f not in without and not f.startswith((".", *prefixes))]
        paths = (Path(folder, name) for name in names if not name.startswith((".", *prefixes)))
        found += (p for p in paths if not p.is_symlink() or p.resolve().is_relative_to(inside))
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).parts)


# ------------------------------------------------------------------------------------------- readers
def _text_file(path: Path, limit: int) -> Stream:
    """A file as one document."""
    data = b"".join(_chunks(path, DOCUMENT_BYTES + 1))
    try:
        yield shown(path), data.decode()
    except UnicodeDecodeError as error:
        if len(data) > DOCUMENT_BYTES and error.start > DOCUMENT_BYTES - 4:  # only cut off in a character
            _too_long(shown(path))
        yield shown(path), None


def _jsonl_file(path: Path, limit: int) -> Stream:
    """One document a line: the text column of the first record, which every record must have."""
    column = ""
    for where, line in _lines(path, limit):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # malformed, not UTF-8, an enormous integer
            encoding = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            show = f"{'zstdcat' if path.suffix.lower() == '.zst' else 'cat'} {typed(path)}"
            _bad(
                where, f"not valid {encoding}: {error}", error, f"{show} | sed -n {where.rpartition(' ')[2]}p"
            )
        if not isinstance(record, dict):
            _bad(where, f'not an object like {{"text": "…"}} but {_kind(record)}')
        column = column or _column(record, [k for k, v in record.items() if isinstance(v, str)], where)
        text = record.get(column)
        if not isinstance(text, str):
            problem = f"is {_kind(text)}, not a string" if column in record else "is missing"
            _bad(where, f"{column!r} {problem}; columns: {', '.join(record) or 'none'}")
        yield where, text


def _parquet_file(path: Path, limit: int) -> Stream:
    """One document a row of the text column. Slices double in size, so that little is read in vain."""
    pl = package("polars", "to read Parquet")
    try:
        frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        schema = frame.collect_schema()
        column = _column(schema, [name for name, dtype in schema.items() if dtype == pl.String], shown(path))
        frame = frame.select(column)
        start, count = 0, 256
        while len(rows := frame.slice(start, count).collect()):
            for number, text in enumerate(rows[column], start=start + 1):
                where = f"{shown(path)}, row {number}"
                if text is None:
                    _bad(where, f"{column!r} is null, not a string")
                yield where, text
            start, count = start + len(rows), 2 * count
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        reason = str(error).partition("\n")[0]
        _bad(shown(path), f"not a readable Parquet file: {reason}", error, f"ls -l {typed(path)}")


READERS: Final[dict[str, Callable[[Path, int], Stream]]] = {
    ".jsonl": _jsonl_file, ".jsonl.zst": _jsonl_file, ".parquet": _parquet_file, "": _text_file,
}  # fmt: skip


def _column(names: Iterable[str], strings: list[str], where: str) -> str:
    """`text`, else `content`, else the only column of strings."""
    names = list(names)
    chosen = [str(name) for name in TEXT_COLUMNS if name in names]
    chosen = chosen or (strings if len(strings) == 1 else [])
    if chosen and chosen[0] in strings:
        return chosen[0]
    problem = f"column {chosen[0]!r} holds no strings" if chosen else "cannot tell the column of text"
    raise UserError(
        f"--corpus, {where}: {problem}; columns: {', '.join(names) or 'none'}",
        valid=["'text'", "'content'", "or a single column of strings"],
        next_command="rename the column of text to 'text'",
    )


def _lines(path: Path, limit: int) -> Iterator[tuple[str, bytes]]:
    """(place, line) of a plain or compressed file; the last line needs no newline."""
    number, raw, rest = 0, 0, b""
    for chunk in _zst_chunks(path) if path.suffix.lower() == ".zst" else _chunks(path):
        raw += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for number, line in enumerate(lines, start=number + 1):  # noqa: B020 - goes on counting
            yield f"{shown(path)}, line {number}", line
        if len(rest) > DOCUMENT_BYTES:
            _too_long(f"{shown(path)}, line {number + 1}")
        if raw > RAW_FACTOR * limit:
            _bad(f"{shown(path)}, line {number}", f"{raw} bytes hold less than {limit} bytes of text")
    if rest:
        yield f"{shown(path)}, line {number + 1}", rest


def _chunks(path: Path, most: int = 1 << 62) -> Iterator[bytes]:
    """The file's bytes, at most `most` of them."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(min(MIB, most)):
                most -= len(chunk)
                yield chunk
    except OSError as error:
        _bad(shown(path), str(error.strerror), error, f"ls -l {typed(path)}")


def _zst_chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of all frames, a MiB or more at a time; a truncated frame is an error."""
    zstandard = package("zstandard", "to read .zst")
    test = f"zstd --test {typed(path)}"
    decoder, pending = None, bytearray()
    try:
        for chunk in _chunks(path):
            for start in range(0, len(chunk), ZST_SLICE):
                data = chunk[start : start + ZST_SLICE]
                while data:
                    decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
                    pending += decoder.decompress(data)
                    data, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
                if len(pending) >= MIB:
                    yield bytes(pending)
                    pending.clear()
    except zstandard.ZstdError as error:
        _bad(shown(path), f"not valid zstandard data: {error}", error, test)
    yield bytes(pending)
    if decoder is not None:
        _bad(shown(path), "truncated in the middle of a zstandard frame", None, test)


# -------------------------------------------------------------------------------- errors and helpers
def _bad(where: str, problem: str, error: Exception | None = None, command: str = "") -> NoReturn:
    raise UserError(f"--corpus, {where}: {problem}", next_command=command) from error


def _too_long(where: str) -> NoReturn:
    _bad(where, f"a document of more than {DOCUMENT_BYTES // MIB} MiB", None, "split it: split -C 8M …")


def _utf8(text: str, where: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        _bad(where, f"not Unicode text: {error.reason} at character {error.start}", error)
    if len(data) > DOCUMENT_BYTES:
        _too_long(where)
    return data


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def missing(path: Path, place: str, valid: Iterable[str]) -> NoReturn:
    """Raise the UserError of a path that does not exist, with the sibling that resembles it."""
    try:
        siblings = sorted(p.name for p in path.parent.iterdir())
    except OSError:
        siblings = []
    hint = did_you_mean(path.name, siblings)
    raise UserError(f"{place}: does not exist{hint}", valid=valid, next_command=f"ls {typed(path.parent)}")


def package(name: str, purpose: str) -> Any:
    """Import a package where it is used; UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"the package {name!r} is needed {purpose}: {error}"
        raise UserError(message, next_command=f"pip install {name}") from error


def shown(path: Path) -> str:
    """A path for a message, also where its bytes are not UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def typed(path: Path) -> str:
    """A path for a command to type."""
    return shlex.quote(shown(path))
