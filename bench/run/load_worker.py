"""The worker of Python loaders: reads a job, consumes one `Loader`, reports by JSON lines (bench.protocol).

    python -m bench.run.load_worker JOB.json

It needs NumPy and the loader's own libraries, so that it runs in any environment. The consumer sums every
token inside the timed region: nothing lazy escapes. Kinds of observation:

    timed, calibration   one pass; time to the first batch, from the first to the last, in all; CPU, tokens
    parity               the hash of every document's ids
    prepare              what a loader keeps (an index, a converted corpus), timed apart
    breakdown            CPU seconds by stage, bytes and seconds pickled, and what a ready batch costs
    gil                  what a loader takes from a thread of Python beside it (bench.run.load_gil)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bench.run import tree
from bench.run.worker import Channel, Refusal, describe_process, load_stack, main

Job = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[2]
PICKLES = "STACKBENCH_PICKLES"  # variable: the folder where processes count what they pickle
HASH_BYTES = 16
CONSUMER_BATCHES, CONSUMER_S = 200, 3.0  # of the look at what a ready batch costs
CONSUMER_FIRST, CONSUMER_PAUSE_S = 8, 0.02  # batches that say how long to wait, and the least of that


def module_of(path: str) -> ModuleType:
    """A loader's module: by name where it is the repository's, so that spawned processes can import it."""
    file = Path(path).resolve()
    with contextlib.suppress(ValueError):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "stacks":
            return importlib.import_module(".".join(parts))
    return load_stack(path)


def make(job: Job, stages: Any = None) -> Any:
    """The job's loader; its constructor's time is the loader's own."""
    axes = job["axes"]
    return module_of(job["stack_file"]).Loader(
        files=[Path(file) for file in job["files"]], format=axes["format"], tokenizer=Path(job["tokenizer"]),
        end=job["end"], batch=axes["batch"], sequence=axes["sequence"], shuffle=axes["shuffle"],
        engine=axes["tokenizer"], cores=axes["cores"], seed=job["seed"], options=dict(job["options"]),
        cache=Path(job["cache"]), stages=stages,
    )  # fmt: skip


class Pass:
    """One epoch, consumed: nanoseconds, tokens and CPU seconds."""

    def __init__(self, job: Job, stages: Any = None) -> None:
        self.batches = self.tokens = self.total = 0
        self.first_ns = self.second_ns = self.last_ns = 0
        module_of(job["stack_file"])  # a program that trains has imported its framework already
        cpu, self.begin_ns = tree.cpu_s(os.getpid()), time.perf_counter_ns()
        self.loader = make(job, stages)
        for batch, _ in self.loader.batches():
            if not self.batches:
                self.first_ns = time.perf_counter_ns()
            array = np.asarray(batch)
            self.total += int(array.sum(dtype=np.int64))
            self.tokens += array.size
            self.batches += 1
            self.last_ns = time.perf_counter_ns()
            self.second_ns = self.second_ns or self.last_ns
        self.cpu_s, self.pool_s = tree.cpu_s(os.getpid()) - cpu, tree.library_threads_cpu_s()
        if self.batches < 2:
            raise Refusal("bad job", f"{self.batches} batches: the corpus is too small for a rate")
        self.padding = int(self.loader.padding())

    @property
    def wall_ns(self) -> int:
        """From the first batch, received and summed, to the last."""
        return self.last_ns - self.second_ns

    @property
    def total_s(self) -> float:
        return (self.last_ns - self.begin_ns) / 1e9

    def report(self, channel: Channel, phase: str) -> None:
        rows: list[tuple[str, float, str]] = [
            ("time_to_first_batch_s", (self.first_ns - self.begin_ns) / 1e9, "s"),
            ("total_s", self.total_s, "s"), ("tokens", self.tokens, "1"), ("token_sum", self.total, "1"),
            ("padding", self.padding, "1"), ("padding_share", self.padding / self.tokens, "1"),
            ("cpu_s_per_mtok", 1e6 * self.cpu_s / self.tokens, "s"),
            ("cpu_seconds_per_second", self.cpu_s / self.total_s, "1"),
            ("tokens_per_s_in_all", self.tokens / self.total_s, "1/s"),
        ]  # fmt: skip
        for name, value, unit in rows:
            channel.metric(name, value, unit, phase=phase)


