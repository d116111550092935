"""Every Python loader delivers the documents of a plain reference, in every format and with both tokenizers.

Each stack runs in its own environment (`epoch.py`), once for all of its jobs; the tests of a stack judge what
it wrote. Where its environment lacks a package, they skip and say what to type.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import registry

STACKS = {
    name: stack
    for name, stack in registry.stacks("load").items()
    if stack.role == "stack" and stack.file.suffix == ".py" and name != "rust"
}
FORMATS = ("jsonl", "jsonl.zst", "parquet", "text")
END = "<|endoftext|>"
BATCH, SEQUENCE = 4, 128
LIMIT_S = 120  # of one job, on a busy machine
OPTIONS: dict[str, list[dict[str, Any]]] = {  # points beside the default, over jsonl
    "python-single": [{"encode": "one", "documents": 16}],
    "python-threads": [{"encode": "one", "workers": 3, "part_kb": 64, "prefetch": 4}],
    "python-threads-freethreaded": [{"encode": "batch", "part_kb": 64}],
    "python-multiprocessing": [
        {"transport": "lists", "encode": "batch", "part_kb": 64, "workers": 3},
        {"transport": "numpy", "start": "forkserver"},
    ],
    "torch-dataloader": [
        {"workers": 0, "documents": 16, "group": 1},
        {"workers": 3, "group": 4, "start": "forkserver"},
    ],
    "torch-dataloader-stateful": [{"workers": 0, "documents": 1, "group": 1}, {"snapshot": 1, "group": 4}],
    "hf-datasets": [{"documents": 64, "encode": "one"}],
    "hf-datasets-map": [{"documents": 64, "workers": 2}],
    "grain": [{"processes": 2, "threads": 1, "part_kb": 64}, {"encode": "one", "threads": 4}],
    "spdl": [{"encode": "one", "workers": 4, "part_kb": 64}],
    "mosaic-streaming": [{"workers": 0, "group": 1}],
    "litdata": [{"workers": 0, "group": 1}],
    "gigatoken": [{"files": 4, "ahead": 0}, {"files": 2, "ahead": 2}],
    "daft": [{"documents": 64, "encode": "one", "chunk_kb": 4096}],
    "dataloader-rs": [{"encode": "one", "workers": 4}],
    "memmap": [{"copy": True, "advice": "sequential"}],
}


# ------------------------------------------------------------------------------------------ the corpus
def texts() -> list[str]:
    """About 300 KB: words, several scripts, spaces, an end-of-text spelled out, empty documents."""
    draw = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(600)]
    words += [
        "été",
        "größer",
        "Привет",
        "данные",
        "東京",
        "数据",
        "🙂",
        "\n\n",
        "   ",
        "\t",
        END,
        "12345",
        "don't",
    ]
    found = []
    for _ in range(400):
        size = draw.choice([0, 1, 3, 20, 150, 400])
        found.append(" ".join(draw.choices(words, k=size)))
    found[7], found[8], found[-1] = '\\ "quoted" \u2028 line', "\r\n", "the last document"
    return found


class Corpus:
    """Four files of each format, and the tokenizer; made once by whichever process comes first."""

    def __init__(self, root: Path) -> None:
        self.root, self.texts = root, texts()

    def build(self) -> None:
        import polars as pl
        import tokenizers
        import zstandard

        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tok.train_from_iterator(
            self.texts,
            tokenizers.trainers.BpeTrainer(
                vocab_size=2000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
            ),
        )
        tok.save(str(self.root / "tokenizer.json"))
        for number in range(4):
            share = self.texts[number * 100 : (number + 1) * 100]
            lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(share)]
            data = "\n".join(lines).encode() + b"\n" * (number != 3)  # the last line of all ends the file
            for format in FORMATS:
                (self.root / format).mkdir(exist_ok=True)
            (self.root / "jsonl" / f"part-{number}.jsonl").write_bytes(data)
            packed = zstandard.ZstdCompressor().compress(data)
            (self.root / "jsonl.zst" / f"part-{number}.jsonl.zst").write_bytes(packed)
            frame = pl.DataFrame({"text": share})
            frame.write_parquet(self.root / "parquet" / f"part-{number}.parquet", row_group_size=40)
            for i, text in enumerate(share):
                (self.root / "text" / f"doc-{number}{i:03d}.txt").write_bytes(text.encode())

    def files(self, format: str) -> list[str]:
        return sorted(str(path) for path in (self.root / format).iterdir())

    @property
    def end(self) -> int:
        return int(self.tokenizer().token_to_id(END))

    @cache  # noqa: B019 - one corpus a process
    def tokenizer(self) -> Any:
        import tokenizers

        tok = tokenizers.Tokenizer.from_file(str(self.root / "tokenizer.json"))
        tok.encode_special_tokens = True
        return tok

    @cache  # noqa: B019 - one corpus a process
    def reference(self) -> tuple[list[str], int, int]:
        """(digests in order, tokens, their sum), a document at a time."""
        digests, tokens, total = [], 0, 0
        for text in self.texts:
            if text:
                ids = [*self.tokenizer().encode(text, add_special_tokens=False).ids, self.end]
                digests.append(hashlib.blake2b(np.array(ids, np.int32).tobytes(), digest_size=8).hexdigest())
                tokens, total = tokens + len(ids), total + sum(ids)
        return digests, tokens, total


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = Corpus(tmp_path_factory.mktemp("corpus"))
    made.build()
    return made


# ------------------------------------------------------------------------------------------ the jobs
def axis(stack: registry.Stack, name: str) -> list[Any]:
    return list(stack.axes[name]["cpu"])


def jobs(name: str, corpus: Corpus, folder: Path) -> dict[str, dict[str, Any]]:
    """What is tried of a stack, by name."""
    stack = STACKS[name]
    default = dict(stack.variants["default"])
    formats = [f for f in FORMATS if f in axis(stack, "format")]
    made: dict[str, dict[str, Any]] = {}

    def add(key: str, options: dict[str, Any], files: list[str] | None = None, **more: Any) -> None:
        given = {"format": "jsonl", "engine": axis(stack, "tokenizer")[0], "shuffle": "none"}
        given |= {k: more.pop(k) for k in list(more) if k in given}
        loader = given | {
            "files": files or corpus.files(given["format"]), "tokenizer": str(corpus.root / "tokenizer.json"),
            "end": corpus.end, "batch": BATCH, "sequence": SEQUENCE, "cores": 2, "seed": 5,
            "options": {**default, **options}, "cache": str(folder / f"cache-{len(made)}"),
        }  # fmt: skip
        made[key] = {"loader": loader, **more}

    for number, format in enumerate(formats):  # every format, and both tokenizers between them
        engines = axis(stack, "tokenizer")
        add(f"{format}", {}, format=format, engine=engines[number % len(engines)])
    for engine in axis(stack, "tokenizer"):
        add(f"jsonl-{engine}", {}, engine=engine)
    for number, options in enumerate(OPTIONS[name]):
        registry.check_options(stack, options, name)
        add(f"options-{number}", options)
    for shuffle in axis(stack, "shuffle"):
        add(f"shuffle-{shuffle}", {}, shuffle=shuffle)
    add("stages", {}, stages=str(folder / "stages"))
    add("stopped", {}, stop=2)
    add("vanished", {}, files=[*corpus.files("jsonl"), str(folder / "gone.jsonl")])
    return made


def interpreter(stack: registry.Stack) -> Path:
    """The stack's own; skips where that is not there or lacks a package."""
    own = registry.environment(stack.environment) / "bin" / "python"
    python = own if stack.environment else Path(sys.executable)
    if not python.exists():
        pytest.skip(f"no environment {stack.environment!r}. Next: {stack.install}")
    ask = "import importlib.metadata as m, sys\nfor name in sys.argv[1:]: m.version(name)"
    done = subprocess.run([python, "-c", ask, *stack.requires], capture_output=True, text=True)
    if done.returncode:
        lacking = done.stderr.strip().rpartition("\n")[2]
        pytest.skip(
            f"{stack.environment or 'this environment'} lacks a package: {lacking}. Next: {stack.install}"
        )
    return python


