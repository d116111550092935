"""stackbench-native: read, tokenized and packed by Rust threads, delivered without a copy (`stacks/native/`).

A batch is a view of memory that no other batch uses while anybody holds it. Each segment of the corpus is
packed alone and its last row filled up; batches are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import stackbench_native

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "rust",
    "summary": "threads in Rust from file to batch; deterministic, resumable",
    "requires": ["stackbench-native", "numpy"],
    "install": "install Rust (cargo), then make setup",
    "devices": ["cpu"],
    "options": {"threads": ["cores", "one less"], "depth": [4, 16, 64]},
    "variants": {"default": {"threads": "cores", "depth": 16}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text", "tokens"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block", "global"]},
    },
}


class Loader(reading.Base):
    loader: stackbench_native.Loader | None = None

    def prepare(self) -> None:
        """The manifest and, for shuffle `global`, the document index."""
        self.cache.mkdir(parents=True, exist_ok=True)
        stackbench_native.index(
            self.files, self.cache, sequence=self.sequence, shuffle=self.shuffle, format=self.format
        )

    def batches(self) -> Iterator[tuple[Any, int]]:
        threads = self.cores if self.options["threads"] == "cores" else max(1, self.cores - 1)
        self.loader = stackbench_native.Loader(
            self.files, self.tokenizer, batch=self.batch, sequence=self.sequence, seed=self.seed,
            shuffle=self.shuffle, format=self.format, threads=threads, depth=self.options["depth"],
            engine=self.engine, end_of_text="<|endoftext|>", cache=self.cache,
        )  # fmt: skip
        for batch in self.loader:
            self.padded += batch.padding
            yield np.asarray(batch.tokens), batch.lane
        if self.stages is not None:
            counted = self.loader.stats()
            for stage in ("read", "decode", "tokenize", "pack"):
                self.stages.add(stage, round(1e9 * counted[f"{stage}_cpu_s"]))

    def manifest(self) -> dict[str, str]:
        engine = self.loader.engine if self.loader is not None else None
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "stackbench-native", "numpy", tokenizer_engine=engine or "none: tokens", workers=self.cores,
            streams=1, order=order, packing="by segments", transport="view",
        )  # fmt: skip

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