def keep(job: Job) -> None:
    """What the loader keeps of a text that no `prepare` observation has seen: before anything is measured."""
    if hasattr(module_of(job["stack_file"]).Loader, "prepare"):
        loader = make(job)
        loader.prepare()
        loader.close()


def run_timed(job: Job, channel: Channel) -> None:
    done = Pass(job)
    if job["kind"] == "timed":
        channel.send(
            "value", index=0, warmup=False, steps=done.batches - 1, wall_ns=done.wall_ns, device_ns=None,
            loss=None,
        )  # fmt: skip
    channel.metric("tokens_per_s", (done.batches - 1) * done.tokens / done.batches / done.wall_ns * 1e9,
                   "1/s", phase="pass")  # fmt: skip
    done.report(channel, "pass")
    facts(done.loader, job, channel)
    done.loader.close()


def facts(loader: Any, job: Job, channel: Channel) -> None:
    """The loader's manifest, and the options in force."""
    options = {f"option.{name}": str(value) for name, value in job["options"].items()}
    channel.send("manifest", facts={**{k: str(v) for k, v in loader.manifest().items()}, **options})


# ---------------------------------------------------------------------------------------------------- parity
def run_parity(job: Job, channel: Channel) -> None:
    """Every document's hash, in the order delivered; documents are what lies between end-of-text tokens."""
    axes, end = job["axes"], job["end"]
    streams: dict[int, list[np.ndarray]] = {}
    loader, shape = make(job), (job["axes"]["batch"], job["axes"]["sequence"] + 1)
    wrong: dict[str, int] = {"shape": 0, "dtype": 0, "contiguous": 0}
    batches = tokens = 0
    for batch, stream in loader.batches():
        array = np.asarray(batch)
        wrong["shape"] += array.shape != shape
        wrong["dtype"] += array.dtype != np.int32
        wrong["contiguous"] += not array.flags.c_contiguous
        streams.setdefault(stream, []).append(array.astype("<i4").reshape(-1))  # a copy: buffers are reused
        batches, tokens = batches + 1, tokens + array.size
    hashes, kept = bytearray(), 0
    for parts in streams.values():
        ids = np.concatenate(parts)
        ends = np.flatnonzero(ids == end)
        start = 0
        for stop in ends.tolist():
            if stop > start:
                hashes += hashlib.blake2b(ids[start:stop].tobytes(), digest_size=HASH_BYTES).digest()
                kept += stop - start + 1
            start = stop + 1
        if start < len(ids):  # a document that is not closed is one that the corpus does not have
            hashes += bytes(HASH_BYTES)
            kept += len(ids) - start
    out = Path(job["parity"]["out"])
    out.write_bytes(hashes)
    row = {**wrong, "batches": batches, "tokens": tokens, "streams": len(streams),
           "padding": tokens - kept, "padding_said": int(loader.padding())}  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(row))
    facts(loader, job, channel)
    prepares = "yes" if hasattr(loader, "prepare") else "no"
    channel.send("manifest", facts={"keeps": prepares, "streams_seen": str(len(streams)),
                                    "axis.shuffle": axes["shuffle"]})  # fmt: skip
    loader.close()


def run_prepare(job: Job, channel: Channel) -> None:
    loader, begin = make(job), time.perf_counter()
    if hasattr(loader, "prepare"):
        loader.prepare()
    channel.metric("prepare_s", time.perf_counter() - begin, "s", phase="prepare")
    kept = sum(p.stat().st_size for p in tree.files_in([Path(job["cache"])]))
    channel.metric("prepared_bytes", kept, "bytes", phase="prepare")
    loader.close()


