"""The loading work, framework-free: axes, formats on disk, and the batches that every loader must deliver.

A loader reads a corpus (`FORMATS`), tokenizes it and delivers batches of int32 [batch, sequence + 1]: rows
are disjoint windows of a stream of documents, each followed by end-of-text. The last row of a stream is
filled up with end-of-text, never dropped, and the last batch with rows of it. Empty documents are left out;
text never becomes a special token. Nothing here imports a framework, nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stacks.train.spec import Axis, axis_value

WORKLOADS = {
    "load/synthetic": "seeded generated text: as much as the axis `megabytes` says",
    "load/real": "the suite's corpus: sources of Python's standard library where it names none",
}
FORMATS = ("jsonl", "jsonl.zst", "parquet", "text", "tokens")
VOCAB = 50_257  # of the byte-level BPE that is trained on the corpus, end-of-text included
END_OF_TEXT = "<|endoftext|>"
STAGES = ("read", "decode", "tokenize", "build", "pack", "serialise", "copy", "wait")

AXES: dict[str, Axis] = {
    "batch": Axis(default=8, kind=int, at_least=1, help="rows a batch"),
    "sequence": Axis(default=2048, kind=int, at_least=2, help="tokens a row, less the one for the target"),
    "format": Axis(default="jsonl", values=FORMATS, help="how the corpus lies on disk; `tokens`: shards"),
    "tokenizer": Axis(default="fast", values=("fast", "hf"),
                      help="fast: the stack's modern BPE; hf: Hugging Face `tokenizers`"),
    "shuffle": Axis(default="none", values=("none", "block", "global"), help="what is permuted"),
    "cores": Axis(default=2, kind=int, at_least=1, help="CPUs that the whole process tree is bound to"),
    "page_cache": Axis(default="warm", values=("warm", "cold"), help="the files are in memory, or are not"),
    "megabytes": Axis(default=64, kind=int, at_least=1, help="10^6 bytes of UTF-8 text in the corpus"),
}  # fmt: skip
SLUG = ("batch", "sequence", "format", "tokenizer")  # always part of a case id


def resolve_axes(workload: str, axes: Mapping[str, Any]) -> dict[str, Any]:
    """All axes in canonical order, defaults filled in.

    Raises ValueError that names the axis, the value and what is valid.
    """
    if workload not in WORKLOADS:
        raise ValueError(f"unknown workload {workload!r}; valid: {', '.join(WORKLOADS)}")
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise ValueError(f"unknown axis {unknown[0]!r}; valid axes: {', '.join(AXES)}")
    return {name: axis_value(name, axis, axes.get(name, axis.default)) for name, axis in AXES.items()}


def tokens_per_step(axes: Mapping[str, Any]) -> int:
    """Of one batch: its targets are its inputs shifted by one, so that a row has one token more."""
    return int(axes["batch"]) * (int(axes["sequence"]) + 1)
