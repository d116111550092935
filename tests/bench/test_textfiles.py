"""Text on disk: every format holds the same documents, is written once, and is checked before use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import documents, textfiles
from bench.errors import UserError

TEXTS = [
    "one\n",
    "",
    "two “quoted” \\ \u0000",
    "\u2028 drei",
    "x" * 3000,
    *(f"doc {i}\n" * 20 for i in range(40)),
]


def read(corpus: textfiles.Corpus) -> list[str]:
    """Back from disk, empty documents left out, by the harness's own readers."""
    found: list[str] = []
    for path in corpus.files:
        found += documents.read_documents(path, 1 << 30).texts
    return found


def make(cache: Path, format: str, texts: list[str] = TEXTS) -> textfiles.Corpus:
    return textfiles.prepare(cache, ["key"], format, lambda: texts, {"kind": "test"})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few documents, so that there are several."""
    for name in ("FILE_BYTES", "ROW_GROUP_BYTES"):
        monkeypatch.setattr(textfiles, name, 2000)
    monkeypatch.setattr(textfiles, "TEXT_FILES", 16)


@pytest.mark.parametrize("format", list(textfiles.WRITERS))
def test_every_format_holds_the_same(tmp_path: Path, small: None, format: str) -> None:
    corpus = make(tmp_path, format)
    assert read(corpus) == [text for text in TEXTS if text]
    assert len(corpus.files) > 1 and list(corpus.files) == sorted(corpus.files)
    assert (corpus.documents, corpus.bytes) == (len(TEXTS), sum(len(t.encode()) for t in TEXTS))
    assert corpus.text_sha256 == make(tmp_path, "jsonl").text_sha256
    assert corpus.facts == {"kind": "test"}


def test_parquet_has_several_row_groups(tmp_path: Path, small: None) -> None:
    import polars as pl

    first = make(tmp_path, "parquet").files[0]
    assert pl.read_parquet_schema(first) == {"text": pl.String}
    assert first.read_bytes()[:4] == b"PAR1"


def never() -> Iterator[str]:
    raise AssertionError("it was written already")
    yield ""


@pytest.mark.parametrize("format", list(textfiles.WRITERS))
def test_it_is_written_once_and_again_when_it_is_damaged(tmp_path: Path, format: str) -> None:
    corpus = make(tmp_path, format)
    assert textfiles.prepare(tmp_path, ["key"], format, never, {}) == corpus
    path = next(p for p in sorted(corpus.directory.rglob("*")) if p.is_file() and p.name != "index.json")
    path.write_bytes(path.read_bytes()[:-1])
    assert textfiles.load(corpus.directory) is None
    assert make(tmp_path, format) == corpus
    assert [p.name for p in (tmp_path / "text").iterdir()] == [corpus.directory.name], "nothing else is left"


def test_changed_content_of_the_same_size_is_seen(tmp_path: Path) -> None:
    corpus = make(tmp_path, "jsonl")
    data = bytearray(corpus.files[0].read_bytes())
    data[20] ^= 1
    corpus.files[0].write_bytes(data)
    assert textfiles.load(corpus.directory) is None


def test_another_key_is_another_corpus(tmp_path: Path) -> None:
    other = textfiles.prepare(tmp_path, ["other"], "jsonl", lambda: ["a"], {})
    assert other.directory != make(tmp_path, "jsonl").directory
    assert json.loads(other.files[0].read_text()) == {"text": "a"}


def test_a_format_that_is_not_written_from_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tokens'"):
        make(tmp_path, "tokens")


def test_the_gates_text_is_hard_and_real_text_is_not_repeated() -> None:
    texts = list(textfiles.gate_texts(textfiles.source_of(), 0, 1_000_000))
    assert {"", "<|endoftext|>"} <= set(texts) and any("汉" in t for t in texts)
    assert 800_000 < sum(map(len, texts)) < 1_500_000
    found, facts = textfiles.real_texts(None, 2_000_000)
    assert len(set(found)) > 0.95 * len(found) and facts["repeats"] == "none"
