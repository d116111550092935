"""torchdata's StatefulDataLoader over the IterableDataset of `torch_dataloader`, with its position kept.

Beside each batch, the workers hand over their state every `snapshot` batches, so that `state_dict` can resume
in the middle of an epoch: documents done and the tokens that are not yet in a batch. Resuming reads the
documents before that point again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "torch",
    "summary": "torchdata StatefulDataLoader: the DataLoader whose position can be kept",
    "environment": "peers",
    "requires": ["torchdata", "torch", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {
        "workers": [0, 1, 2, 3, 4, 8],
        "prefetch": [2, 4, 8],
        "documents": [1, 16, 64, 256],
        "group": [1, 4, 16],
        "encode": ["batch", "one"],
        "start": ["fork", "spawn", "forkserver"],
        "snapshot": [1, 16, 128],
    },
    "variants": {
        "default": {
            "workers": 2,
            "prefetch": 2,
            "documents": 64,
            "group": 16,
            "encode": "batch",
            "start": "fork",
            "snapshot": 16,
        },
        "usual": {
            "workers": 2,
            "prefetch": 2,
            "documents": 64,
            "group": 1,
            "encode": "batch",
            "start": "fork",
            "snapshot": 16,
        },  # a batch at a time, as most programs do
    },
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Packed(IterableDataset):  # type: ignore[misc]
    """Yields (int32 tensor [batches, batch, sequence + 1], stream, padding in them), `group` batches at once,
    since what crosses to the parent costs by the piece. Its state holds where it is."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.state: dict[str, Any] = {"chunks": 0, "waiting": None}

    def state_dict(self) -> dict[str, Any]:
        """Chunks of documents that were tokenized, and the ids of them that were not yet given out."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        job, info = self.job, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        stages, clock = job["stages"], job["stages"] or reading.NOTHING
        texts = reading.documents(reading.shares(job["files"], workers)[worker], job["format"], stages)
        chunks = reading.chunks(reading.windowed(texts, job["shuffle"], job["seed"]), job["documents"])
        tokenizer = reading.open_tokenizer(job["tokenizer"], job["engine"], job["batched"])
        packer = reading.Packer(job["batch"], job["sequence"], job["end"])
        done = self.state["chunks"]
        for _ in islice(chunks, done):
            continue
        waiting = [] if self.state["waiting"] is None else list(packer.add(self.state["waiting"]))
        for chunk in chunks:
            done += 1
            with clock.of("tokenize"):
                encoded = tokenizer.encode_batch(chunk)
            with clock.of("pack"):
                waiting += packer.add(reading.with_ends(encoded, packer.end))
            while len(waiting) >= job["group"]:
                group, waiting = waiting[: job["group"]], waiting[job["group"] :]
                self.state = {"chunks": done, "waiting": self.flat(waiting, packer)}
                yield torch.from_numpy(np.stack(group)), worker, 0
        waiting += packer.flush()
        while waiting:
            group, waiting = waiting[: job["group"]], waiting[job["group"] :]
            self.state = {"chunks": done, "waiting": self.flat(waiting, packer)}
            yield torch.from_numpy(np.stack(group)), worker, 0 if waiting else packer.padding
        self.state = {"chunks": 0, "waiting": None}
        if stages is not None:
            stages.save()

    def flat(self, waiting: list[Any], packer: reading.Packer) -> Any:
        return np.concatenate([*(batch.ravel() for batch in waiting), packer.held()])


class Loader(reading.Base):
    loader: Any = None
    iterator: Any = None

    def batches(self) -> Iterator[tuple[Any, int]]:
        options = self.options
        workers, batched = options["workers"], options["encode"] == "batch"
        reading.set_threads(max(1, self.cores // max(1, workers)) if batched else 1)
        torch.set_num_threads(1)
        job = {
            "files": reading.permuted(self.files, self.shuffle, self.seed), "format": self.format,
            "tokenizer": self.tokenizer, "engine": self.engine, "end": self.end, "batch": self.batch,
            "sequence": self.sequence, "shuffle": self.shuffle, "seed": self.seed, "stages": self.stages,
            "documents": options["documents"], "group": options["group"], "batched": batched,
        }  # fmt: skip
        more = {"prefetch_factor": options["prefetch"], "multiprocessing_context": options["start"]}
        self.loader = StatefulDataLoader(
            Packed(job), batch_size=None, num_workers=workers, snapshot_every_n_steps=options["snapshot"],
            **(more if workers else {}),
        )  # fmt: skip
        self.iterator = iter(self.loader)
        for group, stream, padding in self.iterator:
            self.padded += padding
            for tokens in group:
                yield tokens, stream

    def manifest(self) -> dict[str, str]:
        order = "corpus within a stream" if self.shuffle == "none" else "seed"
        streams = max(1, self.options["workers"])
        return self.facts(
            "torchdata", "torch", "numpy", streams=streams, order=order, packing="a stream a worker",
            transport="tensors, file descriptors" if self.options["workers"] else "none",
        )  # fmt: skip

    def close(self) -> None:
        shut_down = getattr(self.iterator, "_shutdown_workers", None)  # also in the middle of an epoch
        if shut_down is not None:
            shut_down()
        self.iterator = self.loader = None
