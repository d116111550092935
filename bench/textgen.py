"""Seeded text without end: what it shares with real text is fitted to it, and both are shown.

A document alternates words and separators, as text does. Frequent ones are drawn from a lexicon with the
frequencies of real text (the sources of the running Python's standard library). The others are drawn by rank
from a Pareto tail that is never exhausted, so that new words keep coming at the rate of Heaps' law,
V(n) = K n^beta, with K and beta of the same real text; a word of the tail is spelled from two of the lexicon.
Repeats would flatter a tokenizer that remembers words; this corpus holds as many repeats as real text does.

    tail     P(rank > r) = (r / s)^-g with g = 1/beta - 1. With m = p n draws of the tail among n words the
             number of distinct ones tends to (g s^g p n)^beta Gamma(1 - beta), which gives s from K
    lengths  lognormal, median 2 KB, sigma 1.2, at most 200 KB: the mean is about 4 KB
    seeded   by raw 64-bit output of PCG64 alone, which NumPy keeps the same over versions, block by block
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

BITS: Final = 20  # of a draw: a lexicon has 2^20 slots, shared out by frequency
BLOCK_PAIRS: Final = 1 << 19  # words (and as many separators) made at a time: about 4 MB
MEDIAN_BYTES, SIGMA, LARGEST = 2048, 1.2, 200_000  # of a document
SMALLEST: Final = 32
LEAST: Final = 4  # a word that is rarer in the real text belongs to the tail
PIECES: Final = 8192  # frequent words that words of the tail are spelled from
FITTED_FROM: Final = 10_000  # words: Heaps' law is fitted beyond so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What is drawn from: units as UTF-8, and the slots that say how often."""

    units: list[bytes]
    word_slots: np.ndarray  # int32 [2^BITS]: index of a unit, -1 for a word of the tail
    separator_slots: np.ndarray  # int32 [2^BITS]
    pieces: np.ndarray  # int32: indices of units that tail words are made of
    beta: float
    scale: float  # s
    facts: dict[str, Any]


def fit(texts: Sequence[str]) -> Source:
    """Lexicon and Heaps' law of real documents; a few MB of text give a source in about two seconds."""
    import numpy as np

    words: list[str] = []
    separators: list[str] = []
    for text in texts:
        parts = re.split(r"(\w+)", text)  # separator, word, separator, …, word, separator
        words += parts[1::2]
        separators += parts[2:-1:2]
    k, beta, new = heaps(words)
    chosen, word_slots, tail = slots(Counter(words))
    between, separator_slots, _ = slots(Counter(separators), whole=True)
    units = [unit.encode() for unit in (*chosen, *between, "_")]
    letters = [i for i, word in enumerate(chosen) if 3 <= len(word) <= 12 and word.isalpha()]
    share = tail / (1 << BITS)
    g = 1 / beta - 1
    scale = ((k / math.gamma(1 - beta)) ** (1 / beta) / (g * share)) ** (1 / g)
    return Source(
        units=units, word_slots=word_slots,
        separator_slots=np.where(separator_slots >= 0, separator_slots + len(chosen), -1).astype(np.int32),
        pieces=np.array(letters[:PIECES], np.int32), beta=beta, scale=scale,
        facts={
            "generator": "words and separators by frequency, tail of new words by Heaps' law",
            "fitted_words": len(words), "lexicon_words": len(chosen), "lexicon_separators": len(between),
            "tail_share": round(share, 4), "heaps_k": round(k, 2), "heaps_beta": round(beta, 4),
            "new_words_per_1000_at_end_of_fit": round(1000 * new, 2),
            "document_bytes": f"lognormal, median {MEDIAN_BYTES}, sigma {SIGMA}, at most {LARGEST}",
        },
    )  # fmt: skip


