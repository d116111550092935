"""A process and everything it started: their memory and CPU time, and the page cache of files. Linux only.

Standard library alone: a worker in any environment imports this.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
SAMPLE_S = 0.1  # between two looks at the memory of a tree, at least …
SAMPLE_SHARE = 0.02  # … and so rarely that looking takes no larger share of one CPU
PAGE = mmap.PAGESIZE


def members(root: int) -> list[int]:
    """The process and its descendants that are alive."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    todo += [int(child) for child in path.read_text().split()]
    return found


def pss_bytes(root: int) -> int:
    """Proportional set size of a tree: what its processes share is counted once. 0 where it has ended."""
    total = 0
    for pid in members(root):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += 1024 * int(text.partition("\nPss:")[2].split()[0])
    return total


def cpu_s(root: int) -> float:
    """CPU seconds, user and system, of a tree: of those alive, and of the children each has waited for."""
    ticks = 0
    for pid in members(root):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / TICKS


def library_threads_cpu_s() -> float:
    """CPU seconds so far of this process's threads that Python did not start: pools of libraries."""
    python = {thread.native_id for thread in threading.enumerate()}
    ticks = 0
    for place in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(place.name) not in python:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


class Sampler:
    """The peak of a tree's memory, from a thread of this process: the tree itself does nothing for it."""

    def __init__(self) -> None:
        self.peak = self.samples = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, pid: int) -> None:
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def _sample(self, pid: int) -> None:
        pause = SAMPLE_S
        while not self._stop.wait(pause):
            begin = time.thread_time()
            self.peak = max(self.peak, pss_bytes(pid))
            self.samples += 1
            pause = max(SAMPLE_S, (time.thread_time() - begin) / SAMPLE_SHARE)

    def end(self) -> list[dict[str, Any]]:
        self.stop()
        row = {"type": "metric", "metric": "pss_bytes", "value": self.peak or None, "unit": "bytes",
               "phase": "tree", "source": "measured", "censored": False}  # fmt: skip
        return [row]

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


# -------------------------------------------------------------------------------------------- the page cache
def files_in(places: Iterable[Path]) -> list[Path]:
    """Regular files, those of directories included."""
    found: list[Path] = []
    for place in places:
        found += [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [place]
    return [p for p in found if p.is_file() and p.stat().st_size]


def warm(paths: Iterable[Path]) -> None:
    """Reads files, so that they are in the page cache."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(paths: Iterable[Path]) -> None:
    """Asks the kernel to forget the pages of files; dirty ones are written first."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_share(paths: Iterable[Path]) -> float | None:
    """Share of the pages of files that are in memory (mincore); None where the kernel does not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    pages = inside = 0
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE,
                                                flags=mmap.MAP_PRIVATE) as view:  # fmt: skip
            count = -(-size // PAGE)
            flags = ctypes.create_string_buffer(count)
            address = ctypes.c_char.from_buffer(view)
            code = libc.mincore(ctypes.addressof(address), size, flags)
            del address  # the view cannot be closed while it is exported
            if code != 0:
                return None
            pages += count
            inside += sum(byte & 1 for byte in flags.raw[:count])
    return inside / pages if pages else None
