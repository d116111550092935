"""A memory map of tokens made beforehand: the upper limit of what any loader can deliver.

`prepare` tokenizes the corpus once into one file of int32 and is timed apart. A batch is a view of the map,
copied by nobody; only the last one, filled up, is an array of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "python",
    "summary": "memory map of tokens made beforehand: the upper limit",
    "requires": ["numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "make setup",
    "devices": ["cpu"],
    "options": {"copy": [False, True], "advice": ["none", "sequential"]},
    "variants": {"default": {"copy": False, "advice": "none"}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text", "tokens"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none"]},
    },
}


class Loader(reading.Base):
    path: Path | None = None

    def prepare(self) -> None:
        """Tokenize the corpus, in its order, into `cache`; a file that is there already is used, and so is a
        shard of `stackbench tokenize`."""
        if self.format == "tokens":
            (self.path,) = self.files
            return
        self.path = self.cache / f"{self.key(self.engine)}.int32"
        if self.path.exists():
            return
        reading.set_threads(self.cores)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine)
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        with temporary.open("wb") as file:
            for chunk in reading.chunks(reading.documents(self.files, self.format), 256):
                file.write(reading.with_ends(tokenizer.encode_batch(chunk), self.end))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def batches(self) -> Iterator[tuple[Any, int]]:
        if self.path is None:
            self.prepare()
        assert self.path is not None
        shape = (self.batch, self.sequence + 1)
        size = shape[0] * shape[1]
        if not self.path.stat().st_size:
            return
        tokens = np.memmap(self.path, np.int32, "r")
        if self.options["advice"] == "sequential":
            import mmap

            tokens._mmap.madvise(mmap.MADV_SEQUENTIAL)  # type: ignore[attr-defined]
        tokens = tokens.view(np.ndarray)
        whole = len(tokens) // size
        for place in range(whole):
            view = tokens[place * size : (place + 1) * size].reshape(shape)
            yield (view.copy() if self.options["copy"] else view), 0
        packer = reading.Packer(self.batch, self.sequence, self.end)
        list(packer.add(tokens[whole * size :]))
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        packing = "one stream, beforehand"
        return self.facts("numpy", streams=1, order="corpus", packing=packing, transport="view")
