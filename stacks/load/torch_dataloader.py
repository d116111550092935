"""`torch.utils.data.DataLoader` over an IterableDataset that tokenizes and packs in its workers.

Each worker has every n-th file and packs a stream of its own; whole batches cross to the parent as tensors in
shared memory (file descriptors are passed). Padding crosses with the last batch of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "torch",
    "summary": "torch DataLoader, IterableDataset that tokenizes and packs in the workers",
    "requires": ["torch", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup",
    "devices": ["cpu"],
    "options": {
        "workers": [0, 1, 2, 3, 4, 8],
        "prefetch": [2, 4, 8],
        "documents": [1, 16, 64, 256],
        "group": [1, 4, 16],
        "encode": ["batch", "one"],
        "start": ["fork", "spawn", "forkserver"],
    },
    "variants": {
        "default": {
            "workers": 2,
            "prefetch": 2,
            "documents": 64,
            "group": 16,
            "encode": "batch",
            "start": "fork",
        },
        "usual": {
            "workers": 2,
            "prefetch": 2,
            "documents": 64,
            "group": 1,
            "encode": "batch",
            "start": "fork",
        },  # a batch at a time, as most programs do
    },
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Packed(IterableDataset):  # type: ignore[misc]
    """Yields (int32 tensor [batches, batch, sequence + 1], stream, padding in them): `group` batches at once,
    since what crosses to the parent costs by the piece."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        job, info = self.job, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        files = reading.shares(job["files"], workers)[worker]
        stages = job["stages"]
        texts = reading.documents(files, job["format"], stages)
        texts = reading.windowed(texts, job["shuffle"], job["seed"])
        tokenizer = reading.open_tokenizer(job["tokenizer"], job["engine"], job["batched"])
        packer = reading.Packer(job["batch"], job["sequence"], job["end"])
        full = reading.pack(reading.chunks(texts, job["documents"]), tokenizer, packer, stages)
        while group := list(islice(full, job["group"])):
            yield torch.from_numpy(np.stack(group)), worker, packer.padding
        if stages is not None:
            stages.save()


class Loader(reading.Base):
    loader: Any = None
    iterator: Any = None

    def job(self) -> dict[str, Any]:
        """What a worker needs to know; sent once."""
        return {
            "files": reading.permuted(self.files, self.shuffle, self.seed), "format": self.format,
            "tokenizer": self.tokenizer, "engine": self.engine, "end": self.end, "batch": self.batch,
            "sequence": self.sequence, "shuffle": self.shuffle, "seed": self.seed, "stages": self.stages,
            "documents": self.options["documents"], "group": self.options["group"],
            "batched": self.options["encode"] == "batch",
        }  # fmt: skip

    def keywords(self) -> dict[str, Any]:
        """The DataLoader's own options."""
        workers = self.options["workers"]
        keywords: dict[str, Any] = {"batch_size": None, "num_workers": workers}
        if workers:
            keywords["prefetch_factor"] = self.options["prefetch"]
            keywords["multiprocessing_context"] = self.options["start"]
        return keywords

    def batches(self) -> Iterator[tuple[Any, int]]:
        batched = self.options["encode"] == "batch"
        reading.set_threads(max(1, self.cores // max(1, self.options["workers"])) if batched else 1)
        torch.set_num_threads(1)
        self.loader = DataLoader(Packed(self.job()), **self.keywords())
        self.iterator = iter(self.loader)
        for group, stream, padding in self.iterator:
            self.padded += padding
            for tokens in group:
                yield tokens, stream

    def manifest(self) -> dict[str, str]:
        order = "corpus within a stream" if self.shuffle == "none" else "seed"
        streams = max(1, self.options["workers"])
        return self.facts(
            "torch", "numpy", streams=streams, order=order, packing="a stream a worker",
            transport="tensors, file descriptors" if self.options["workers"] else "none",
        )  # fmt: skip

    def close(self) -> None:
        shut_down = getattr(self.iterator, "_shutdown_workers", None)  # also in the middle of an epoch
        if shut_down is not None:
            shut_down()
        self.iterator = self.loader = None
