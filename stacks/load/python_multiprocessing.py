"""`multiprocessing.Pool`: each task reads and tokenizes a part of the corpus; the parent packs.

Ids come back as pickled lists, as pickled NumPy arrays, or in shared memory (only a name is pickled). Results
are collected in the order of the parts, never more than `prefetch` a worker ahead.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "python",
    "summary": "multiprocessing.Pool, ids as lists, NumPy arrays or in shared memory",
    "requires": ["numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup",
    "devices": ["cpu"],
    "options": {
        "transport": ["lists", "numpy", "shared-memory"],
        "encode": ["batch", "one"],
        "workers": [1, 2, 3, 4, 8],
        "part_kb": [64, 256, 1024, 4096],
        "prefetch": [2, 4],
        "start": ["fork", "spawn", "forkserver"],
    },
    "variants": {
        "default": {
            "transport": "shared-memory",
            "encode": "one",
            "workers": 2,
            "part_kb": 1024,
            "prefetch": 2,
            "start": "fork",
        },
    },
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}

WORKER: dict[str, Any] = {}  # of a worker process: what `start` put there


def start(tokenizer: Any, engine: str, batch: bool, transport: str, keywords: dict[str, Any]) -> None:
    WORKER["tokenizer"] = reading.open_tokenizer(tokenizer, engine, batch)
    WORKER["transport"], WORKER["keywords"] = transport, keywords


def work(part: reading.Part) -> Any:
    """Ids of a part: a list, an array, or (name of a shared memory, number of ids)."""
    stages = WORKER["keywords"]["stages"]
    clock = stages or reading.NOTHING
    ids = reading.tokenized_part(part, tokenizer=WORKER["tokenizer"], **WORKER["keywords"])
    if WORKER["transport"] == "lists":
        with clock.of("serialise"):
            result: Any = ids.tolist()
    elif WORKER["transport"] == "numpy" or not len(ids):
        result = ids
    else:
        with clock.of("copy"):
            memory = SharedMemory(create=True, size=ids.nbytes)
            np.ndarray(ids.shape, np.int32, memory.buf)[:] = ids
            result = memory.name, len(ids)
            memory.close()  # the parent unlinks it
    clock.save()
    return result


class Loader(reading.Base):
    pool: Any = None

    def batches(self) -> Iterator[tuple[Any, int]]:
        options = self.options
        reading.set_threads(max(1, self.cores // options["workers"]) if options["encode"] == "batch" else 1)
        size = 1024 * options["part_kb"]
        parts = iter(reading.parts(self.files, self.format, size, self.shuffle, self.seed))
        keywords = {
            "format": self.format, "end": self.end, "shuffle": self.shuffle, "seed": self.seed,
            "stages": self.stages,
        }  # fmt: skip
        given = (self.tokenizer, self.engine, options["encode"] == "batch", options["transport"], keywords)
        resource_tracker.ensure_running()  # one for all, so that the parent may unlink what a worker made
        self.pool = multiprocessing.get_context(options["start"]).Pool(options["workers"], start, given)
        self.under_way: deque[Any] = deque()
        depth = options["workers"] * options["prefetch"]
        self.under_way.extend(self.pool.apply_async(work, (part,)) for part in islice(parts, depth))
        packer = reading.Packer(self.batch, self.sequence, self.end)
        while self.under_way:
            result = self.under_way.popleft().get()
            self.under_way.extend(self.pool.apply_async(work, (part,)) for part in islice(parts, 1))
            for full in self.packed(packer, result):
                yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def packed(self, packer: reading.Packer, result: Any) -> list[Any]:
        if isinstance(result, list):
            return list(packer.add(np.array(result, np.int32)))
        if isinstance(result, np.ndarray):
            return list(packer.add(result))
        memory = SharedMemory(result[0])
        ids = np.ndarray(result[1], np.int32, memory.buf)
        full = list(packer.add(ids))  # copies
        del ids
        memory.close()
        memory.unlink()
        return full

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts("numpy", streams=1, order=order, packing="one stream, by the parent")

    def close(self) -> None:
        if self.pool is None:
            return
        for result in self.under_way:  # what nobody took lies in shared memory
            try:
                name, _ = result.get(timeout=60)
                memory = SharedMemory(name)
                memory.close()
                memory.unlink()
            except Exception:  # a list, an array, or the error that ended the epoch
                continue
        self.under_way.clear()
        self.pool.terminate()
        self.pool.join()
