"""Are a loader's documents the corpus's? Multisets of hashes, shapes, padding; order where it is promised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.ids import HASH_BYTES
from bench.verify import Row

PROMISED: Final = "corpus"  # value of the manifest's `order` that is compared: the order of the corpus


def hashes(path: Path) -> list[bytes]:
    """Raises ValueError where the file is not there or not a number of hashes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(data) % HASH_BYTES:
        raise ValueError(f"{path.name} cannot be read: {len(data)} bytes are no number of hashes")
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def judge(
    got: Sequence[bytes], seen: Mapping[str, Any], want: Sequence[bytes], expected: Mapping[str, int],
    order: str,
) -> list[Row]:  # fmt: skip
    """Rows of `parity`; every tolerance is 0: ids are integers, and every document counts."""
    ours, true = Counter(got), Counter(want)
    missing, extra = (true - ours).total(), (ours - true).total()
    tokens = expected["tokens"] + expected["documents"]
    found = int(seen["tokens"]) - int(seen["padding"])
    rows = [
        row("documents", missing + extra, f"{missing} of {len(want)} are missing, {extra} are not theirs"),
        row("tokens", abs(found - tokens), f"{found} with their ends, {tokens} expected"),
        row("padding", abs(int(seen["padding"]) - int(seen["padding_said"])),
            f"{seen['padding']} found, {seen['padding_said']} said"),
        row("shape", int(seen["shape"]), "batches of another shape"),
        row("dtype", int(seen["dtype"]), "batches that are not int32"),
        row("contiguous", int(seen["contiguous"]), "batches that are not C-contiguous"),
    ]  # fmt: skip
    if order == PROMISED and seen["streams"] == 1:
        moved = sum(a != b for a, b in zip(got, want, strict=False)) + abs(len(got) - len(want))
        rows.append(row("order", moved, "documents at another place than in the corpus"))
    return rows


def row(measure: str, error: float, detail: str) -> Row:
    return Row(parameter="batches", measure=measure, error=float(error), tolerance=0.0, detail=detail)


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """(`ok` | `not comparable`, what is wrong)"""
    bad = [r for r in rows if not r.ok]
    if not bad:
        return "ok", ""
    return "not comparable", "parity: " + "; ".join(f"{r.measure}: {r.detail}" for r in bad)


def read(directory: Path) -> tuple[list[bytes], dict[str, Any]]:
    """Hashes and what was seen, as a parity observation left them. Raises ValueError."""
    try:
        seen = json.loads((directory / "documents.json").read_text())
        numbers = ("tokens", "padding", "padding_said", "shape", "dtype", "contiguous", "streams")
        if not all(isinstance(seen[name], int) for name in numbers):
            raise ValueError("documents.json cannot be read: a count is no number")
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"documents.json cannot be read: {error}") from None
    return hashes(directory / "documents.bin"), seen
