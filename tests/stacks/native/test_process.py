"""The loader in a process: signals, forks, other threads, the end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HANG_S = 5  # what ends takes milliseconds; what does not, its time-out or for ever
WAIT = """
import sys, time, stackbench_native as native
url, tokenizer, what, corpus, out = sys.argv[1:]
keep = dict(timeout_s=30.0, retries=4)
print("ready", flush=True)
try:
    if what == "open":
        native.Loader(url.replace("a.jsonl", "hang.jsonl"), tokenizer, batch=4, sequence=31, **keep)
    elif what == "index":
        native.index(url.replace("a.jsonl", "hang.jsonl"), out)
    elif what == "tokenize":
        native.tokenize(url.replace("a.jsonl", "once.jsonl"), tokenizer, out)
    else:
        keep |= dict(batch=4, sequence=31, engine="hf", segment_bytes=2000)
        for batch in native.Loader(url, tokenizer, **keep):
            pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(3)
"""


@pytest.mark.parametrize("what", ["next", "open", "index", "tokenize"])
def test_ctrl_c_ends_a_wait(
    native: Any, hanging: str, corpus: Path, tokenizer: Path, tmp_path: Path, what: str
) -> None:
    command = [sys.executable, "-c", WAIT, hanging, str(tokenizer), what, str(corpus), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        begin = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        took = time.perf_counter() - begin
        assert process.wait(HANG_S) == 3
    assert took < HANG_S, f"{took:.3f} s to the exception"


def test_a_forked_child_is_refused(make: Callable[..., Any]) -> None:
    loader = make()
    next(loader)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for call in (lambda: next(loader), loader.stats, lambda: loader.load_state_dict(loader.state_dict())):
            try:
                call()
            except RuntimeError as error:
                said.append(str(error))
        loader.waiting()
        loader.close()
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    deadline = time.monotonic() + 10
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read().splitlines()
    assert len(said) == 3 and all("make one in each process" in line for line in said), said
    assert next(loader).tokens.shape == (4, 32), "the parent goes on"


def test_other_threads_run_while_one_waits(make: Callable[..., Any], hanging: str) -> None:
    loader = make(sources=hanging, timeout_s=0.6, retries=0)
    ticks = 0
    ended = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not ended.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    with pytest.raises(OSError, match=r"a\.jsonl"):
        for _ in loader:
            pass
    waited = time.perf_counter() - begin
    ended.set()
    thread.join()
    assert waited > 0.3 and ticks > 100 * waited, f"{ticks} ticks in {waited:.2f} s"


def test_closing_and_leaving(make: Callable[..., Any], hanging: str) -> None:
    with make(sources=hanging, timeout_s=30.0) as loader:
        next(loader)
        time.sleep(0.1)
        begin = time.perf_counter()
    assert time.perf_counter() - begin < HANG_S
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    assert loader.state_dict()["delivered"] == 1


def test_no_thread_is_left(make: Callable[..., Any]) -> None:
    def count() -> int:
        names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
        return sum(name.startswith("stackbench") for name in names)

    def wait_for(expected: int) -> None:
        deadline = time.monotonic() + 5  # a thread names itself when it first runs
        while count() != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert count() == expected

    gc.collect()
    before = count()
    loaders = [make(threads=3) for _ in range(5)]
    wait_for(before + 15)
    for loader in loaders:
        next(loader)
    del loader
    loaders.clear()
    wait_for(before)
