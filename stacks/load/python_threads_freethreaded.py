"""`python_threads` on an interpreter without the global lock: the same code.

PyPI has no interpreters: this runs where `.venvs/freethreaded` was made from a python3.13t or python3.14t.
"""

from __future__ import annotations

import sys
from typing import Any

from stacks.load import python_threads

STACK = {
    "role": "stack",
    "framework": "python",
    "summary": "python-threads on a free-threaded interpreter",
    "environment": "freethreaded",
    "requires": ["numpy", "tokenizers", "fastokens", "orjson", "zstandard"],
    "install": "python3.14t -m venv .venvs/freethreaded, and `requires` in it",
    "devices": ["cpu"],
    "options": {
        "encode": ["batch", "one"],
        "workers": [1, 2, 3, 4, 8],
        "part_kb": [64, 256, 1024, 4096],
        "prefetch": [2, 4],
    },
    "variants": {"default": {"encode": "one", "workers": 2, "part_kb": 256, "prefetch": 2}},
    "axes": {
        "format": {"cpu": ["jsonl", "jsonl.zst", "parquet", "text"]},
        "tokenizer": {"cpu": ["fast", "hf"]},
        "shuffle": {"cpu": ["none", "block"]},
    },
}


class Loader(python_threads.Loader):
    def __init__(self, **keywords: Any) -> None:
        if getattr(sys, "_is_gil_enabled", lambda: True)():
            raise RuntimeError("this interpreter has its global lock on; valid: python3.13t or python3.14t")
        super().__init__(**keywords)