RESULTS: dict[str, tuple[dict[str, Any], str, set[str]]] = {}


@pytest.fixture
def outcome(request: Any, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a stack's jobs saw, its standard error, and the shared memory it left; run once a process."""
    name = request.param
    if name not in RESULTS:
        python, folder = interpreter(STACKS[name]), tmp_path_factory.mktemp(name)
        wanted = jobs(name, corpus, folder)
        table = {
            "module": f"stacks.load.{STACKS[name].file.stem}", "jobs": list(wanted.values()),
            "limit_s": LIMIT_S,
        }  # fmt: skip
        (folder / "jobs.json").write_text(json.dumps(table))
        before = shared_memory()
        env = {**os.environ, **STACKS[name].variables, "TMPDIR": str(folder), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [python, "-m", "tests.stacks.load.epoch", folder / "jobs.json"],
            cwd=registry.ROOT, env=env, capture_output=True, text=True, timeout=800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        seen = {
            key: json.loads(path.read_text()) if path.exists() else {"error": "it hung, or was killed"}
            for number, key in enumerate(wanted)
            for path in [folder / f"{number}.json"]
        }
        deadline = time.monotonic() + 5
        while (left := {*shared_memory() - before, *processes(folder)}) and time.monotonic() < deadline:
            time.sleep(0.1)
        RESULTS[name] = seen, done.stderr, left
        shutil.rmtree(folder, ignore_errors=True)
    return name, *RESULTS[name]


def shared_memory() -> set[str]:
    """Names in shared memory, less what loaders of other tests at the same time may have."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def processes(folder: Path) -> set[str]:
    """Processes that still have this stack's temporary directory in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}\0".encode() in path.read_bytes():
                found.add((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


STACK = pytest.mark.parametrize(
    "outcome",
    [pytest.param(name, marks=pytest.mark.xdist_group(f"load-{name}")) for name in STACKS],
    indirect=True,
)
pytestmark = pytest.mark.timeout(900)


# ------------------------------------------------------------------------------------------ the judgement
@STACK
def test_documents_and_batches_are_those_of_the_reference(outcome: Any, corpus: Corpus) -> None:
    name, seen, _, _ = outcome
    digests, tokens, total = corpus.reference()
    for key, got in seen.items():
        if key in ("stopped", "vanished"):
            continue
        place = f"{name}, {key}"
        assert got["error"] is None, place
        assert not got["wrong"], f"{place}: shape, dtype or layout of a batch"
        assert Counter(got["digests"]) == Counter(digests), place
        padding = got["padding"]
        assert (got["tokens"] - padding, got["sum"] - corpus.end * padding) == (tokens, total), place
        order = got["manifest"]["order"]
        if order == "corpus":
            assert got["digests"] == digests, f"{place}: the order that it promises"
        assert (order == "seed") <= (got["digests"] != digests), f"{place}: not shuffled"
        assert all(isinstance(fact, str) for fact in got["manifest"].values()), place


@STACK
def test_a_file_that_is_gone_is_an_error(outcome: Any) -> None:
    name, seen, _, _ = outcome
    error = seen["vanished"]["error"]
    assert error and "hung" not in error, name
    assert "gone.jsonl" in error or "o such file" in error, f"{name}: {error}"


@STACK
def test_nothing_is_left_behind(outcome: Any) -> None:
    name, seen, errors, left = outcome
    assert seen["stopped"]["error"] is None
    assert not left, f"{name}: processes or shared memory"
    assert "leaked" not in errors, f"{name}: {errors[-2000:]}"


@STACK
def test_stages_are_those_of_the_specification(outcome: Any) -> None:
    from stacks.load import spec

    name, seen, _, _ = outcome
    stages = seen["stages"]["stages"]
    assert set(stages) <= set(spec.STAGES), name
    if name not in ("memmap", "hf-datasets-map"):  # theirs is beforehand
        assert stages["tokenize"] > 0, name


def test_every_stack_is_tried_at_two_points_at_least() -> None:
    assert set(OPTIONS) == set(STACKS)
    assert all(OPTIONS.values())
