"""Hugging Face `datasets`: streaming, or `map` over a memory-mapped Arrow table.

`stream`: Arrow record batches from `IterableDataset.iter`, tokenized and packed as they come, in one process
(the tokenizer's threads work). `map`: `Dataset.map` tokenizes into an Arrow file, in `workers` processes,
then its flat int32 buffers are packed; that map is part of the pass, since ids are what this work makes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "datasets",
    "summary": "Hugging Face datasets, streaming or map, Arrow batches",
    "environment": "peers",
    "requires": ["datasets", "pyarrow", "numpy", "tokenizers", "fastokens"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {
        "mode": ["stream", "map"],
        "encode": ["batch", "one"],
        "documents": [64, 256, 1024],
        "workers": [1, 2, 4],
    },
    "variants": {
        "default": {"mode": "stream", "encode": "batch", "documents": 256, "workers": 1},
        "map": {"mode": "map", "encode": "batch", "documents": 1024, "workers": 1},
    },
    "variables": {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block", "global"]},
    },
}

BUILDERS = {"jsonl": "json", "jsonl.zst": "json", "parquet": "parquet"}


def text_rows(files: list[Path]) -> Iterator[dict[str, str]]:
    """Whole files, as they are: the builder `text` would turn the ends of lines into "\\n"."""
    for path in files:
        yield {"text": path.read_bytes().decode()}


def encode(table: pa.Table, tokenizer: Any, end: int) -> pa.Table:
    """A batch of `map`: the ids of its documents, closed, as one row."""
    ids = reading.with_ends(tokenizer.encode_batch([t for t in table["text"].to_pylist() if t]), end)
    offsets = pa.array([0, len(ids)], pa.int64())
    return pa.table({"ids": pa.LargeListArray.from_arrays(offsets, pa.array(ids))})


class Loader(reading.Base):
    place: Path | None = None

    def data(self, streaming: bool) -> Any:
        """The documents, from files that all exist, shuffled as asked."""
        files = reading.permuted(list(reading.text_files(self.files)), self.shuffle, self.seed)
        for path in files:
            path.stat()
        datasets.disable_progress_bars()
        self.place = self.cache / "datasets"
        if self.format == "text":
            kind = datasets.IterableDataset if streaming else datasets.Dataset
            more = {} if streaming else {"cache_dir": str(self.place)}
            data = kind.from_generator(text_rows, gen_kwargs={"files": files}, **more)
        else:
            data = datasets.load_dataset(
                BUILDERS[self.format], data_files=[str(path) for path in files], split="train",
                streaming=streaming, cache_dir=str(self.place),
            )  # fmt: skip
        if self.shuffle == "block":
            return data.shuffle(seed=self.seed, buffer_size=reading.WINDOW)
        return data.shuffle(seed=self.seed) if self.shuffle == "global" else data

    def chunks(self) -> Iterator[np.ndarray]:
        """Ids of a batch of documents, closed."""
        batched, documents = self.options["encode"] == "batch", self.options["documents"]
        clock = self.stages or reading.NOTHING
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batched)
        if self.options["mode"] == "stream" and self.shuffle != "global":
            batches = self.data(True).with_format("arrow").iter(batch_size=documents)
            while True:
                with clock.of("decode"):
                    table = next(batches, None)
                if table is None:
                    return
                with clock.of("build"):
                    texts = [text for text in table["text"].to_pylist() if text]
                with clock.of("tokenize"):
                    encoded = tokenizer.encode_batch(texts)
                yield reading.with_ends(encoded, self.end)
        data = self.data(False) if self.shuffle != "block" else self.whole()
        data = data.with_format("arrow")
        mapped = data.map(
            encode, batched=True, batch_size=documents, remove_columns=data.column_names,
            fn_kwargs={"tokenizer": tokenizer, "end": self.end}, load_from_cache_file=False,
            num_proc=self.options["workers"] if self.options["workers"] > 1 else None,
        )  # fmt: skip
        for chunk in mapped.data.column("ids").chunks:
            yield chunk.flatten().to_numpy()

    def whole(self) -> Any:
        """`block` for a table: files permuted when it was made, and no window."""
        shuffle, self.shuffle = self.shuffle, "none"
        files, self.files = self.files, reading.permuted(self.files, shuffle, self.seed)
        try:
            return self.data(False)
        finally:
            self.shuffle, self.files = shuffle, files

    def batches(self) -> Iterator[tuple[Any, int]]:
        workers = self.options["workers"] if self.options["mode"] == "map" else 1
        batched = self.options["encode"] == "batch"
        reading.set_threads(max(1, self.cores // workers) if batched else 1)
        packer = reading.Packer(self.batch, self.sequence, self.end)
        for ids in self.chunks():
            for full in packer.add(ids):
                yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "datasets", "pyarrow", "numpy", streams=1, order=order, packing="one stream", transport="Arrow"
        )

    def close(self) -> None:
        if self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)
