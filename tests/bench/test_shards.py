"""`stackbench tokenize`: shards that decode to the corpus, an index, and messages for wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import shards
from bench.errors import UserError

TEXTS = ["One document.\n", "", "Another, größer: 日本語.", "x" * 300]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(corpus: Path | str, out: Path, **more: object) -> int:
    given = {"tokenizer": None, "index_only": False, "shuffle": "none", "field": "text", "skip_errors": False}
    return shards.run_tokenize(str(corpus), out, **{**given, "as_json": True, **more})


def test_shards_hold_the_corpus(corpus, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("stackbench_native", reason="the Rust loader is not installed")
    import tokenizers

    monkeypatch.setenv("STACKBENCH_CACHE", str(tmp_path / "cache"))
    assert run(corpus, tmp_path / "out") == 0
    told = json.loads(capsys.readouterr().out)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = np.fromfile(tmp_path / "out" / "shard-00000.tokens", "<i4")
    ends = np.fromfile(tmp_path / "out" / "shard-00000.tokens.ends", "<u8")
    found = [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1])]
    assert found == [text for text in TEXTS if text]
    assert (told["documents"], told["tokens"]) == (3, len(ids))
    with pytest.raises(UserError, match="not empty"):
        run(corpus, tmp_path / "out")


def test_index_only(corpus, tmp_path, capsys) -> None:
    pytest.importorskip("stackbench_native", reason="the Rust loader is not installed")
    assert run(corpus, tmp_path / "index", index_only=True, shuffle="global") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["blocks"]) == (4, 1)
    assert list((tmp_path / "index").glob("documents-*.idx"))


def test_wrong_input_says_what_is_wrong(corpus, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="--shuffle globl"):
        run(corpus, tmp_path / "out", shuffle="globl")
    monkeypatch.setitem(sys.modules, "stackbench_native", None)
    with pytest.raises(UserError, match="not installed"):
        run(corpus, tmp_path / "out")


def test_errors_of_the_loader_are_ours(corpus, tmp_path) -> None:
    pytest.importorskip("stackbench_native", reason="the Rust loader is not installed")
    with pytest.raises(UserError, match="local text only"):
        run("s3://bucket/corpus", tmp_path / "out")
    corpus.write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(UserError, match=r"corpus\.jsonl"):
        run(corpus, tmp_path / "out", tokenizer=tmp_path / "none.json", index_only=False)