def heaps(words: Sequence[str]) -> tuple[float, float, float]:
    """K and beta of V(n) = K n^beta by least squares of logarithms, and the rate of new words at the end."""
    import numpy as np

    seen: set[str] = set()
    growth = np.empty(len(words), np.int64)
    for i, word in enumerate(words):
        seen.add(word)
        growth[i] = len(seen)
    first = min(FITTED_FROM, len(words) // 4)
    n = np.unique(np.geomspace(first, len(words), 64).astype(np.int64))
    beta, log_k = np.polyfit(np.log(n), np.log(growth[n - 1]), 1)
    tenth = max(1, len(words) // 10)
    rate = float(growth[-1] - growth[-tenth]) / tenth
    return math.exp(float(log_k)), min(max(float(beta), 0.3), 0.9), rate


def slots(
    counts: Counter[str], *, least: int = LEAST, whole: bool = False
) -> tuple[list[str], np.ndarray, int]:
    """(units that get a slot, int32 [2^BITS] of their indices, slots left for the tail: index -1).

    `whole`: no tail, the slots are shared by the units that get any.
    """
    import numpy as np

    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values())
    shares = [int(count * (1 << BITS) / total) for _, count in ranked]
    kept = [i for i, (_, count) in enumerate(ranked) if shares[i] and (whole or count >= LEAST)]
    sizes = np.array([shares[i] for i in kept])
    left = (1 << BITS) - int(sizes.sum())
    if whole:
        sizes[0] += left
        left = 0
    table = np.concatenate([np.repeat(np.arange(len(kept)), sizes), np.full(left, -1)]).astype(np.int32)
    return [ranked[i][0] for i in kept], table, left


def documents(source: Source, seed: int, size: int) -> Iterator[str]:
    """Documents of `size` bytes of UTF-8 or a little more; the same for the same source and seed."""
    import numpy as np

    made, block = 0, 0
    while made < size:
        raw = np.random.PCG64(np.random.SeedSequence([seed, block])).random_raw(BLOCK_PAIRS)
        data, ends = spelled(source, draw(source, np.asarray(raw, np.uint64)))
        start = 0
        for stop in cuts(ends, seed, block):
            text = data[start:stop].decode()
            start = stop
            yield text
            made += len(text.encode()) if not text.isascii() else len(text)
            if made >= size:
                return
        block += 1


def draw(source: Source, raw: np.ndarray) -> np.ndarray:
    """int32 [pairs, 4]: unit indices of a word (a piece, "_" and a piece for the tail) and its separator."""
    import numpy as np

    mask = np.uint64((1 << BITS) - 1)
    out = np.full((len(raw), 4), -1, np.int32)
    out[:, 0] = source.word_slots[raw & mask]
    out[:, 3] = source.separator_slots[(raw >> np.uint64(BITS)) & mask]
    tail = np.flatnonzero(out[:, 0] < 0)
    u = ((raw[tail] >> np.uint64(2 * BITS)).astype(np.float64) + 1) / (1 << (64 - 2 * BITS))
    rank = source.scale * u ** (-1 / (1 / source.beta - 1))
    bits = mixed(np.minimum(rank, 2.0**62).astype(np.uint64))
    count = np.uint64(len(source.pieces))
    out[tail, 0] = source.pieces[bits % count]
    out[tail, 2] = source.pieces[(bits >> np.uint64(24)) % count]
    joined = (bits >> np.uint64(60)) < 9  # of 16: `read_file`, else `readfile`
    out[tail[joined], 1] = len(source.units) - 1
    return out


def mixed(x: np.ndarray) -> np.ndarray:
    """64-bit finaliser of SplitMix64: equal ranks give equal words, near ones unlike words."""
    import numpy as np

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def spelled(source: Source, chosen: np.ndarray) -> tuple[bytes, np.ndarray]:
    """(the units one after another, byte offset at which each pair ends)."""
    import numpy as np

    lengths = np.array(
        [*(len(unit) for unit in source.units), 0], np.int32
    )  # the last one, index -1, is nothing
    starts = np.zeros(len(lengths), np.int32)
    np.cumsum(lengths[:-1], out=starts[1:])
    flat = chosen.reshape(-1)
    size = lengths[flat]
    ends = np.cumsum(size, dtype=np.int32)
    table = np.frombuffer(b"".join(source.units), np.uint8)
    index = np.repeat(starts[flat] - (ends - size), size)  # where a unit lies, less where it goes
    index += np.arange(len(index), dtype=np.int32)
    return table[index].tobytes(), np.ascontiguousarray(ends[3::4])


def cuts(ends: np.ndarray, seed: int, block: int) -> list[int]:
    """Where documents end: at ends of pairs, after lognormal lengths; the block's last takes the rest."""
    import numpy as np

    normal, total, targets = statistics.NormalDist(), int(ends[-1]), []
    position, index = 0, 0
    while position < total:
        bits = hashlib.blake2b(f"{seed}:{block}:{index}".encode(), digest_size=6).digest()
        u = (int.from_bytes(bits, "little") + 0.5) / 2**48
        length = MEDIAN_BYTES * math.exp(SIGMA * normal.inv_cdf(u))
        position += int(min(max(length, SMALLEST), LARGEST))
        targets.append(position)
        index += 1
    places = np.searchsorted(ends, np.array(targets[:-1], ends.dtype))
    return sorted({*ends[places].tolist(), total})
