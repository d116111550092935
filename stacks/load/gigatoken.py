"""gigatoken: its `encode_files` reads and tokenizes whole files in Rust; ten lines of NumPy pack.

The next files are encoded in a thread while the consumer has the tokens of the last ones: `encode_files`
holds no lock. Special tokens are taken out of the tokenizer first, since gigatoken would find them in text.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "gigatoken",
    "summary": "gigatoken encode_files in a thread ahead, packed by NumPy",
    "environment": "peers",
    "requires": ["gigatoken", "awkward", "numpy"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {"files": [1, 2, 4], "ahead": [0, 1, 2]},
    "variants": {"default": {"files": 1, "ahead": 1}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}

SOURCES = {
    "jsonl": gigatoken.JsonlFileSource,
    "jsonl.zst": gigatoken.JsonlFileSource,
    "parquet": gigatoken.ParquetFileSource,
    "text": gigatoken.TextFileSource,
}
TEXT_FILES = 512  # files of one document that stand for one file of many


class Loader(reading.Base):
    pool: ThreadPoolExecutor | None = None

    def encode(self, files: list[Path]) -> reading.Encoded:
        """Ids int32 [tokens] and offsets int64 [documents + 1] of some files, in their order."""
        with (self.stages or reading.NOTHING).of("tokenize"):
            layout = self.tok.encode_files(SOURCES[self.format](files), parallel=True).layout
        ids, offsets = layout.content.data.view(np.int32), layout.offsets.data
        if self.shuffle == "block":  # documents of the block, permuted
            documents = np.split(ids, offsets[1:-1])
            order = np.random.default_rng(self.seed).permutation(len(documents))
            lengths = np.diff(offsets)[order]
            return np.concatenate([documents[i] for i in order]), np.append(0, np.cumsum(lengths))
        return ids, offsets

    def ahead(self) -> Iterator[reading.Encoded]:
        """Encoded files in order, the next ones under way in a thread."""
        files = reading.permuted(list(reading.text_files(self.files)), self.shuffle, self.seed)
        size = self.options["files"] * (TEXT_FILES if self.format == "text" else 1)
        groups = iter([files[i : i + size] for i in range(0, len(files), size)])
        if not self.options["ahead"]:
            yield from map(self.encode, groups)
            return
        self.pool = ThreadPoolExecutor(1, "loader")
        wanted = self.options["ahead"] + 1
        waiting: deque[Future[Any]] = deque(self.pool.submit(self.encode, g) for g in islice(groups, wanted))
        while waiting:
            encoded = waiting.popleft().result()
            waiting.extend(self.pool.submit(self.encode, group) for group in islice(groups, 1))
            yield encoded

    def batches(self) -> Iterator[tuple[Any, int]]:
        reading.set_threads(self.cores)
        table = json.loads(self.tokenizer.read_bytes()) | {"added_tokens": []}
        self.tok = gigatoken.Tokenizer.from_json(json.dumps(table))
        packer = reading.Packer(self.batch, self.sequence, self.end)
        clock = self.stages or reading.NOTHING
        for encoded in self.ahead():
            for piece in pieces(encoded, packer.size):
                with clock.of("pack"):
                    full = list(packer.add(reading.with_ends(piece, self.end)))
                for batch in full:
                    yield batch, 0
        for batch in packer.flush():
            yield batch, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "gigatoken", "awkward", "numpy", tokenizer_engine="gigatoken", workers=self.cores, streams=1,
            order=order, packing="one stream", transport="none",
        )  # fmt: skip

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


def pieces(encoded: reading.Encoded, tokens: int) -> Iterator[reading.Encoded]:
    """Documents of about `tokens` ids together: closing them all at once would fall out of the caches."""
    ids, offsets = encoded
    start = 0
    while start < len(offsets) - 1:
        stop = int(np.searchsorted(offsets, offsets[start] + tokens, "left"))
        stop = min(max(stop, start + 1), len(offsets) - 1)
        yield ids[offsets[start] : offsets[stop]], offsets[start : stop + 1] - offsets[start]
        start = stop
