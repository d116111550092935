"""LitData: the corpus as optimized chunks, its StreamingDataset in DataLoader workers that tokenize.

`prepare` converts the corpus to chunks of text once, timed apart. StreamingDataset divides chunks between
workers; each packs a stream of its own. Its shuffle permutes chunks and the items within: `block`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataset
from litdata.streaming.writer import BinaryWriter
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "litdata",
    "summary": "LitData chunks of text, tokenized in DataLoader workers",
    "environment": "peers",
    "requires": ["litdata", "torch", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {
        "workers": [0, 1, 2, 3, 4, 8],
        "prefetch": [2, 4, 8],
        "documents": [1, 16, 64, 256],
        "group": [1, 4, 16],
        "encode": ["batch", "one"],
    },
    "variants": {
        "default": {"workers": 2, "prefetch": 2, "documents": 64, "group": 16, "encode": "batch"},
        "usual": {
            "workers": 2,
            "prefetch": 2,
            "documents": 64,
            "group": 1,
            "encode": "batch",
        },  # a batch at a time, as most programs do
    },
    "variables": {"LITDATA_DISABLE_VERSION_CHECK": "1"},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Packed(IterableDataset):  # type: ignore[misc]
    """Yields (int32 tensor [batches, batch, sequence + 1], stream, padding in them)."""

    def __init__(self, source: Any, job: dict[str, Any]) -> None:
        self.source, self.job = source, job

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        job, info, stages = self.job, get_worker_info(), self.job["stages"]
        tokenizer = reading.open_tokenizer(job["tokenizer"], job["engine"], job["batched"])
        packer = reading.Packer(job["batch"], job["sequence"], job["end"])
        texts = (sample for sample in reading.clocked(self.source, stages, "decode"))
        full = reading.pack(reading.chunks(texts, job["documents"]), tokenizer, packer, stages)
        while group := list(islice(full, job["group"])):
            yield torch.from_numpy(np.stack(group)), info.id if info else 0, packer.padding
        if stages is not None:
            stages.save()


class Loader(reading.Base):
    iterator: Any = None
    place: Path | None = None

    def prepare(self) -> None:
        """Write chunks of 16 MB of text into `cache`; what is there already is used."""
        self.place = self.cache / f"litdata-{self.key()}"
        if self.place.exists():
            return
        temporary = self.place.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        writer = BinaryWriter(str(temporary), chunk_bytes="16MB")
        for index, text in enumerate(reading.documents(self.files, self.format)):
            writer.add_item(index, text)
        writer.done()
        writer.merge()
        temporary.rename(self.place)

    def batches(self) -> Iterator[tuple[Any, int]]:
        if self.place is None:
            self.prepare()
        source = StreamingDataset(
            str(self.place), shuffle=self.shuffle != "none", seed=self.seed, drop_last=False
        )
        yield from self.loaded(source)

    def loaded(self, source: Any) -> Iterator[tuple[Any, int]]:
        """The DataLoader over `source`."""
        options = self.options
        workers, batched = options["workers"], options["encode"] == "batch"
        reading.set_threads(max(1, self.cores // max(1, workers)) if batched else 1)
        torch.set_num_threads(1)
        job = {
            "tokenizer": self.tokenizer, "engine": self.engine, "end": self.end, "batch": self.batch,
            "sequence": self.sequence, "stages": self.stages, "documents": options["documents"],
            "group": options["group"], "batched": batched,
        }  # fmt: skip
        more = {"prefetch_factor": options["prefetch"]} if workers else {}
        loader = DataLoader(Packed(source, job), batch_size=None, num_workers=workers, **more)
        self.iterator = iter(loader)
        for group, stream, padding in self.iterator:
            self.padded += padding
            for tokens in group:
                yield tokens, stream

    def manifest(self) -> dict[str, str]:
        streams = max(1, self.options["workers"])
        return self.facts(
            "litdata", "torch", "numpy", streams=streams, order="its own", packing="a stream a worker",
            transport="tensors, file descriptors", converted="chunks of 16 MB",
        )  # fmt: skip

    def close(self) -> None:
        shut_down = getattr(self.iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self.iterator = None
