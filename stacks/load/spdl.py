"""SPDL: a pipeline of threads; each takes a part of the corpus, reads and tokenizes it, output in order.

`concurrency` tasks run at once in the pipeline's thread pool; the sink holds `prefetch` results for the
consumer, who packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from spdl.pipeline import PipelineBuilder

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "spdl",
    "summary": "SPDL pipeline of threads, a part of the corpus each",
    "environment": "peers",
    "requires": ["spdl", "numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup-peers",
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


class Loader(reading.Base):
    pipeline: Any = None

    def batches(self) -> Iterator[tuple[Any, int]]:
        batch, workers = self.options["encode"] == "batch", self.options["workers"]
        reading.set_threads(self.cores if batch else 1)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batch)
        size = 1024 * self.options["part_kb"]
        work = partial(
            reading.tokenized_part, format=self.format, tokenizer=tokenizer, end=self.end,
            shuffle=self.shuffle, seed=self.seed, stages=self.stages,
        )  # fmt: skip
        self.pipeline = (
            PipelineBuilder()
            .add_source(reading.parts(self.files, self.format, size, self.shuffle, self.seed))
            .pipe(work, concurrency=workers, output_order="input", max_failures=0)
            .add_sink(self.options["prefetch"])
            .build(num_threads=workers)
        )
        packer = reading.Packer(self.batch, self.sequence, self.end)
        self.pipeline.start()
        for ids in self.pipeline.get_iterator(timeout=600):
            for full in packer.add(ids):
                yield full, 0
        self.pipeline.stop()  # raises what a thread raised
        self.pipeline = None
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "spdl", "numpy", streams=1, order=order, packing="one stream", transport="reference"
        )

    def close(self) -> None:
        if self.pipeline is not None:
            self.pipeline.stop()
            self.pipeline = None
