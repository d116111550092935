"""One worker process: started bound and alone, read until it ends, ended with everything it started."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import protocol
from bench.run import scrub

LAUNCH = Path(__file__).with_name("launch.py")
LONGEST_LINE = 1 << 20
LONGEST_LOG = 1 << 22
PASSED_ON = (  # names a worker may inherit: what finds programs and libraries, and the user's device choice
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CXX",
    "CC", "XDG_CACHE_HOME",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Scrubber:
    """Rewrites what names this machine or its people, in text and in messages."""

    repository: Path
    who: scrub.Identity

    @classmethod
    def here(cls, repository: Path) -> Scrubber:
        return cls(repository, scrub.identity(repository))

    def text(self, text: str) -> str:
        return scrub.scrub(text, self.repository, self.who)

    def value(self, value: dict[str, Any]) -> dict[str, Any]:
        clean: dict[str, Any] = scrub.scrub_values(value, self.repository, self.who)
        return clean


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a worker ended. `status` is `ok`, `failed` or `skipped`; `reason` says why it is not ok."""

    status: str
    reason: str
    messages: list[dict[str, Any]]
    exit: int
    wall_s: float


def environment(variables: Mapping[str, str], flags: Mapping[str, str], threads: int) -> dict[str, str]:
    """A worker's whole environment: a short list passed on, the user's performance flags, thread counts,
    and last what stack and arm ask for. No other variable of this process reaches a worker."""
    count = str(threads)
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        **dict.fromkeys(pools, count),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **flags,
        **variables,
    }


def run(
    argv: Sequence[str], *, directory: Path, env: Mapping[str, str], cpus: Sequence[int], timeout_s: float,
    scrubber: Scrubber, on_message: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:  # fmt: skip
    """Runs a worker in a session of its own until it ends or `timeout_s` have passed.

    Messages are appended to `messages.jsonl` and everything else to `log.txt` as they come, so that nothing
    measured is lost with the worker. Whatever the worker started is killed when this returns or raises.
    """
    binding = ",".join(map(str, cpus)) or "-"
    command = [sys.executable, "-I", "-S", str(LAUNCH), binding, str(os.getpid()), "--", *argv]
    kills = oom_kills()
    start = time.monotonic()
    with (directory / "stderr.txt").open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=dict(env),
            start_new_session=True,
        )  # fmt: skip
        reader = Reader(directory / "messages.jsonl", scrubber, on_message)
        try:
            late = reader.read(process, start + timeout_s)
        finally:
            end_group(process)
            reader.close()
    wall = time.monotonic() - start
    log = write_log(directory, scrubber, reader.other)
    status, reason = judge(reader, process.returncode, late, timeout_s, oom_kills() > kills, log)
    return Outcome(
        status=status, reason=scrubber.text(reason), messages=reader.messages, exit=process.returncode,
        wall_s=wall,
    )  # fmt: skip


class Reader:
    """Splits a worker's standard output into messages and other text; hostile lines stay bounded."""

    def __init__(
        self, path: Path, scrubber: Scrubber, on_message: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self.file = path.open("w", buffering=1)
        self.scrubber, self.on_message = scrubber, on_message
        self.messages: list[dict[str, Any]] = []
        self.other: list[str] = []
        self.rest = b""

    def read(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Until end of file or the deadline; True if the deadline came first."""
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return True
                if selector.select(min(left, 1.0)):
                    data = os.read(process.stdout.fileno(), 1 << 16)
                    if not data:
                        return self.finish(process, deadline)
                    self.feed(data)
                elif process.poll() is not None:  # a grandchild may hold the pipe open
                    return False

    def finish(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        self.feed(b"\n")
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return True
        return False

    def feed(self, data: bytes) -> None:
        self.rest += data
        *lines, self.rest = self.rest.split(b"\n")
        if len(self.rest) > LONGEST_LINE:
            lines, self.rest = [*lines, self.rest[:LONGEST_LINE]], b""
        for line in lines:
            if line.strip():
                self.line(line.decode(errors="replace"))

    def line(self, line: str) -> None:
        try:
            message = json.loads(line)
            known = isinstance(message, dict) and message.get("type") in protocol.MESSAGE_TYPES
        except (ValueError, RecursionError):
            known = False
        if not known:
            if len(self.other) < 10_000:
                self.other.append(line)
            return
        message = self.scrubber.value(message)
        self.messages.append(message)
        self.file.write(json.dumps(message) + "\n")
        if self.on_message:
            self.on_message(message)

    def close(self) -> None:
        self.file.close()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the worker's process group and reaps the worker."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def write_log(directory: Path, scrubber: Scrubber, other: Sequence[str]) -> str:
    """The worker's standard error, and what it printed beside messages, without the machine in it."""
    raw = directory / "stderr.txt"
    with raw.open("rb") as file:
        size = raw.stat().st_size
        file.seek(max(0, size - LONGEST_LOG))
        text = file.read().decode(errors="replace")
    if other:
        text += "\n--- printed to standard output, no message of the protocol ---\n" + "\n".join(other)
    text = scrubber.text(text)
    (directory / "log.txt").write_text(text)
    raw.unlink()
    return text


def judge(
    reader: Reader, code: int, late: bool, timeout_s: float, out_of_memory: bool, log: str
) -> tuple[str, str]:
    """Status and reason from what the worker said and how it ended."""
    errors = [m for m in reader.messages if m["type"] == "error"]
    if errors:
        kind, message = str(errors[0].get("kind")), str(errors[0].get("message"))
        skipped = kind == "unsupported"
        return (protocol.STATUS_SKIPPED if skipped else protocol.STATUS_FAILED), f"{kind}: {message}"
    if late:
        return protocol.STATUS_FAILED, f"timeout: no end after {timeout_s:g} s"
    if code < 0:
        name = signal.Signals(-code).name
        cause = "out of memory: the kernel killed it" if out_of_memory else f"killed by {name}"
        return protocol.STATUS_FAILED, cause
    if code != 0:
        last = [line for line in log.splitlines() if line.strip()][-1:]
        return protocol.STATUS_FAILED, f"crash: exit code {code}" + (f": {last[0][:500]}" if last else "")
    if not any(m["type"] == "done" for m in reader.messages):
        return protocol.STATUS_FAILED, "crash: ended without saying `done`"
    return protocol.STATUS_OK, ""


def oom_kills() -> int:
    """Processes the kernel has killed for memory so far, on this machine or in this cgroup; 0 if unknown."""
    for path, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        try:
            for line in Path(path).read_text().splitlines():
                if line.startswith(f"{key} "):
                    return int(line.split()[1])
        except (OSError, ValueError):
            continue
    return 0
