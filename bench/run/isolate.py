"""One worker process: started bound and alone, read until it ends, ended with everything it started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench import protocol
from bench.run import scrub

LAUNCH = Path(__file__).with_name("launch.py")
LONGEST_LINE = 1 << 20
LONGEST_LOG = 1 << 22
LONGEST_REASON = 1000
MOST_MESSAGES = 1 << 25  # bytes of messages: a worker that writes more is ended
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

stopping = threading.Event()  # set to end every worker of this process, whatever thread waits for it
_active: set[int] = set()  # workers of this process that are running
_spawning = threading.Lock()
_reaper = False  # whether orphans come to this process
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


class Watch(Protocol):
    """Someone who looks at a worker from outside while it runs."""

    def begin(self, pid: int) -> None: ...

    def end(self) -> list[dict[str, Any]]: ...


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
    watch: Watch | None = None,
) -> Outcome:  # fmt: skip
    """Runs a worker in a session of its own until it ends or `timeout_s` have passed.

    `watch` is told the worker's process id, and gives messages of its own once the worker has ended.

    Messages are appended to `messages.jsonl` and everything else to `log.txt` as they come, so that nothing
    measured is lost with the worker. Whatever the worker started is killed when this returns or raises.
    """
    binding = ",".join(map(str, cpus)) or "-"
    command = [sys.executable, "-I", "-S", str(LAUNCH), binding, str(os.getpid()), "--", *argv]
    kills = oom_kills()
    start = time.monotonic()
    reader = Reader(directory / "messages.jsonl", scrubber, on_message)
    try:
        with (directory / "stderr.txt").open("wb") as stderr, _spawning:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=dict(env),
                start_new_session=True,
            )  # fmt: skip
            _active.add(process.pid)
        try:
            if watch is not None:
                watch.begin(process.pid)
            late = reader.read(process, start + timeout_s)
        finally:
            end_group(process)
        wall = time.monotonic() - start
        for message in watch.end() if watch is not None else ():
            reader.line(json.dumps(message))
    finally:
        reader.close()
        log = write_log(directory, scrubber, reader.other)
    status, reason = judge(reader, process.returncode, late, timeout_s, oom_kills() > kills, log)
    return Outcome(
        status=status, reason=scrubber.text(one_line(reason)), messages=reader.messages,
        exit=process.returncode, wall_s=wall,
    )  # fmt: skip


def one_line(text: str) -> str:
    """A reason as one line of bounded length that a terminal can show."""
    clean = "".join(c if c.isprintable() else " " for c in text[: 8 * LONGEST_REASON])
    return " ".join(clean.split())[:LONGEST_REASON]


class Reader:
    """Splits a worker's standard output into messages and other text; hostile lines stay bounded."""

    def __init__(
        self, path: Path, scrubber: Scrubber, on_message: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self.file = path.open("w", buffering=1)
        self.scrubber, self.on_message = scrubber, on_message
        self.messages: list[dict[str, Any]] = []
        self.other: list[str] = []
        self.wrong = ""  # the first malformed message, or why no more are taken
        self.rest = bytearray()
        self.cut = False  # in the tail of a line that was too long: it is no line of its own
        self.taken = self.kept = 0  # bytes of messages, characters of other text

    def read(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Until it ends, the deadline, or too much output; True if the deadline came first.

        Raises KeyboardInterrupt once `stopping` is set: a signal reaches the main thread alone.
        """
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        os.set_blocking(pipe, False)
        open_ = True
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not self.full:
                left = deadline - time.monotonic()
                if stopping.is_set():
                    raise KeyboardInterrupt
                if left <= 0:
                    return True
                ended = process.poll() is not None  # a grandchild may hold the pipe open for longer
                if not open_:
                    time.sleep(0 if ended else min(left, 0.01))
                elif ended or selector.select(min(left, 0.25)):
                    open_ = self.take(pipe)
                if ended:
                    return False
        return False

    def take(self, pipe: int) -> bool:
        """Reads what is there, up to one pipe's worth. False at the end of file."""
        for _ in range(16):
            try:
                data = os.read(pipe, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.feed(data)
        return True

    def feed(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            self.extend(line)
            self.end_line()
        self.extend(rest)

    def extend(self, part: bytes) -> None:
        """More of the current line; of a line that is too long its head goes to the log, the tail nowhere."""
        if self.cut:
            return
        self.rest += part
        if len(self.rest) > LONGEST_LINE:
            self.keep(self.rest[:LONGEST_LINE].decode(errors="replace"))
            self.cut = True

    def end_line(self) -> None:
        line = bytes(self.rest.strip()) if not self.cut else b""
        self.cut = False
        self.rest.clear()
        if line:
            self.line(line.decode(errors="replace"))

    def line(self, line: str) -> None:
        try:
            message = json.loads(line)
            if not (isinstance(message, dict) and message.get("type") in protocol.MESSAGE_TYPES):
                return self.keep(line)
            message = self.scrubber.value(message)
            problem, text = protocol.problem(message), json.dumps(message)
        except (ValueError, RecursionError):
            return self.keep(line)
        if problem:
            self.wrong = self.wrong or f"malformed message: {problem}"
            return self.keep(line)
        self.taken += len(text)
        if self.full:
            self.wrong = f"more than {MOST_MESSAGES >> 20} MiB of messages"
            return None
        self.messages.append(message)
        self.file.write(text + "\n")
        if self.on_message:
            self.on_message(message)
        return None

    @property
    def full(self) -> bool:
        return self.taken > MOST_MESSAGES

    def keep(self, line: str) -> None:
        if self.kept < LONGEST_LOG:
            self.other.append(line[: LONGEST_LOG - self.kept])
            self.kept += len(line) + 1

    def close(self) -> None:
        """The last line needs no newline."""
        try:
            self.end_line()
        finally:
            self.file.close()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the worker's process group, reaps the worker, then what left the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    with _spawning:
        _active.discard(process.pid)
        reap_orphans()


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with(parent: int) -> None:
    """SIGTERM for this process when its parent ends, or now if it has ended."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if sys.platform == "linux" and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def become_subreaper() -> None:
    """Descendants whose parents died come to this process, so that none outlives its observation."""
    global _reaper
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    _reaper = sys.platform == "linux"


def reap_orphans() -> None:
    """Kills and reaps every child of this process that is no running worker; their children come next."""
    while _reaper:
        lists = Path("/proc/self/task").glob("*/children")
        try:
            children = {int(pid) for path in lists for pid in path.read_text().split()} - _active
        except OSError:
            return
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


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
    if reader.full:
        return protocol.STATUS_FAILED, f"crash: {reader.wrong}"
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
    if reader.wrong:
        return protocol.STATUS_FAILED, f"crash: {reader.wrong}"
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
