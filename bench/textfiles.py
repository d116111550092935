"""A corpus of text on disk in every format that loaders read, made once, kept under a key of its content.

    synthetic   `bench.textgen`: as many bytes as asked for
    real        the suite's corpus (default: the standard library's sources), as much of it as asked for and
                as there is: nothing is repeated, since repeats flatter a tokenizer that remembers
    gate        a small mixture that is hard on loaders: synthetic, real, empty documents, scripts, controls

Every format holds the same documents in the same order: `text_sha256` is over (length, UTF-8) pairs and the
same for all. A directory is filled under a temporary name, synced to disk (so that the page cache can be
dropped later), and renamed; `index.json` in it holds the size and hash of every file, which are checked
before use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from bench import documents, textgen
from bench.documents import MIB, package
from bench.errors import UserError

FORMAT: Final = 2  # of the cache: raise it when the content for the same key changes
FILE_BYTES: Final = 16 * MIB  # of text in a file …
FILES: Final = 8  # … but so many files at least: a loader that deals files to workers must have some to deal
ROW_GROUP_BYTES: Final = 8 * MIB
ROW_GROUPS: Final = 4  # of a Parquet file
TEXT_FILES: Final = 1000  # in a directory
HASHED_BYTES: Final = 1 << 29  # of files: beyond it their sizes are checked, and not their hashes
FITTED_BYTES: Final = 12 * MIB  # of real text, for the lexicon
HARD: Final = (
    "", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>\n", "\n", " ", "\u00a0\u2003\t\r\n", "x" * 5000,
    "0123456789" * 50, "naïve café – “quoted” … ½ €", "Съешь же ещё этих мягких французских булок",
    "汉字かな交じり文 テスト 한국어", "العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 \u200b\ufeff", '{"text": "\\u0000"}\\',
    "it's we'll I'VE don't''s", "a  b   c    d\t\te", "\u0000\u0001\u007f", "",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """`files` are what a loader is given: files, or for `text` the directories that hold them, in order."""

    directory: Path
    format: str
    files: tuple[Path, ...]
    documents: int
    bytes: int
    text_sha256: str
    facts: dict[str, Any]


# ------------------------------------------------------------------------------------------------- documents
def source_of() -> textgen.Source:
    """The generator's source, fitted to the standard library. It takes about a second."""
    real = documents.read_documents(None, FITTED_BYTES)
    made = textgen.fit(real.texts)
    made.facts.update(fitted_to=real.kind, fitted_sha256=real.sha256)
    return made


def real_texts(corpus: Path | None, size: int) -> tuple[list[str], dict[str, Any]]:
    """The first documents of a corpus, up to a size, and what there was. Raises UserError (see documents)."""
    found = documents.read_documents(corpus, size)
    facts = {
        "corpus_kind": found.kind, "corpus_read": "whole" if found.whole else "the first documents",
        "corpus_files_skipped": found.files_skipped, "repeats": "none",
    }  # fmt: skip
    return found.texts, facts


