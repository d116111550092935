"""Hugging Face `datasets`, `map`: the corpus tokenized into an Arrow table beforehand, mapped from disk.

`prepare` runs `Dataset.map` in `workers` processes and is timed apart, as for any loader of tokens made
beforehand; `batches` packs the table's flat int32 buffers. `global` permutes documents.
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
    "summary": "Hugging Face datasets, tokens mapped beforehand into an Arrow table",
    "environment": "peers",
    "requires": ["datasets", "pyarrow", "numpy", "tokenizers", "fastokens"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {"documents": [64, 256, 1024], "workers": [1, 2]},
    "variants": {"default": {"documents": 256, "workers": 1}},
    "variables": {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "global"]},
    },
}

BUILDERS = {"jsonl": "json", "jsonl.zst": "json", "parquet": "parquet"}


def text_rows(files: list[Path]) -> Iterator[dict[str, str]]:
    """Whole files, as they are."""
    for path in files:
        yield {"text": path.read_bytes().decode()}


def encode(table: pa.Table, tokenizer: Any, end: int) -> pa.Table:
    """A batch of `map`: a row of closed ids for each document that is not empty."""
    texts = [text for text in table["text"].to_pylist() if text]
    ids, offsets = tokenizer.encode_batch(texts)
    closed = reading.with_ends((ids, offsets), end)
    stops = pa.array(offsets + np.arange(len(offsets)), pa.int64())
    return pa.table({"ids": pa.LargeListArray.from_arrays(stops, pa.array(closed))})


class Loader(reading.Base):
    place: Path | None = None

    def prepare(self) -> None:
        """Tokenize the corpus into an Arrow table in `cache`; what is there already is used."""
        self.place = self.cache / f"arrow-{self.key(self.engine)}"
        if self.place.exists():
            return
        workers, scratch = self.options["workers"], self.cache / "datasets"
        reading.set_threads(max(1, self.cores // workers))
        datasets.disable_progress_bars()
        files = list(reading.text_files(self.files))
        if self.format == "text":
            more = {"gen_kwargs": {"files": files}, "cache_dir": str(scratch)}
            data = datasets.Dataset.from_generator(text_rows, **more)
        else:
            data = datasets.load_dataset(
                BUILDERS[self.format], data_files=[str(path) for path in files], split="train",
                cache_dir=str(scratch),
            )  # fmt: skip
        mapped = data.with_format("arrow").map(
            encode, batched=True, batch_size=self.options["documents"], remove_columns=data.column_names,
            fn_kwargs={
                "tokenizer": reading.open_tokenizer(self.tokenizer, self.engine), "end": self.end,
            },
            load_from_cache_file=False, num_proc=workers if workers > 1 else None,
        )  # fmt: skip
        temporary = self.place.with_suffix(".new")
        mapped.save_to_disk(str(temporary))
        temporary.rename(self.place)
        shutil.rmtree(scratch)

    def batches(self) -> Iterator[tuple[Any, int]]:
        if self.place is None:
            self.prepare()
        column = datasets.load_from_disk(str(self.place)).data.column("ids")
        if self.shuffle == "global":
            column = column.take(pa.array(np.random.default_rng(self.seed).permutation(len(column))))
        packer = reading.Packer(self.batch, self.sequence, self.end)
        for chunk in column.chunks:
            for full in packer.add(chunk.flatten().to_numpy()):
                yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "datasets", "pyarrow", "numpy", streams=1, order=order, packing="one stream", transport="Arrow",
            converted="tokens, Arrow table",
        )  # fmt: skip
