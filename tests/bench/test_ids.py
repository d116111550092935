"""The ids that a corpus must give: totals, hashes, shards, kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from bench import corpus, documents, ids, textfiles
from bench.errors import UserError


def text_hash(texts: list[str]) -> str:
    count = textfiles.Count()
    assert len(list(count.over(texts))) == len(texts)
    return count.digest.hexdigest()


TEXTS = ["hello world", "", "<|endoftext|> is text", "the quick brown fox " * 50, "ü"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> corpus.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    sample = documents.documents_of("test", ["hello world, the quick brown fox"] * 50)
    return corpus.prepare_tokenizer(sample, vocab=300, out_dir=folder, cache_dir=folder / "cache")


def expected(tokenizer: corpus.Tokenizer) -> list[np.ndarray]:
    import tokenizers

    tok = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    tok.encode_special_tokens = True
    found = [np.array(tok.encode(text, add_special_tokens=False).ids, "<i4") for text in TEXTS]
    return [x for x in found if len(x)]


def test_totals_hashes_and_shards(tmp_path: Path, tokenizer: corpus.Tokenizer) -> None:
    want = expected(tokenizer)
    got = ids.prepare(tmp_path, text_hash(TEXTS), lambda: TEXTS, tokenizer, hashes=True, shards=True)
    assert (got.documents, got.tokens) == (4, sum(map(len, want)))
    assert got.total == sum(int(x.sum()) for x in want)
    hashes = b"".join(hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in want)
    assert got.hashes.read_bytes() == hashes
    tokens = np.fromfile(got.directory / "shard-00000.tokens", "<i4")
    ends = np.fromfile(got.directory / "shard-00000.tokens.ends", "<u8")
    assert np.flatnonzero(tokens == tokenizer.end).tolist() == (ends - 1).tolist()
    assert len(tokens) == got.tokens + got.documents
    index = json.loads((got.directory / "index.json").read_text())
    assert (index["format"], index["end"], index["shards"][0]["documents"]) == (
        "stackbench-tokens", tokenizer.end, 4,
    )  # fmt: skip
    assert all(tokenizer.end not in x for x in want), "text is never a special token"


def test_they_are_kept_until_a_file_is_damaged(tmp_path: Path, tokenizer: corpus.Tokenizer) -> None:
    calls = []

    def texts() -> list[str]:
        calls.append(1)
        return TEXTS

    one = ids.prepare(tmp_path, text_hash(TEXTS), texts, tokenizer, hashes=True)
    assert ids.prepare(tmp_path, text_hash(TEXTS), texts, tokenizer, hashes=True) == one and len(calls) == 1
    with pytest.raises(UserError, match="another version"):
        ids.prepare(tmp_path, "other", texts, tokenizer, hashes=True)
    one.hashes.write_bytes(b"")
    assert ids.load(one.directory) is None


def test_a_trained_tokenizer_is_the_same_file_twice(tmp_path: Path, tokenizer: corpus.Tokenizer) -> None:
    sample = documents.documents_of("test", ["hello world, the quick brown fox"] * 50)
    again = corpus.prepare_tokenizer(sample, vocab=300, out_dir=tmp_path, cache_dir=tmp_path / "c")
    assert again.sha256 == tokenizer.sha256 and again.path.name == tokenizer.path.name
    given = corpus.prepare_tokenizer(
        sample, vocab=300, out_dir=tmp_path, cache_dir=tmp_path / "c", given=tokenizer.path
    )
    assert given.path == again.path and given.facts["tokenizer_kind"] == "given"