def gate_texts(source: textgen.Source, seed: int, size: int) -> Iterator[str]:
    """Three quarters synthetic, one quarter real, and the hard ones spread between."""
    real, made = documents.read_documents(None, size // 4).texts, 0
    for i, text in enumerate(textgen.documents(source, seed, 3 * size // 4)):
        yield text
        if i < len(real) and made < size // 4:
            yield real[i]
            made += len(real[i])
        if i % 8 == 0:
            yield HARD[i // 8 % len(HARD)]


# ------------------------------------------------------------------------------------------------ on disk
def prepare(
    cache: Path, key: Iterable[Any], format: str, texts: Callable[[], Iterable[str]], facts: dict[str, Any],
    size: int = FILES * FILE_BYTES,
) -> Corpus:  # fmt: skip
    """The corpus of a key in a format, written now if it is not there. `texts` is called to write it alone,
    and is of about `size` bytes, which decides how large a file is.

    Raises UserError for a format that only `stackbench tokenize` writes, and for a missing package.
    """
    if format not in WRITERS:
        raise UserError(f"format {format!r} is not written from text", valid=list(WRITERS))
    file_bytes = min(FILE_BYTES, -(-size // FILES))
    name = hashlib.sha256(json.dumps([FORMAT, file_bytes, format, *map(str, key)]).encode()).hexdigest()[:24]
    entry = cache / "text" / name
    if (found := load(entry)) is None:
        write(entry, format, texts(), facts, file_bytes)
        found = load(entry)
    if found is None:
        raise UserError(f"{entry} was written and cannot be read", next_command=f"rm -r {entry}")
    return found


def load(entry: Path) -> Corpus | None:
    """What lies there; None where it is missing or not what its index says."""
    try:
        index = json.loads((entry / "index.json").read_text())
        for name, row in index["files"].items():
            path = entry / name
            if path.stat().st_size != row["bytes"]:
                return None
            if index["disk_bytes"] <= HASHED_BYTES and row["sha256"] and digest(path) != row["sha256"]:
                return None
        names = dict.fromkeys(n.partition("/")[0] for n in index["files"])
        return Corpus(
            directory=entry, format=index["format"], files=tuple(entry / name for name in names),
            documents=index["documents"], bytes=index["bytes"], text_sha256=index["text_sha256"],
            facts=index["facts"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(
    entry: Path, format: str, texts: Iterable[str], facts: dict[str, Any], file_bytes: int = FILE_BYTES
) -> None:  # fmt: skip
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-") as folder:
        place = Path(folder, "corpus")
        place.mkdir()
        count = Count()
        for part in WRITERS[format](place, count.over(texts), file_bytes):
            sync(part)
        small = format == "text"  # thousands of small files: sizes are enough
        paths = sorted(p for p in place.rglob("*") if p.is_file())
        rows: dict[str, dict[str, Any]] = {
            str(p.relative_to(place)): {"bytes": p.stat().st_size, "sha256": "" if small else digest(p)}
            for p in paths
        }
        index = {
            "format": format, "documents": count.documents, "bytes": count.bytes, "facts": facts,
            "text_sha256": count.digest.hexdigest(), "files": rows,
            "disk_bytes": sum(row["bytes"] for row in rows.values()),
        }  # fmt: skip
        (place / "index.json").write_text(json.dumps(index))
        sync(place / "index.json")
        if entry.exists():  # damaged, or another process was faster
            shutil.rmtree(entry, ignore_errors=True)
        try:
            place.rename(entry)
        except OSError:
            if load(entry) is None:
                raise


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Count:
    """Documents, bytes and hash of what passes through."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self.digest = hashlib.sha256()

    def over(self, texts: Iterable[str]) -> Iterator[tuple[str, int]]:
        """(document, bytes of its UTF-8)"""
        for text in texts:
            data = text.encode()
            self.documents += 1
            self.bytes += len(data)
            self.digest.update(len(data).to_bytes(8, "little") + data)
            yield text, len(data)


Sized = Iterator[tuple[str, int]]


def grouped(texts: Sized, size: int) -> Iterator[list[str]]:
    """Lists of documents of about `size` bytes; one, empty, where there are none."""
    group: list[str] = []
    have, given = 0, False
    for text, count in texts:
        group.append(text)
        have += count
        if have >= size:
            yield group
            group, have, given = [], 0, True
    if group or not given:
        yield group


def lines(group: Iterable[str]) -> bytes:
    """JSON Lines: {"text": …}, one object a line, UTF-8."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    return b"".join(b'{"text": ' + encode(text).encode() + b"}\n" for text in group)


def write_jsonl(place: Path, texts: Sized, file_bytes: int) -> Iterator[Path]:
    for number, group in enumerate(grouped(texts, file_bytes)):
        path = place / f"part-{number:05d}.jsonl"
        path.write_bytes(lines(group))
        yield path


def write_jsonl_zst(place: Path, texts: Sized, file_bytes: int) -> Iterator[Path]:
    """One frame a file, level 3, with its content size and a checksum."""
    zstandard = package("zstandard", "to write .zst")
    for number, group in enumerate(grouped(texts, file_bytes)):
        path = place / f"part-{number:05d}.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines(group)))
        yield path


def write_parquet(place: Path, texts: Sized, file_bytes: int) -> Iterator[Path]:
    """One column `text`, zstd; ROW_GROUPS row groups a file, each of ROW_GROUP_BYTES of text or less."""
    pl = package("polars", "to write Parquet")
    for number, group in enumerate(grouped(texts, ROW_GROUPS * min(ROW_GROUP_BYTES, file_bytes // 2))):
        path = place / f"part-{number:05d}.parquet"
        rows = max(1, -(-len(group) // ROW_GROUPS))
        frame = pl.DataFrame({"text": group}, schema={"text": pl.String})
        frame.write_parquet(path, compression="zstd", row_group_size=rows)
        yield path


def write_text(place: Path, texts: Sized, _: int) -> Iterator[Path]:
    """A file a document, TEXT_FILES to a directory."""
    number = -1
    for number, (text, _) in enumerate(texts):
        folder = place / f"part-{number // TEXT_FILES:05d}"
        folder.mkdir(exist_ok=True)
        path = folder / f"doc-{number:06d}.txt"
        path.write_bytes(text.encode())
        yield path


WRITERS: Final[dict[str, Callable[[Path, Sized, int], Iterator[Path]]]] = {
    "jsonl": write_jsonl, "jsonl.zst": write_jsonl_zst, "parquet": write_parquet, "text": write_text,
}  # fmt: skip
