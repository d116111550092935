"""dataloader-rs: the DataLoader's interface over threads of a Rust core; an item is a part of the corpus.

Items are collected in order. It needs Python 3.13; under a global lock its threads help where the tokenizer
releases it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dataloader_rs import PyDataloader, PyDataset

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "dataloader-rs",
    "summary": "dataloader-rs, threads of a Rust core, a part of the corpus an item",
    "environment": "peers",
    "requires": ["dataloader-rs", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make clean setup-peers PYTHON=python3.13 (it needs Python 3.13)",
    "devices": ["cpu"],
    "options": {
        "encode": ["batch", "one"],
        "workers": [1, 2, 3, 4, 8],
        "part_kb": [64, 256, 1024, 4096],
        "prefetch": [2, 4, 8],
    },
    "variants": {"default": {"encode": "batch", "workers": 2, "part_kb": 256, "prefetch": 4}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Parts(PyDataset):  # type: ignore[misc]
    """Item i is part i as int32 ids."""

    def __init__(self, parts: list[reading.Part], tokenizer: Any, job: dict[str, Any]) -> None:
        super().__init__()
        self.parts, self.tokenizer, self.job = parts, tokenizer, job

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Any:
        return reading.tokenized_part(self.parts[index], tokenizer=self.tokenizer, **self.job)


def only(items: list[Any]) -> Any:
    return items[0]


class Loader(reading.Base):
    iterator: Any = None

    def batches(self) -> Iterator[tuple[Any, int]]:
        options = self.options
        batched = options["encode"] == "batch"
        reading.set_threads(self.cores if batched else 1)
        parts = reading.parts(self.files, self.format, 1024 * options["part_kb"], self.shuffle, self.seed)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batched)
        job = {
            "format": self.format, "end": self.end, "shuffle": self.shuffle, "seed": self.seed,
            "stages": self.stages,
        }  # fmt: skip
        packer = reading.Packer(self.batch, self.sequence, self.end)
        if parts:
            self.iterator = iter(PyDataloader(
                Parts(parts, tokenizer, job), batch_size=1, num_workers=options["workers"],
                prefetch_depth=options["prefetch"], collate_fn=only,
            ))  # fmt: skip
            for ids in self.iterator:
                for full in packer.add(ids):
                    yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "dataloader-rs", "numpy", streams=1, order=order, packing="one stream", transport="reference"
        )

    def close(self) -> None:
        self.iterator = None  # dropping it joins its threads
