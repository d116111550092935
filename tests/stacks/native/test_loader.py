"""The class: iteration, states, statistics, errors, shards and indexes, as Python sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import write_lines


def hashes(loader: Any) -> list[str]:
    return [hashlib.blake2b(np.asarray(batch.tokens).tobytes()).hexdigest() for batch in loader]


@pytest.mark.parametrize("shuffle", ["none", "block", "global"])
def test_batches_are_the_same_for_any_threads(make: Callable[..., Any], shuffle: str) -> None:
    expected = hashes(make(shuffle=shuffle, seed=5, threads=1, depth=1))
    assert len(expected) > 50
    assert all(hashes(make(shuffle=shuffle, seed=5, threads=n, depth=n)) == expected for n in (2, 5))
    assert (hashes(make(shuffle=shuffle, seed=6)) == expected) == (shuffle == "none")


def test_a_state_is_small_and_json(make: Callable[..., Any]) -> None:
    expected = hashes(make(shuffle="block"))
    loader = make(shuffle="block")
    for _ in range(7):
        next(loader)
    text = json.dumps(loader.state_dict())
    assert len(text) < 300
    state = json.loads(text)
    assert state["delivered"] == 7
    assert hashes(loader) == expected[7:]
    loader.load_state_dict(state)
    assert hashes(loader) == expected[7:]
    assert hashes(make(shuffle="block", state=state)) == expected[7:]
    assert hashes(make(shuffle="block", state=[state], threads=3)) == expected[7:]
    with pytest.raises(ValueError, match="another corpus"):
        make(shuffle="block", seed=1, state=state)
    with pytest.raises(ValueError, match="not a state"):
        make(state={"delivered": 3})


def test_ranks_and_a_change_of_their_number(make: Callable[..., Any]) -> None:
    choices: dict[str, Any] = {"lanes": 2, "epochs": None}
    one = make(**choices)
    expected = [np.array(next(one).tokens) for _ in range(20)]
    ranks = [make(rank=rank, world_size=2, **choices) for rank in (0, 1)]
    got = [np.array(next(rank).tokens) for _ in range(5) for rank in ranks]
    again = make(state=[rank.state_dict() for rank in ranks], **choices)
    got += [np.array(next(again).tokens) for _ in range(10)]
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))


def test_options(make: Callable[..., Any], corpus: Path) -> None:
    batch = next(make(positions=True, segments=True))
    positions, segments = np.asarray(batch.positions), np.asarray(batch.segments)
    assert positions.shape == segments.shape == (4, 32)
    assert segments[0, 0] == 1 and (np.diff(positions)[np.diff(segments) == 0] == 1).all()
    files = [corpus / "0.jsonl", corpus / "1.jsonl"]
    assert len(hashes(make(sources=files))) > len(hashes(make(sources=files[0])))
    mixed = make(sources={files[0]: 1.0, str(files[1]): 3.0}, epochs=None)
    assert [next(mixed) for _ in range(10)]
    assert len(hashes(make(epochs=2))) > 1.8 * len(hashes(make()))
    rest = [int(np.asarray(b.lengths).min()) for b in make(drop_last=True)]
    assert min(rest) > 0


def test_statistics(make: Callable[..., Any], documents: list[str]) -> None:
    loader = make()
    delivered = sum(int(np.asarray(batch.lengths).sum()) for batch in loader)
    stats = loader.stats()
    assert stats["documents"] == len(documents) and stats["empty_documents"] == 0 and stats["skipped"] == 0
    assert stats["text_bytes"] == sum(len(text.encode()) for text in documents)
    assert stats["tokens"] == delivered and stats["skips"] == []
    assert stats["tokenize_cpu_s"] > 0 and loader.waiting() == 0


def test_bad_records(make: Callable[..., Any], native: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"text {i} " * 20 for i in range(200)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[100] = b'{"text": "\xff"}\n'
    path.write_bytes(b"".join(lines))
    loader = make(sources=path)
    start = sum(map(len, lines[:100]))
    with pytest.raises(native.DataError, match=rf"a\.jsonl, line at byte {start}: not UTF-8"):
        hashes(loader)
    assert 0 < loader.state_dict()["delivered"] < 100
    assert issubclass(native.DataError, ValueError) and issubclass(native.ChangedError, OSError)
    loader = make(sources=path, on_error="skip")
    hashes(loader)
    stats = loader.stats()
    assert (stats["skipped"], stats["documents"], len(stats["skips"])) == (1, 199, 1)
    loader = make(sources=path, on_error="skip", epochs=None)
    next(loader)
    path.write_bytes(b"".join(lines[:-1]))
    loader = make(sources=path, on_error="skip")
    assert len(hashes(loader)) > 0


def test_a_file_that_changes(make: Callable[..., Any], native: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"text {i} " * 20 for i in range(200)])
    loader = make(sources=path, epochs=None, depth=1)
    next(loader)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(native.ChangedError, match=r"a\.jsonl: the file changed"):
        for _ in loader:
            pass


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"shuffle": "all"}, ValueError, 'shuffle "all"; valid: none, block, global'),
        ({"format": "csv"}, ValueError, 'format "csv"; valid: jsonl, jsonl.zst, parquet, text, tokens'),
        ({"engine": "x"}, ValueError, "valid: auto, fast, hf"),
        ({"on_error": "x"}, ValueError, "valid: error, skip"),
        ({"batch": 0}, ValueError, "batch 0 x sequence 31"),
        ({"lanes": 3, "world_size": 2}, ValueError, "a multiple of world_size 2"),
        ({"timeout_s": 0.0}, ValueError, "timeout_s 0; valid: a number above 0"),
        ({"timeout_s": float("nan")}, ValueError, "timeout_s"),
        ({"sources": "/nowhere/at/all"}, OSError, "/nowhere/at/all"),
        ({"sources": {}}, ValueError, "no source"),
        ({"sources": []}, ValueError, "without a path"),
        ({"batch": -1}, OverflowError, ""),
    ],
)
def test_arguments(
    make: Callable[..., Any], choices: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        make(**choices)
    assert message in str(raised.value)


def test_tokenize_and_read_back(
    make: Callable[..., Any], native: Any, corpus: Path, tokenizer: Path, documents: list[str], tmp_path: Path
) -> None:
    told: list[int] = []
    header = native.tokenize(corpus, tokenizer, tmp_path / "out", progress=told.append, threads=2)
    assert header == json.loads((tmp_path / "out" / "index.json").read_text())
    shard = header["shards"][0]
    assert shard["documents"] == len(documents) and told[-1] == shard["tokens"] and told == sorted(told)
    assert (tmp_path / "out" / shard["file"]).stat().st_size == 4 * shard["tokens"]

    def stream(loader: Any) -> np.ndarray:
        rows = ((np.asarray(batch.tokens), np.asarray(batch.lengths)) for batch in loader)
        return np.concatenate([row[:length] for pair in rows for row, length in zip(*pair, strict=True)])

    shards = tmp_path / "out"
    assert (stream(make(sources=shards, tokenizer=None)) == stream(make())).all()
    for shuffle in ("block", "global"):
        choices: dict[str, Any] = {"sources": shards, "tokenizer": None, "shuffle": shuffle}
        expected = hashes(make(**choices))
        loader = make(threads=3, **choices)
        for _ in range(9):
            next(loader)
        assert hashes(make(state=loader.state_dict(), **choices)) == expected[9:]
    assert make(sources=shards, tokenizer=None).engine is None
    with pytest.raises(ValueError, match="not empty"):
        native.tokenize(corpus, tokenizer, shards)

    def enough(tokens: int) -> None:
        raise LookupError(f"enough at {tokens}")

    with pytest.raises(LookupError, match="enough"):
        native.tokenize(corpus, tokenizer, tmp_path / "other", progress=enough)
    assert list((tmp_path / "other").iterdir()) == []


def test_index(
    make: Callable[..., Any], native: Any, corpus: Path, documents: list[str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    manifest, blocks, count = native.index(corpus, cache, shuffle="global", segment_bytes=2000)
    assert (count, len(manifest)) == (len(documents), 64) and blocks > 3
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert native.index(corpus, cache, shuffle="global", segment_bytes=2000) == (manifest, blocks, count)
    expected = hashes(make(shuffle="global"))
    assert hashes(make(shuffle="global", cache=cache)) == expected
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    assert native.index(corpus, cache)[2] == 0


def test_documentation(native: Any) -> None:
    for thing in (native.Loader, native.Batch, native.Array, native.tokenize, native.index, native.DataError):
        assert thing.__doc__ and len(thing.__doc__) > 40, thing
    for kind in (native.Loader, native.Batch, native.Array):
        for name in (n for n in vars(kind) if not n.startswith("_")):
            assert getattr(kind, name).__doc__, f"{kind.__name__}.{name}"
