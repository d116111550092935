"""Batches: packing, order, the tokenizers, the cache. Readers are tested in test_documents.py."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import corpus, documents
from bench.corpus import Batches, prepare_batches
from bench.documents import Documents
from bench.errors import UserError

WORDS = ["loss", "step", "batch", "token", "the", "of", "gradient", "<|endoftext|>", "kernel", "é", "値"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(5 + i % 40)) + f" {i}" for i in range(300)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def prepare(folder: Path, **changes: Any) -> Batches:
    arguments: dict[str, Any] = {
        "n": 3, "batch": 2, "sequence": 16, "vocab": 400, "seed": 0,
        "out_dir": folder / "out", "cache_dir": folder / "cache",
    }  # fmt: skip
    return prepare_batches(**arguments | changes)


def array(batches: Batches) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.fromfile(batches.path, "<i4").reshape(batches.shape)


def kept_tokenizer(folder: Path) -> Path:
    """The one tokenizer.json in the cache, under a name of its own."""
    (data,) = (folder / "cache" / "tokenizers").glob("*.bin")
    (folder / "tokenizer.json").write_bytes(data.read_bytes())
    return folder / "tokenizer.json"


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizers", "numpy", "polars", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)


# ------------------------------------------------------------------------------------ the whole way
def test_the_standard_library_becomes_batches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path, vocab=2048, sequence=128)
    rows = array(first)
    assert first.shape == rows.shape == (3, 2, 129)
    assert rows.min() >= 0
    assert rows.max() < 2048
    assert len(np.unique(rows)) > 100
    assert first.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()
    tok = tokenizers.Tokenizer.from_file(str(kept_tokenizer(tmp_path)))
    assert tok.get_vocab_size() == first.provenance["tokenizer_vocab"] == 2048
    text = tok.decode(rows.ravel().tolist(), skip_special_tokens=False)
    assert text.split("<|endoftext|>")[0][:500] in "\0".join(documents.read_documents(None, 1 << 26).texts)

    without_packages(monkeypatch)
    again = prepare(tmp_path, vocab=2048, sequence=128, out_dir=tmp_path / "second")
    assert again.path.parent == tmp_path / "second"
    assert again.path.read_bytes() == first.path.read_bytes()
    assert (again.sha256, again.shape, again.provenance) == (first.sha256, first.shape, first.provenance)


def test_provenance_names_content_and_no_place(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "data" / getpass.getuser()
    folder.mkdir(parents=True)
    moved = source.rename(folder / "name-of-a-person.jsonl")
    facts = prepare(tmp_path, corpus=moved, n=2).provenance
    assert facts["corpus_kind"] == "jsonl"
    assert (facts["corpus_documents"], facts["corpus_read"]) == (len(TEXTS), "whole")
    assert facts["tokenizer_end_of_text"] == "<|endoftext|>"
    assert all(isinstance(fact, (str, int)) for fact in facts.values())
    for name in (str(tmp_path), "person", f"/{getpass.getuser()}"):
        assert name not in json.dumps(facts)


def test_equal_content_of_another_kind_shares_batches_and_keeps_its_own_provenance(
    tmp_path: Path, source: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_text(text)
    one, other = prepare(tmp_path, corpus=source), prepare(tmp_path, corpus=folder)
    assert one.path == other.path
    assert (one.provenance["corpus_kind"], other.provenance["corpus_kind"]) == ("jsonl", "directory")


def test_every_determinant_changes_the_batches(tmp_path: Path, source: Path) -> None:
    base = prepare(tmp_path, corpus=source)
    changed = source.with_name("changed.jsonl")
    changed.write_text(source.read_text().replace("gradient", "Gradient"))
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"n": 4}, {"batch": 3}, {"sequence": 17}, {"vocab": 350}, {"corpus": changed},
        {"tokenizer": kept_tokenizer(tmp_path), "vocab": 401},
    ]  # fmt: skip
    paths = {prepare(tmp_path, **{"corpus": source} | change).path for change in changes}
    assert len(paths | {base.path}) == len(changes) + 1
    given_again = prepare(tmp_path, corpus=source, tokenizer=tmp_path / "tokenizer.json")
    assert given_again.sha256 == base.sha256  # the same tokenizer, given
    assert given_again.provenance["tokenizer_kind"] == "given"
    assert set(array(base).ravel()) <= set(range(400))
    assert prepare(tmp_path, corpus=source, seed=1).sha256 != base.sha256


def test_special_tokens_in_the_text_stay_text(tmp_path: Path, source: Path) -> None:
    rows = array(prepare(tmp_path, corpus=source, n=40, batch=1))
    tok = tokenizers.Tokenizer.from_file(str(kept_tokenizer(tmp_path)))
    end = tok.token_to_id("<|endoftext|>")
    pieces = " ".join(map(str, rows.ravel())).split(f" {end} ")
    decoded = [tok.decode([int(i) for i in piece.split()]) for piece in pieces[:-1]]
    assert len(decoded) > 5
    assert set(decoded) <= set(TEXTS)
    assert any("<|endoftext|>" in text for text in decoded)


def test_a_small_vocabulary_needs_a_tokenizer(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="vocabulary of 256: a byte-level tokenizer has at least 257"):
        prepare(tmp_path, corpus=source, vocab=256)
    assert array(prepare(tmp_path, corpus=source, vocab=257)).max() < 257
    with pytest.raises(ValueError, match="at least 1"):
        prepare(tmp_path, corpus=source, batch=0)


def test_a_corpus_that_is_too_small(tmp_path: Path, source: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "a.txt").write_bytes(b"a")
    with pytest.raises(UserError, match=r"tiny: too small: 102 tokens are needed, 2 are in it\n") as caught:
        prepare(tmp_path, corpus=tmp_path / "tiny")
    assert caught.value.message.startswith("--corpus ")
    assert "--corpus" in caught.value.next_command
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ packing
class Characters:
    """A tokenizer whose tokens are code points, and which counts what it is given."""

    def __init__(self) -> None:
        self.documents = 0

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[types.SimpleNamespace]:
        assert not add_special_tokens
        self.documents += len(texts)
        return [types.SimpleNamespace(ids=[ord(c) for c in text]) for text in texts]


def pool(texts: list[str], whole: bool = True) -> Documents:
    return Documents(
        kind="test", place="the test", texts=texts, bytes=sum(map(len, texts)), sha256="", trainable=0,
        trainable_sha256="", whole=whole, files_skipped=0, empty=0,
    )  # fmt: skip


@settings(deadline=None, max_examples=200, database=None, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1), st.integers(0, 3), st.data())
def test_packing_is_the_stream_of_permuted_documents(
    texts: list[str], seed: int, data: st.DataObject
) -> None:
    order = corpus._order(str(seed), len(texts))
    assert sorted(order) == list(range(len(texts)))
    stream = [token for i in order for token in (*map(ord, texts[i]), -1)]
    needed = data.draw(st.integers(1, len(stream) + 5))
    if needed > len(stream):
        with pytest.raises(UserError, match=f"{needed} tokens are needed, {len(stream)} are in it"):
            corpus._pack(Characters(), -1, pool(texts), needed, seed, "T")
        return
    packed, used = corpus._pack(Characters(), -1, pool(texts), needed, seed, "T")
    assert np.frombuffer(packed, "<i4").tolist() == stream[:needed]
    assert sum(len(texts[i]) + 1 for i in order[: used - 1]) < needed
    assert sum(len(texts[i]) + 1 for i in order[:used]) >= needed


def test_no_more_is_tokenized_than_needed() -> None:
    tok = Characters()
    _, used = corpus._pack(tok, -1, pool(["x" * 99] * 5000), 1000, 0, "T")
    assert used == 10
    assert tok.documents < 60


def test_the_order_is_fixed_for_ever() -> None:
    assert corpus._order("0", 8) == [7, 4, 3, 2, 6, 0, 5, 1] != corpus._order("1", 8)


def test_a_limited_corpus_that_is_too_small_says_what_was_read() -> None:
    with pytest.raises(UserError, match=r"\(the first 3 bytes, which is all that is read\)"):
        corpus._pack(Characters(), -1, pool(["abc"], whole=False), 5, 0, "T")


# --------------------------------------------------------------------------------------- tokenizers
def test_training_gives_the_same_bytes_with_any_number_of_threads(tmp_path: Path, source: Path) -> None:
    call = (
        "import sys; from pathlib import Path; from bench.corpus import prepare_batches as p;"
        "f = Path(sys.argv[1]);"
        "b = p(n=3, batch=2, sequence=16, vocab=400, seed=0, out_dir=f, cache_dir=f, "
        "corpus=Path(sys.argv[2])); print(b.sha256, b.provenance['tokenizer_sha256'])"
    )
    running = []
    for i, threads in enumerate(
        ["RAYON_NUM_THREADS=1", "RAYON_NUM_THREADS=5", "TOKENIZERS_PARALLELISM=false"]
    ):
        command = ["env", threads, sys.executable, "-c", call, str(tmp_path / str(i)), str(source)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    answers = {process.communicate(timeout=60)[0] for process in running}
    here = prepare(tmp_path, corpus=source)
    assert answers == {f"{here.sha256} {here.provenance['tokenizer_sha256']}\n"}


def save(path: Path, change: dict[str, Any], model: dict[str, Any] | None = None) -> Path:
    content = json.loads(path.read_bytes())
    content.update(change)
    content["model"].update(model or {})
    path.write_text(json.dumps(content))
    return path


def test_tokenizers_that_cannot_be_used(tmp_path: Path, source: Path) -> None:
    prepare(tmp_path, corpus=source)
    tok = kept_tokenizer(tmp_path)
    good = tok.read_bytes()

    def refused(path: Path, match: str, **changes: Any) -> UserError:
        with pytest.raises(UserError, match=match) as caught:
            prepare(tmp_path, corpus=source, tokenizer=path, seed=9, **changes)
        assert str(path) in caught.value.message
        return caught.value

    refused(tok, "has ids up to 399, the model a vocabulary of 399", vocab=399)
    for data in (b"", b"{}", b"text", b"\xff\xfe", b"[]", good[: len(good) // 2]):
        tok.write_bytes(data)
        refused(tok, "not a tokenizer.json")
    tok.write_bytes(good)
    refused(save(tok, {}, {"dropout": 0.5}), "a dropout of 0.5")
    tok.write_bytes(good)
    renamed = json.loads(good.replace(b"<|endoftext|>", b"<eos>"))
    refused(save(tok, renamed), "no end-of-text token; its special tokens: <eos>")
    refused(tmp_path / "tokenizer.jsn", r"does not exist \(did you mean 'tokenizer.json'\?\)")
    error = refused(tmp_path, "not a file")
    assert error.next_command == f"--tokenizer {tmp_path / 'tokenizer.json'}"


def test_end_of_text_is_the_first_of_the_documented_tokens(tmp_path: Path, source: Path) -> None:
    prepare(tmp_path, corpus=source)
    tok = kept_tokenizer(tmp_path)
    tok.write_bytes(tok.read_bytes().replace(b"<|endoftext|>", b"</s>"))
    save(
        tok, {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    )
    batches = prepare(tmp_path, corpus=source, tokenizer=tok)
    assert batches.provenance["tokenizer_end_of_text"] == "</s>"
    ends = np.flatnonzero(array(batches).ravel() == 0)
    assert np.diff(ends).max() > 3  # a tokenizer's own truncation is not in force


# -------------------------------------------------------------------------------------------- cache
def test_a_damaged_cache_is_rebuilt_and_a_damaged_copy_replaced(tmp_path: Path, source: Path) -> None:
    good = prepare(tmp_path, corpus=source)
    content = good.path.read_bytes()
    batches, trained = tmp_path / "cache" / "batches", tmp_path / "cache" / "tokenizers"
    for file in [*batches.iterdir(), *trained.iterdir(), good.path]:
        for data in (b"", b"[]", b'{"sha256": 3}', file.read_bytes().replace(b"a", b"b")[:-1]):
            file.unlink()
            file.write_bytes(data)
            if file != good.path:
                good.path.unlink()
            if file.parent == trained:
                shutil.rmtree(batches)
            assert prepare(tmp_path, corpus=source).sha256 == good.sha256
            assert good.path.read_bytes() == content
    assert not list(tmp_path.rglob(".new-*"))


def test_a_copy_on_another_file_system(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    batches = prepare(tmp_path, corpus=source)
    assert batches.path.stat().st_nlink == 1
    assert hashlib.sha256(batches.path.read_bytes()).hexdigest() == batches.sha256


def test_two_processes_at_once(tmp_path: Path, source: Path) -> None:
    call = (
        "import sys; from pathlib import Path; from bench.corpus import prepare_batches as p;"
        "f = Path(sys.argv[1]);"
        "b = [p(n=3, batch=2, sequence=16, vocab=400 + i, seed=0, out_dir=f / 'out', cache_dir=f / 'cache',"
        " corpus=Path(sys.argv[2])) for i in range(12)]; print([x.sha256 for x in b])"
    )
    command = [sys.executable, "-c", call, str(tmp_path), str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (process.communicate(timeout=60)[0] for process in running)
    assert one == other != ""
    assert prepare(tmp_path, corpus=source).sha256 in one
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_a_missing_library_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch)
    with pytest.raises(UserError, match="the package 'tokenizers' is needed to tokenize text") as caught:
        prepare(tmp_path, corpus=source)
    assert caught.value.next_command == "pip install tokenizers"
    with pytest.raises(UserError, match="'no-such-package' is needed"):
        corpus._version("no-such-package")


def test_importing_is_light() -> None:
    code = (
        "import sys, bench.corpus; "
        "print([m for m in ('numpy', 'tokenizers', 'polars', 'zstandard') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
