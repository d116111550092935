"""Grain: a MapDataset over parts of the corpus, mapped to token ids in threads or processes; packed behind.

Threads: `ReadOptions` read ahead within this process. Processes: `mp_prefetch`, each worker with threads of
its own; arrays come back through Grain's shared memory. Grain keeps the order of elements.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "grain",
    "summary": "Grain MapDataset over parts, threads or processes",
    "environment": "peers",
    "requires": ["grain", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {
        "encode": ["batch", "one"],
        "processes": [0, 1, 2, 3, 4],
        "threads": [1, 2, 4],
        "part_kb": [64, 256, 1024],
        "prefetch": [2, 4, 8],
    },
    "variants": {
        "default": {"encode": "batch", "processes": 0, "threads": 2, "part_kb": 256, "prefetch": 4},
        "processes": {"encode": "batch", "processes": 2, "threads": 1, "part_kb": 1024, "prefetch": 2},
    },
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Tokenized:
    """Part to int32 ids; opens its tokenizer in the process that uses it."""

    def __init__(self, job: dict[str, Any], tokenizer: Any) -> None:
        self.job, self.tokenizer = job, tokenizer

    def __call__(self, part: reading.Part) -> np.ndarray:
        ids = reading.tokenized_part(part, tokenizer=self.tokenizer, **self.job)
        if self.job["stages"] is not None:
            self.job["stages"].save()
        return ids


class Loader(reading.Base):
    iterator: Any = None

    def batches(self) -> Iterator[tuple[Any, int]]:
        options = self.options
        batched, processes = options["encode"] == "batch", options["processes"]
        reading.set_threads(max(1, self.cores // max(1, processes)) if batched else 1)
        parts = reading.parts(self.files, self.format, 1024 * options["part_kb"], self.shuffle, self.seed)
        job = {
            "format": self.format, "end": self.end, "shuffle": self.shuffle, "seed": self.seed,
            "stages": self.stages,
        }  # fmt: skip
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batched)
        packer = reading.Packer(self.batch, self.sequence, self.end)
        if parts:
            read = grain.ReadOptions(num_threads=options["threads"], prefetch_buffer_size=options["prefetch"])
            data = grain.MapDataset.source(parts).map(Tokenized(job, tokenizer)).to_iter_dataset(read)
            if processes:
                flags.FLAGS.mark_as_parsed()  # Grain asks for its own, in a program without absl's main
                data = data.mp_prefetch(
                    grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
                )
            self.iterator = iter(data)
            for ids in self.iterator:
                for full in packer.add(np.asarray(ids)):
                    yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        transport = "Grain's shared memory" if self.options["processes"] else "reference"
        return self.facts("grain", "numpy", streams=1, order=order, packing="one stream", transport=transport)

    def close(self) -> None:
        end = getattr(self.iterator, "close", None)
        if end is not None:
            end()
        self.iterator = None
        gc.collect()  # arrays that nobody took go, and their shared memory with them
