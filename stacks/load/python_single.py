"""One process and one thread of Python: read, tokenize a chunk of documents, pack.

The tokenizer may use threads of its own (Rayon) over the documents of a chunk; nothing else is parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "python",
    "summary": "one process, the tokenizer's own threads over a chunk of documents",
    "requires": ["numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup",
    "devices": ["cpu"],
    "options": {"encode": ["batch", "one"], "documents": [16, 64, 256, 1024]},
    "variants": {"default": {"encode": "batch", "documents": 256}, "one": {"encode": "one", "documents": 64}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Loader(reading.Base):
    def batches(self) -> Iterator[tuple[Any, int]]:
        batch = self.options["encode"] == "batch"
        reading.set_threads(self.cores if batch else 1)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batch)
        packer = reading.Packer(self.batch, self.sequence, self.end)
        files = reading.permuted(self.files, self.shuffle, self.seed)
        texts = reading.documents(files, self.format, self.stages)
        texts = reading.windowed(texts, self.shuffle, self.seed)
        chunks = reading.chunks(texts, self.options["documents"])
        for full in reading.pack(chunks, tokenizer, packer, self.stages):
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts("numpy", workers=0, streams=1, order=order, packing="one stream", transport="none")
