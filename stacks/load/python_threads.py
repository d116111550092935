"""Threads in one process: each takes a part of the corpus, reads and tokenizes it; the consumer packs.

Parts are handed out in order and collected in order, so that the stream is the corpus in order. Reading and
JSON hold Python's lock; fastokens and `encode_batch_fast` release it while they tokenize.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "python",
    "summary": "threads in one process, a part of the corpus each, collected in order",
    "requires": ["numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup",
    "devices": ["cpu"],
    "options": {
        "encode": ["batch", "one"],
        "workers": [1, 2, 3, 4, 8],
        "part_kb": [64, 256, 1024, 4096],
        "prefetch": [2, 4],
    },
    "variants": {"default": {"encode": "batch", "workers": 2, "part_kb": 256, "prefetch": 2}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Loader(reading.Base):
    pool: ThreadPoolExecutor | None = None

    def batches(self) -> Iterator[tuple[Any, int]]:
        batch, workers = self.options["encode"] == "batch", self.options["workers"]
        reading.set_threads(self.cores if batch else 1)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batch)
        size = 1024 * self.options["part_kb"]
        parts = iter(reading.parts(self.files, self.format, size, self.shuffle, self.seed))
        work = partial(
            reading.tokenized_part, format=self.format, tokenizer=tokenizer, end=self.end,
            shuffle=self.shuffle, seed=self.seed, stages=self.stages,
        )  # fmt: skip
        packer = reading.Packer(self.batch, self.sequence, self.end)
        self.pool = ThreadPoolExecutor(workers, "loader")
        depth = workers * self.options["prefetch"]
        under_way: deque[Future[Any]] = deque(self.pool.submit(work, part) for part in islice(parts, depth))
        while under_way:
            ids = under_way.popleft().result()
            under_way.extend(self.pool.submit(work, part) for part in islice(parts, 1))
            for full in packer.add(ids):
                yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts("numpy", streams=1, order=order, packing="one stream", transport="reference")

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
