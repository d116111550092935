"""Daft: a lazy data frame over the files, a batch UDF that tokenizes, partitions collected in order.

Daft reads and decodes in Rust threads; the UDF gets an Arrow column of documents and gives one list of ids
back for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import daft
import numpy as np
import pyarrow as pa

from stacks.load import reading

STACK = {
    "role": "stack",
    "framework": "daft",
    "summary": "Daft data frame with a tokenizing UDF",
    "environment": "peers",
    "requires": ["daft", "pyarrow", "numpy", "tokenizers", "fastokens"],
    "install": "make setup-peers",
    "devices": ["cpu"],
    "options": {
        "encode": ["batch", "one"],
        "documents": [64, 256, 1024],
        "process": [False, True],
        "chunk_kb": [1024, 4096],
    },
    "variants": {"default": {"encode": "batch", "documents": 256, "process": False, "chunk_kb": 1024}},
    "variables": {"DAFT_ANALYTICS_ENABLED": "0", "DO_NOT_TRACK": "true", "DAFT_PROGRESS_BAR": "0"},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none"]},
    },
}


class Loader(reading.Base):
    iterator: Any = None

    def frame(self) -> Any:
        """The documents as a lazy frame of one column."""
        paths = [str(path.resolve()) for path in reading.text_files(self.files)]
        for path in reading.text_files(self.files):
            path.stat()
        if self.format == "parquet":
            return daft.read_parquet(paths).select("text")
        if self.format == "text":
            frame = daft.read_text(paths, whole_text=True, skip_blank_lines=False)
            return frame.into_batches(self.options["documents"])
        # With its own chunk size the reader hands over one document at a time: 20 times slower.
        chunk = 1024 * self.options["chunk_kb"]
        schema = {"text": daft.DataType.string()}
        return daft.read_json(paths, schema=schema, infer_schema=False, _chunk_size=chunk)

    def batches(self) -> Iterator[tuple[Any, int]]:
        options = self.options
        reading.set_threads(self.cores if options["encode"] == "batch" else 1)
        tokenizer = reading.open_tokenizer(self.tokenizer, self.engine, options["encode"] == "batch")
        end, clock = self.end, self.stages or reading.NOTHING

        def encode(column: Any) -> Any:
            """Every row gets a list: the first one the ids of the whole batch, the others none."""
            with clock.of("build"):
                texts = [text for text in column.to_pylist() if text]
            with clock.of("tokenize"):
                ids = reading.with_ends(tokenizer.encode_batch(texts), end)
            offsets = np.full(len(column) + 1, len(ids), np.int64)
            offsets[0] = 0
            return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids))

        daft.set_runner_native(num_threads=self.cores)
        tokenized = daft.func.batch(
            return_dtype=daft.DataType.list(daft.DataType.int32()), batch_size=options["documents"],
            use_process=options["process"],
        )(encode)  # fmt: skip
        packer = reading.Packer(self.batch, self.sequence, self.end)
        self.iterator = self.frame().select(tokenized(daft.col("text")).alias("ids")).to_arrow_iter()
        for table in self.iterator:
            ids = table.column("ids").flatten().to_numpy()
            for full in packer.add(ids):
                yield full, 0
        for full in packer.flush():
            yield full, 0
        self.padded = packer.padding

    def manifest(self) -> dict[str, str]:
        return self.facts(
            "daft", "pyarrow", "numpy", streams=1, order="corpus", packing="one stream", transport="Arrow"
        )

    def close(self) -> None:
        end = getattr(self.iterator, "close", None)
        if end is not None:
            end()
        self.iterator = None
