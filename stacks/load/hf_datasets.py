"""Hugging Face `datasets`, streaming: Arrow record batches from `IterableDataset.iter`, tokenized and packed.

One process; the tokenizer's threads work. The builder of JSON or Parquet reads the files; text files come
from a generator, since the builder `text` would turn the ends of lines into newlines.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "datasets",
    "summary": "Hugging Face datasets, streaming, Arrow batches",
    "environment": "peers",
    "requires": ["datasets", "pyarrow", "numpy", "tokenizers", "fastokens"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {"encode": ["batch", "one"], "documents": [64, 256, 1024]},
    "variants": {"default": {"encode": "batch", "documents": 256}},
    "variables": {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}

BUILDERS = {"jsonl": "json", "jsonl.zst": "json", "parquet": "parquet"}


def text_rows(files: list[Path]) -> Iterator[dict[str, str]]:
    """Whole files, as they are."""
    for path in files:
        yield {"text": path.read_bytes().decode()}


class Loader(reading.Base):
    def data(self) -> Any:
        """The documents, from files that all exist; for `block`, files permuted and a window."""
        files = reading.permuted(list(reading.text_files(self.files)), self.shuffle, self.seed)
        for path in files:
            path.stat()
        datasets.disable_progress_bars()
        if self.format == "text":
            data = datasets.IterableDataset.from_generator(text_rows, gen_kwargs={"files": files})
        else:
            data = datasets.load_dataset(
                BUILDERS[self.format], data_files=[str(path) for path in files], split="train",
                streaming=True, cache_dir=str(self.cache / "datasets"),
            )  # fmt: skip
        if self.shuffle == "block":
            data = data.shuffle(seed=self.seed, buffer_size=reading.WINDOW)
        return data.with_format("arrow")

    def batches(self) -> Iterator[tuple[Any, int]]:
        batched = self.options["encode"] == "batch"
        reading.set_threads(self.cores if batched else 1)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, batched)
        packer = reading.Packer(self.batch, self.sequence, self.end)
        clock = self.stages or reading.NOTHING
        tables = self.data().iter(batch_size=self.options["documents"])
        while True:
            with clock.of("decode"):
                table = next(tables, None)
            if table is None:
                break
            with clock.of("build"):
                texts = [text for text in table["text"].to_pylist() if text]
            with clock.of("tokenize"):
                encoded = tokenizer.encode_batch(texts)
            with clock.of("pack"):
                full = list(packer.add(reading.with_ends(encoded, self.end)))
            for batch in full:
                yield batch, 0
        for batch in packer.flush():
            yield batch, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        order = "corpus" if self.shuffle == "none" else "seed"
        return self.facts(
            "datasets", "pyarrow", "numpy", workers=0, streams=1, order=order, packing="one stream",
            transport="Arrow",
        )  # fmt: skip

    def close(self) -> None:
        shutil.rmtree(self.cache / "datasets", ignore_errors=True)
