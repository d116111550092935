"""MosaicML Streaming: the corpus as MDS shards, a StreamingDataset in DataLoader workers that tokenize.

`prepare` converts the corpus to shards of text once, timed apart. StreamingDataset divides samples between
workers; each packs a stream of its own. `block` is its algorithm py1e (shards permuted, then a window),
`global` is `naive` (all samples permuted).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "mosaic",
    "summary": "MosaicML Streaming, MDS shards of text, tokenized in DataLoader workers",
    "environment": "peers-mosaic",
    "requires": ["mosaicml-streaming", "torch", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
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
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block", "global"]},
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
        texts = (sample["text"] for sample in reading.clocked(self.source, stages, "decode"))
        full = reading.pack(reading.chunks(texts, job["documents"]), tokenizer, packer, stages)
        while group := list(islice(full, job["group"])):
            yield torch.from_numpy(np.stack(group)), info.id if info else 0, packer.padding
        if stages is not None:
            stages.save()


class Loader(reading.Base):
    iterator: Any = None
    source: Any = None
    place: Path | None = None

    def prepare(self) -> None:
        """Write MDS shards of 16 MiB of text into `cache`; what is there already is used."""
        self.place = self.cache / f"mds-{self.key()}"
        if self.place.exists():
            return
        temporary = self.place.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        with MDSWriter(out=str(temporary), columns={"text": "str"}, size_limit=1 << 24) as writer:
            for text in reading.documents(self.files, self.format):
                writer.write({"text": text})
        temporary.rename(self.place)

    def batches(self) -> Iterator[tuple[Any, int]]:
        if self.place is None:
            self.prepare()
        algorithm = {"none": "py1e", "block": "py1e", "global": "naive"}[self.shuffle]
        clean_stale_shared_memory()
        self.source = StreamingDataset(
            local=str(self.place), shuffle=self.shuffle != "none", shuffle_algo=algorithm,
            shuffle_seed=self.seed, batch_size=64, num_canonical_nodes=1,
        )  # fmt: skip
        yield from self.loaded(self.source)

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
            "mosaicml-streaming", "torch", "numpy", streams=streams, order="its own",
            packing="a stream a worker", transport="tensors, file descriptors", converted="MDS, 16 MiB",
        )  # fmt: skip

    def close(self) -> None:
        shut_down = getattr(self.iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self.iterator = self.source = None
        clean_stale_shared_memory()
