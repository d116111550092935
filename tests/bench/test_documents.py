"""Readers: equal documents from every kind of corpus, and a place in every error."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import documents
from bench.documents import KINDS, MIB, read_documents
from bench.errors import UserError

TEXTS = [f"document {i}\r\nwith “signs” {'x' * i}\u2028 end" for i in range(40)]


def jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: t}) + "\n" for i, t in enumerate(texts)).encode()


def as_directory(path: Path) -> Path:
    for i, text in enumerate(TEXTS):
        file = path / f"{i // 10}" / f"{i:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return path


def as_jsonl(path: Path) -> Path:
    (path / "c.jsonl").write_bytes(jsonl(TEXTS))
    return path / "c.jsonl"


def as_zst(path: Path) -> Path:
    data, frame = jsonl(TEXTS), zstandard.ZstdCompressor().compress
    (path / "c.JSONL.zst").write_bytes(frame(data[:500]) + frame(data[500:]))  # two frames, cut in a line
    return path / "c.JSONL.zst"


def as_parquet(path: Path) -> Path:
    frame = pl.DataFrame({"id": range(len(TEXTS)), "url": "u", "text": TEXTS})
    frame.write_parquet(path / "c.parquet", row_group_size=7)
    return path / "c.parquet"


def as_shards(path: Path) -> Path:
    (path / "a.jsonl").write_bytes(jsonl(TEXTS[:20], "content"))
    pl.DataFrame({"only": TEXTS[20:]}).write_parquet(path / "b.parquet")
    return path


@pytest.mark.parametrize("write", [as_directory, as_jsonl, as_zst, as_parquet, as_shards])
def test_every_kind_gives_the_same_documents(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    read = read_documents(write(tmp_path), MIB)
    assert read.texts == TEXTS
    assert read.whole
    assert (read.bytes, read.trainable) == (sum(len(t.encode()) for t in TEXTS), len(TEXTS))
    (tmp_path / "other.jsonl").write_bytes(jsonl(TEXTS, "body"))
    assert read.sha256 == read_documents(tmp_path / "other.jsonl", MIB).sha256 == read.trainable_sha256


def test_the_standard_library_has_sources_and_no_tests_or_build_files() -> None:
    read = read_documents(None, 64 * MIB)
    assert read.whole
    assert len(read.texts) > 300
    assert any("class JSONDecoder" in text for text in read.texts)
    assert not any("class TestJSON" in text or "build_time_vars = {" in text for text in read.texts)
    assert read.kind == f"standard library of CPython {sys.version.split()[0]}"


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(jsonl(TEXTS) + b"this line is never read\n")
    read = read_documents(tmp_path / "c.jsonl", 100)
    assert not read.whole
    assert read.texts == TEXTS[: len(read.texts)]
    assert 100 <= read.bytes < 200


def test_a_directory_leaves_out_and_counts(tmp_path: Path) -> None:
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    root = tmp_path / "corpus"
    (root / ".git").mkdir(parents=True)
    for name, data in {
        "b.md": b"b",
        "a": b"a",
        "empty": b"",
        ".hidden": b"h",
        ".git/x": b"g",
        "png": b"\x89PNG",
    }.items():
        (root / name).write_bytes(data)
    (root / "out.txt").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "broken").symlink_to(root / "nothing")
    (root / "c").symlink_to(root / "a")
    os.mkfifo(root / "pipe")
    read = read_documents(root, MIB)
    assert read.texts == ["a", "b", "a"]
    assert (read.files_skipped, read.empty) == (1, 1)


def test_the_trainer_sees_the_same_documents_whatever_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "TRAINER_BYTES", 200)
    path = as_jsonl(tmp_path)
    first, second = read_documents(path, 200), read_documents(path, 2000)
    assert first.sha256 != second.sha256
    assert (first.trainable, first.trainable_sha256) == (second.trainable, second.trainable_sha256)
    assert 0 < first.trainable < len(first.texts)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "not json": (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "blank line": (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: not valid JSON"),
    "not utf-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not valid UTF-8"),
    "lone surrogate": (b'{"text": "a"}\n{"text": "\\ud800"}', "line 2: not Unicode text"),
    "number": (b'{"text": 3}', "line 1: column 'text' holds no strings; columns: text"),
    "later number": (b'{"text": "a"}\n{"text": 3}', "line 2: 'text' is int, not a string"),
    "null": (b'{"text": "a"}\n{"text": null}', "line 2: 'text' is null, not a string"),
    "missing column": (b'{"text": "a"}\n{"body": "b"}', "line 2: 'text' is missing; columns: body"),
    "two columns": (b'{"a": "a", "b": "b"}', "line 1: cannot tell the column of text; columns: a, b"),
    "no column": (b"{}", "line 1: cannot tell the column of text; columns: none"),
    "array": (b'["a"]', "line 1: not an object"),
    "deep": (b"[" * 100_000, "line 1: not valid JSON"),
    "long integer": (b'{"text": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    "empty": (b"", "no text in it"),
    "empty documents": (b'{"text": ""}\n' * 3, "0 files are not UTF-8, 3 documents are empty"),
}


@pytest.mark.parametrize(("data", "expected"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_malformed_records_name_their_line(tmp_path: Path, suffix: str, data: bytes, expected: str) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if suffix.endswith("zst") else data)
    with pytest.raises(UserError) as caught:
        read_documents(path, MIB)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_malformed_line_is_shown_by_the_next_command(tmp_path: Path) -> None:
    path = tmp_path / "a c.jsonl"
    path.write_bytes(b'{"text": "a"}\n{')
    with pytest.raises(UserError) as caught:
        read_documents(path, MIB)
    assert caught.value.next_command == f"cat '{path}' | sed -n 2p"


def parquet_bytes() -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pl.DataFrame({"text": TEXTS}).write_parquet(file.name)
        return Path(file.name).read_bytes()


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" * 10, b"text", parquet_bytes()[:-9], parquet_bytes()[:90]]
)
def test_a_parquet_file_that_is_none_or_truncated(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.parquet"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"c\.parquet: not a readable Parquet file"):
        read_documents(path, MIB)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"a": ["x"], "b": ["y"]}, "cannot tell the column of text; columns: a, b"),
        ({"a": [1], "b": [2.0]}, "cannot tell the column of text; columns: a, b"),
        ({"text": [1], "b": ["y"]}, "column 'text' holds no strings; columns: text, b"),
        ({"text": ["x", "y", None]}, "row 3: 'text' is null"),
        ({"text": pl.Series([], dtype=pl.String)}, "no text in it"),
    ],
)
def test_parquet_columns(tmp_path: Path, columns: dict[str, object], expected: str) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "c.parquet")
    with pytest.raises(UserError) as caught:
        read_documents(tmp_path / "c.parquet", MIB)
    assert expected in str(caught.value)


def test_parquet_slices_lose_no_row(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(3000)]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "c[1]*.parquet", row_group_size=1000)
    assert read_documents(tmp_path / "c[1]*.parquet", MIB).texts == texts


def test_zstandard_truncated_anywhere_or_followed_by_garbage(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    text = "".join(random.Random(0).choices("abcdefgh", k=6000))
    data = zstandard.ZstdCompressor(write_checksum=True).compress(jsonl([text]))
    for cut in [*range(1, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"truncated in the middle of a zstandard frame|not valid JSON"):
            read_documents(path, MIB)
    path.write_bytes(data + b"garbage")
    with pytest.raises(UserError, match="not valid zstandard data"):
        read_documents(path, MIB)


def test_zstandard_bombs_are_given_up(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(bytes(40 * MIB)))
    with pytest.raises(UserError, match=r"line 1: a document of more than 16 MiB"):
        read_documents(path, MIB)
    path.write_bytes(compress(b'{"text":"a","x":"%s"}\n' % (b"0" * 100_000) * 100))
    with pytest.raises(UserError, match=r"bytes hold less than 1000 bytes of text"):
        read_documents(path, 1000)
    path.write_bytes(compress(jsonl(["a"]) + b'{"text":""}\n' * 99_999))
    read = read_documents(path, 1000)  # empty documents count towards the limit
    assert (read.texts, read.empty, read.whole) == (["a"], 999, False)


def test_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "DOCUMENT_BYTES", 1000)
    for name, data in {
        "a.jsonl": jsonl(["x", "y" * 990 + "é" * 10]),
        "b.jsonl": jsonl(["x" * 2000])[:-1],
        "d/c.txt": b"x" * 1001,
        "e/c.txt": b"x" * 999 + "é".encode(),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        path = tmp_path / (name if name.endswith("jsonl") else name[0])
        with pytest.raises(UserError, match="a document of more than") as caught:
            read_documents(path, MIB)
        assert str(tmp_path / name) in caught.value.message
    (tmp_path / "e" / "c.txt").write_bytes(b"\xff" * 2000)
    with pytest.raises(UserError, match="1 files are not UTF-8"):
        read_documents(tmp_path / "e", MIB)


def test_paths_that_are_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b"")
    (tmp_path / "corpus.csv").write_bytes(b"a")
    with pytest.raises(UserError, match=r"does not exist \(did you mean 'corpus.jsonl'\?\)") as caught:
        read_documents(tmp_path / "corpsu.jsonl", MIB)
    assert caught.value.valid == list(KINDS)
    assert caught.value.next_command == f"ls {tmp_path}"
    with pytest.raises(UserError, match="does not exist"):
        read_documents(tmp_path / "no" / "such", MIB)
    with pytest.raises(UserError, match=r"corpus\.csv: neither a directory nor a file of a known kind"):
        read_documents(tmp_path / "corpus.csv", MIB)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="neither a directory nor a file"):
        read_documents(tmp_path / "pipe.jsonl", MIB)
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(UserError, match="no text in it"):
            read_documents(tmp_path / "empty", MIB)
        (tmp_path / "empty" / "sub" / "a.txt").write_bytes(b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(UserError, match=r"a\.jsonl: Permission denied"):
        read_documents(tmp_path / "a.jsonl", MIB)


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_bytes(b"{")
    with pytest.raises(UserError) as caught:
        read_documents(path, MIB)
    assert "udcff.jsonl, line 1" in str(caught.value).encode().decode()


@pytest.mark.parametrize(("package", "name"), [("polars", "c.parquet"), ("zstandard", "c.jsonl.zst")])
def test_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"the package '{package}' is needed") as caught:
        read_documents(tmp_path / name, MIB)
    assert caught.value.next_command == f"pip install {package}"


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
TEXT = st.fixed_dictionaries({"text": st.text(max_size=20)})
LINES = st.binary(max_size=40) | (JSON | TEXT).map(lambda value: json.dumps(value).encode())


@settings(deadline=None, max_examples=150, database=None, derandomize=True)
@given(st.lists(LINES, max_size=6), st.booleans(), st.booleans())
def test_hostile_bytes_are_read_or_refused_with_their_place(
    lines: list[bytes], zst: bool, squeeze: bool
) -> None:
    data = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.jsonl.zst" if zst else "c.jsonl")
        path.write_bytes(zstandard.ZstdCompressor().compress(data) if zst and squeeze else data)
        try:
            read = read_documents(path, MIB)
        except UserError as error:
            assert str(path) in str(error)
        else:
            records = data.removesuffix(b"\n").split(b"\n")
            assert all(read.texts)
            assert len(read.texts) + read.empty == len(records)


@settings(deadline=None, max_examples=50, database=None, derandomize=True)
@given(st.lists(st.text(max_size=30), min_size=1))
def test_text_survives_jsonl(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.jsonl")
        path.write_bytes(jsonl([*texts, "end"]))
        assert read_documents(path, MIB).texts == [*filter(None, texts), "end"]
