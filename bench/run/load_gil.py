"""What a loader takes from a thread of Python that trains beside it: the price of the interpreter's lock.

    alone   the thread works, the loader rests
    same    the loader is consumed by another thread of this process
    other   the same loader is consumed by another process

The thread is bound to one CPU; the loader, with every thread and process of its own, to another, so that
what is left to fight over is the lock (and the memory bus, which `other` has too). Windows of the three are
interleaved; `gil_slowdown` is how much longer a unit of work takes in `same` than in `other`.

The consumer takes a batch every `STEP_S`, as training does, and not as fast as it can: two threads that both
want the lock all the time would measure the interpreter, whatever the loader.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.run.worker import Channel, Refusal

Job = Mapping[str, Any]
Make = Callable[[Job], Any]
WINDOW_S = 0.2
WINDOWS = 5  # of each kind
STEP_S = 0.02  # between batches
UNIT_LOOPS = 20_000  # of a unit of work: about a millisecond of pure Python
END_S = 1  # for a consumer to end by itself: its process is ended after that
SETTLE_S = 0.05  # after a loader is let go or held, before a window begins


def unit() -> int:
    """A piece of training's own Python: it needs the lock all the time."""
    total = 0
    for i in range(UNIT_LOOPS):
        total += i & 7
    return total


def window() -> float:
    """Seconds a unit takes in one window."""
    begin, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < WINDOW_S:
        unit()
        count += 1
    return (now - begin) / count


class Consumer(threading.Thread):
    """Consumes epochs while it is let go; bound to one CPU before it makes the loader."""

    def __init__(self, job: Job, make: Make, cpu: int) -> None:
        super().__init__(daemon=True)
        self.job, self.make, self.cpu = job, make, cpu
        self.go, self.stop, self.started = threading.Event(), threading.Event(), threading.Event()
        self.batches, self.error = 0, ""

    def run(self) -> None:
        os.sched_setaffinity(threading.get_native_id(), {self.cpu})
        try:
            while not self.stop.is_set():
                loader = self.make(self.job)
                with contextlib.closing(loader):
                    for batch, _ in loader.batches():
                        self.started.set()
                        self.go.wait()
                        int(np.asarray(batch).sum(dtype=np.int64))
                        self.batches += 1
                        if self.stop.wait(STEP_S):
                            break
        except Exception as error:  # told by the thread that waits
            self.error = f"{type(error).__name__}: {error}"
        self.started.set()

    def end(self) -> None:
        self.stop.set()
        self.go.set()
        self.join(END_S)


class Other:
    """The same consumer in a process of its own, told by lines on its standard input."""

    def __init__(self, job: Job, cpu: int, folder: str) -> None:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(dict(job)))
        command = [sys.executable, "-m", "bench.run.load_gil", str(path), str(cpu)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, word: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.tell("stop")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def run(job: Job, channel: Channel, make: Make) -> None:
    """Medians of the windows. Raises Refusal where there are not two CPUs to keep apart."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Refusal("unsupported", "the price of the lock needs two CPUs, one for each side")
    times: dict[str, list[float]] = {"alone": [], "same": [], "other": []}
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, {cpus[1]})
        other, same = Other(job, cpus[1], folder), Consumer(job, make, cpus[1])
        try:
            ready = other.tell("ready?")
            same.start()
            same.started.wait()
            os.sched_setaffinity(threading.get_native_id(), {cpus[0]})
            if same.error or ready != "ok":
                raise Refusal("crash", same.error or f"the consumer's process: {ready or 'ended'}")
            for kind in order():
                times[kind].append(measured(kind, same, other))
            if same.error:
                raise Refusal("crash", same.error)
        finally:
            other.end()
            same.end()
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    for kind, seconds in medians.items():
        channel.metric(f"unit_{kind}_s", seconds, "s", phase="gil")
    channel.metric("gil_slowdown", medians["same"] / medians["other"] - 1, "1", phase="gil")
    channel.metric("gil_slowdown_alone", medians["same"] / medians["alone"] - 1, "1", phase="gil")
    channel.metric("gil_batches", same.batches, "1", phase="gil")


def order() -> Iterator[str]:
    """Each kind WINDOWS times, in turning order."""
    kinds = ("alone", "same", "other")
    for index in range(WINDOWS):
        yield from (kinds[(index + shift) % 3] for shift in range(3))


def measured(kind: str, same: Consumer, other: Other) -> float:
    if kind == "same":
        same.go.set()
    elif kind == "other":
        other.tell("go")
    time.sleep(SETTLE_S)
    found = window()
    if kind == "same":
        same.go.clear()
    elif kind == "other":
        other.tell("rest")
    time.sleep(SETTLE_S)
    return found


def consume(path: str, cpu: int) -> None:
    """The other process: it does nothing but consume, when it is told to."""
    from bench.run.load_worker import make

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.sched_setaffinity(0, {cpu})
    consumer = Consumer(json.loads(Path(path).read_text()), make, cpu)
    consumer.start()
    for line in sys.stdin:
        word = line.strip()
        if word == "ready?":
            consumer.started.wait()
        elif word == "go":
            consumer.go.set()
        elif word == "rest":
            consumer.go.clear()
        elif word == "stop":
            consumer.end()
        out.write((consumer.error or "ok").replace("\n", " ") + "\n")
        if word == "stop":
            break


if __name__ == "__main__":
    consume(sys.argv[1], int(sys.argv[2]))
    os._exit(0)