# ------------------------------------------------------------------------------------------------- breakdown
class Pickles:
    """What this process and those it starts pickle for one another: bytes and nanoseconds, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes, self.ns = folder, 0, 0

    def install(self) -> None:
        from multiprocessing.reduction import ForkingPickler

        plain = ForkingPickler.dumps

        def dumps(_: Any, value: Any, protocol: Any = None) -> Any:
            begin = time.thread_time_ns()
            data = plain(value, protocol)
            self.count(len(data), time.thread_time_ns() - begin)
            return data

        ForkingPickler.dumps = classmethod(dumps)  # type: ignore[method-assign, assignment]

    def count(self, size: int, ns: int) -> None:
        """A forked process writes a file of its own, and leaves out what it inherited."""
        path = self.folder / f"{os.getpid()}.json"
        if not path.exists():
            self.bytes = self.ns = 0
        self.bytes, self.ns = self.bytes + size, self.ns + ns
        path.write_text(json.dumps([self.bytes, self.ns]))

    def totals(self) -> tuple[int, int]:
        rows = [json.loads(path.read_text() or "[0, 0]") for path in self.folder.glob("*.json")]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)


def run_breakdown(job: Job, channel: Channel) -> None:
    """Instrumented, and so never timed."""
    from stacks.load.reading import Stages

    scratch = Path(job["scratch"])
    (scratch / "pickles").mkdir(parents=True)
    os.environ[PICKLES] = str(scratch / "pickles")  # spawned processes import this module, and see it
    pickles = Pickles(scratch / "pickles")
    pickles.install()
    stages = Stages(scratch / "stages")
    done = Pass(job, stages)
    done.loader.close()
    mtok = done.tokens / 1e6
    found = {name: ns / 1e9 for name, ns in stages.totals().items()}
    for name, seconds in found.items():
        channel.metric(f"stage.{name}", seconds / mtok, "s", phase="breakdown")
    rest = max(0.0, done.cpu_s - sum(found.values()))
    pool = min(rest, done.pool_s)  # not claimed by a stage: a tokenizer's threads
    channel.metric("stage.library threads", pool / mtok, "s", phase="breakdown")
    channel.metric("stage.other", (rest - pool) / mtok, "s", phase="breakdown")
    channel.metric("stages_cpu_s_per_mtok", done.cpu_s / mtok, "s", phase="breakdown")
    size, ns = pickles.totals()
    channel.metric("bytes_pickled_per_batch", size / done.batches, "bytes", phase="breakdown")
    channel.metric("pickle_s_per_batch", ns / 1e9 / done.batches, "s", phase="breakdown")


def run_consumer(job: Job, channel: Channel) -> None:
    """What the consumer's own `next` costs while a batch is ready: it is asked for late, by a thread that was
    busy until then. One that slept would measure how a CPU wakes, which costs more than any loader here."""
    loader = make(job)
    batches = iter(loader.batches())
    costs: list[float] = []
    begin = time.perf_counter()
    made = sum(next(batches, None) is not None for _ in range(CONSUMER_FIRST))
    pause = max(CONSUMER_PAUSE_S, 2 * (time.perf_counter() - begin) / max(made, 1))
    begin = time.perf_counter()
    while len(costs) < CONSUMER_BATCHES and time.perf_counter() - begin < CONSUMER_S:
        due = time.perf_counter() + pause
        while time.perf_counter() < due:
            pass
        start = time.perf_counter_ns()
        if next(batches, None) is None:
            break
        costs.append((time.perf_counter_ns() - start) / 1e3)
    if costs:
        channel.metric("consumer_us_per_batch", statistics.median(costs), "us", phase="consumer")
        channel.metric("consumer_batches", len(costs), "1", phase="consumer")
    loader.close()


def run_gil(job: Job, channel: Channel) -> None:
    from bench.run import load_gil

    load_gil.run(job, channel, make)


KINDS: dict[str, Callable[[Job, Channel], None]] = {
    "timed": run_timed, "calibration": run_timed, "parity": run_parity, "prepare": run_prepare,
    "breakdown": run_breakdown, "consumer": run_consumer, "gil": run_gil,
}  # fmt: skip


def work(job: Job, channel: Channel) -> None:
    channel.event("ready")
    if job["kind"] not in KINDS:
        raise Refusal("bad job", f"kind {job['kind']!r} is none of {', '.join(KINDS)}")
    if job["text"] != "main" and job["keeps"]:
        keep(job)
    KINDS[job["kind"]](job, channel)
    if job["kind"] == "timed":
        with contextlib.suppress(ImportError):  # an environment may lack pyperf
            describe_process(channel)


if os.environ.get(PICKLES):
    Pickles(Path(os.environ[PICKLES])).install()

if __name__ == "__main__":
    code = main(sys.argv[1:], work)
    sys.stderr.flush()
    os._exit(code)
