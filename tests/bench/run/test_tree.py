"""Memory and CPU time of a tree of processes, and the page cache of files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.run import tree
from tests.fixtures.runs import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and mincore")
CHILD = """
import subprocess, sys, time
data = bytearray(40_000_000)
for i in range(0, len(data), 4096):
    data[i] = 1
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
    child.wait()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_tree_is_its_processes_memory_and_time() -> None:
    sampler = tree.Sampler()
    worker = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", CHILD, worker], stdout=subprocess.PIPE)
    try:
        sampler.begin(process.pid)
        assert process.stdout is not None and process.stdout.readline()
        assert process.pid in tree.members(os.getpid()) and os.getpid() not in tree.members(process.pid)
        assert tree.pss_bytes(process.pid) > 38_000_000
        assert tree.cpu_s(process.pid) > 0.55, "the child that was waited for counts too"
        until(lambda: sampler.peak > 38_000_000, "the peak is seen")
    finally:
        process.kill()
        process.communicate()
    (row,) = sampler.end()
    assert row["metric"] == "pss_bytes" and row["value"] > 38_000_000
    assert tree.pss_bytes(process.pid) == 0 and tree.cpu_s(process.pid) == 0


def test_nothing_sampled_is_null() -> None:
    sampler = tree.Sampler()
    assert sampler.end()[0]["value"] is None


def test_threads_of_libraries_are_not_those_of_python() -> None:
    before, stop = tree.library_threads_cpu_s(), threading.Event()

    def spin() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
        stop.wait()

    thread = threading.Thread(target=spin)
    thread.start()
    time.sleep(0.3)
    assert tree.library_threads_cpu_s() - before < 0.15
    stop.set()
    thread.join()


def test_the_page_cache_of_files(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    (tmp_path / "empty").touch()
    files = tree.files_in([tmp_path])
    assert files == [path]
    tree.warm(files)
    assert tree.resident_share(files) == 1.0
    tree.drop(files)
    share = tree.resident_share(files)
    assert share is None or 0 <= share <= 1, "a file system in memory keeps its pages"
    assert tree.resident_share([]) is None
