"""A worker's process: what it inherits, how it is read, how it ends, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import protocol
from bench.run import isolate
from tests.fixtures.runs import PATIENCE_S, alive, until

SCRUBBER = isolate.Scrubber.here(Path(__file__).parents[3])
DONE = 'print(json.dumps({"type": "done"}), flush=True)'


def run(
    directory: Path, code: str, *, env: dict[str, str] | None = None, cpus: Sequence[int] = (),
    timeout_s: float = PATIENCE_S,
) -> isolate.Outcome:  # fmt: skip
    argv = [sys.executable, "-I", "-c", f"import json, os, signal, sys, time\n{code}"]
    return isolate.run(
        argv, directory=directory, env=env or {}, cpus=cpus, timeout_s=timeout_s, scrubber=SCRUBBER
    )


# --------------------------------------------------------------------------------------------- reading
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
messages = st.one_of(
    st.fixed_dictionaries({"type": st.just("event"), "name": json_values}),
    st.just({"type": "done"}),
    st.fixed_dictionaries({"type": st.just("metric"), "metric": st.text(max_size=9), "value": st.none()}),
)
junk = st.binary(max_size=200).map(lambda data: data.replace(b"\n", b""))


def read(pieces: Sequence[bytes]) -> tuple[isolate.Reader, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "messages.jsonl")
        reader = isolate.Reader(path, SCRUBBER, None)
        for piece in pieces:
            reader.feed(piece)
        reader.close()
        return reader, path.read_text().splitlines()


@settings(deadline=None)
@given(data=st.data(), lines=st.lists(messages | junk, max_size=8), newline=st.booleans())
def test_arbitrary_bytes_in_arbitrary_pieces(data: Any, lines: list[Any], newline: bool) -> None:
    """No message among junk is lost, wherever the pipe cuts; nothing raises."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    stream = b"\n".join(raw) + (b"\n" if newline else b"")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    reader, stored = read(pieces)
    sent = [SCRUBBER.value(line) for line in lines if isinstance(line, dict)]
    found = [m for m in reader.messages if m in sent]
    assert found == sent
    assert [json.loads(line) for line in stored] == reader.messages
    assert all(m["type"] in protocol.MESSAGE_TYPES for m in reader.messages)
    assert read([stream])[0].messages == reader.messages


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_nothing_raises(pieces: list[bytes]) -> None:
    read(pieces)


def test_a_long_line_is_cut_and_hides_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "LONGEST_LINE", 50)
    done = b'{"type": "done"}'
    reader, _ = read([b"x" * 60, done, b"\n", done, b"\n", b"y" * 51 + done + b"\n"])
    assert reader.messages == [{"type": "done"}]
    assert reader.other == ["x" * 50, "y" * 50]


def test_junk_and_messages_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "LONGEST_LOG", 100)
    monkeypatch.setattr(isolate, "MOST_MESSAGES", 1000)
    reader, stored = read([b"junk junk\n" * 1000, b'{"type": "event", "name": "n"}\n' * 1000])
    assert sum(map(len, reader.other)) <= 100
    assert reader.full and "MiB of messages" in reader.wrong
    assert sum(map(len, stored)) <= 1000


@pytest.mark.parametrize(
    "line",
    ["[" * 900 + "]" * 900, '{"type": "event", "n": ' + "[" * 900 + "]" * 900 + "}",
     '{"type": "event", "n": ' + "[" * 90_000, '{"type": ["done"]}',
     '{"type": "event", "n": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_json_that_costs_too_much(line: str) -> None:
    reader, _ = read([line.encode() + b'\n{"type": "done"}\n'])
    assert reader.messages[-1] == {"type": "done"}


VALUE = {"type": "value", "index": 0, "warmup": False, "steps": 1, "wall_ns": 5, "device_ns": None,
         "loss": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, ""), ({"loss": None}, ""), ({"wall_ns": 5.5}, ""), ({"device_ns": 7}, ""),
        ({"wall_ns": float("nan")}, "wall_ns"), ({"wall_ns": 0}, "wall_ns"), ({"wall_ns": "5"}, "wall_ns"),
        ({"wall_ns": True}, "wall_ns"), ({"wall_ns": 10**400}, "wall_ns"), ({"steps": 0}, "steps"),
        ({"steps": 1.0}, "steps"), ({"warmup": 1}, "warmup"), ({"index": -1}, "index"),
        ({"index": None}, "index"), ({"loss": float("inf")}, "loss"), ({"device_ns": -1}, "device_ns"),
        ({"type": "compiled"}, "first_step_s"), ({"type": "manifest"}, "facts"),
        ({"type": "manifest", "facts": {"a": [1]}}, "facts"), ({"type": "manifest", "facts": {"a": 1}}, ""),
        ({"type": "metric", "metric": "m", "value": None}, ""), ({"type": "metric", "metric": 3}, "metric"),
        ({"type": "metric", "metric": "m", "value": float("nan")}, "value"),
        ({"type": "metric", "metric": "step_s", "value": 0, "phase": "calibration"}, "value"),
        ({"type": "metric", "metric": "step_s", "value": None, "phase": "calibration"}, "value"),
        ({"type": "metric", "metric": "step_s", "value": 1e-3, "phase": "calibration"}, ""),
    ],
)  # fmt: skip
def test_what_a_message_must_hold(changed: dict[str, Any], wrong: str) -> None:
    problem = protocol.problem({**VALUE, **changed})
    assert (f": {wrong} = " in problem) if wrong else problem == ""


@given(st.dictionaries(st.sampled_from([*VALUE, "facts", "metric", "value", "phase"]), json_values))
def test_any_message_is_judged(fields: dict[str, Any]) -> None:
    for type_ in protocol.MESSAGE_TYPES:
        assert isinstance(protocol.problem({**fields, "type": type_}), str)


@given(st.text())
def test_a_reason_is_one_line(text: str) -> None:
    line = isolate.one_line(text)
    assert line.isprintable() and len(line) <= isolate.LONGEST_REASON
    assert isolate.one_line(line) == line


# -------------------------------------------------------------------------------------------- processes
def test_a_worker_inherits_what_is_listed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    env = isolate.environment({"OMP_NUM_THREADS": "9", "MINE": "1"}, {"XLA_FLAGS": "--x"}, 3)
    assert env["OMP_NUM_THREADS"] == "9" and env["MKL_NUM_THREADS"] == "3"
    assert env["XLA_FLAGS"] == "--x" and "SECRET_TOKEN" not in env
    code = f'print(json.dumps({{"type": "event", "name": dict(os.environ)}}), flush=True)\n{DONE}'
    outcome = run(tmp_path, code, env=env)
    assert outcome.status == "ok"
    assert set(outcome.messages[0]["name"]) - {"LC_CTYPE"} == set(env)


def test_a_worker_is_bound_alone_and_leads_a_session(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    code = (
        "found = [sorted(os.sched_getaffinity(0)), os.getsid(0) == os.getpid(), sys.stdin.read()]\n"
        f'print(json.dumps({{"type": "event", "name": found}}), flush=True)\n{DONE}'
    )
    outcome = run(tmp_path, code, cpus=[cpu])
    assert outcome.messages[0]["name"] == [[cpu], True, ""]


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (DONE, "ok", ""),
        ('sys.stdout.write(\'{"type": "done"}\')', "ok", ""),  # without a newline
        ("", "failed", "crash: ended without saying `done`"),
        (f"{DONE}\nsys.exit(7)", "failed", "crash: exit code 7"),
        (f"{DONE}\nos.abort()", "failed", "killed by SIGABRT"),
        ("sys.exit('no such\\nthing')", "failed", "crash: exit code 1: thing"),
        ("os.close(1)\ntime.sleep(0.05)\nsys.exit(3)", "failed", "crash: exit code 3"),
        (f'{DONE}\nprint(\'{{"type": "value"}}\')', "failed", "crash: malformed message: value: index"),
        ('print(\'{"type": "error", "kind": "not steady", "message": "m"}\')\nsys.exit(1)', "failed",
         "not steady: m"),
        ('print(\'{"type": "error", "kind": "unsupported", "message": "m"}\')\nsys.exit(1)', "skipped",
         "unsupported: m"),
    ],
)  # fmt: skip
def test_how_a_worker_ends(tmp_path: Path, code: str, status: str, reason: str) -> None:
    outcome = run(tmp_path, code)
    assert outcome.status == status
    assert outcome.reason.startswith(reason) and bool(outcome.reason) == bool(reason)


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    outcome = isolate.run(
        ["no-such-program"], directory=tmp_path, env={}, cpus=[], timeout_s=PATIENCE_S, scrubber=SCRUBBER
    )
    assert outcome.reason == "crash: exit code 1: cannot run no-such-program: No such file or directory"


def test_a_worker_that_never_ends(tmp_path: Path) -> None:
    """It ignores every signal that can be ignored; what it had said and logged is kept."""
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        'print(json.dumps({"type": "event", "name": "x"}), "tail", sep="\\n", end="", flush=True)\n'
        "print('working', file=sys.stderr, flush=True)\n"
        "while True: time.sleep(9)"
    )
    outcome = run(tmp_path, code, env={"TMPDIR": str(tmp_path)}, timeout_s=1.5)
    assert (outcome.status, outcome.reason) == ("failed", "timeout: no end after 1.5 s")
    assert outcome.exit == -signal.SIGKILL
    assert alive(tmp_path) == []
    if outcome.messages:  # on a busy machine the interpreter may not have come that far
        assert "tail" in (tmp_path / "log.txt").read_text()


def test_the_log_is_clean(tmp_path: Path) -> None:
    code = f"print({str(tmp_path)!r}, file=sys.stderr)\nprint({str(Path.home())!r})\nsys.exit(1)"
    outcome = run(tmp_path, code)
    log = (tmp_path / "log.txt").read_text()
    assert str(tmp_path) not in log and "no message of the protocol" in log
    assert str(tmp_path) not in outcome.reason
    assert not (tmp_path / "stderr.txt").exists()


def test_descendants_in_the_group_end_with_it(tmp_path: Path) -> None:
    code = (
        f"if os.fork() == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(600)\n{DONE}"
    )
    outcome = run(tmp_path, code, env={"TMPDIR": str(tmp_path)})
    assert outcome.status == "ok"
    until(lambda: not alive(tmp_path), "the child in the group ends")


def test_stopping_ends_workers_of_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal interrupts the main thread alone; its log is clean all the same."""
    monkeypatch.setattr(isolate, "stopping", threading.Event())
    seen: list[BaseException] = []

    code = f"open({str(tmp_path / 'up')!r}, 'w')\ntime.sleep(600)"

    def observe() -> None:
        try:
            run(tmp_path, code, env={"TMPDIR": str(tmp_path)})
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=observe)
    thread.start()
    until((tmp_path / "up").exists, "the worker starts")
    isolate.stopping.set()
    thread.join(PATIENCE_S)
    assert [type(error) for error in seen] == [KeyboardInterrupt]
    assert alive(tmp_path) == []
    assert (tmp_path / "log.txt").exists() and not (tmp_path / "stderr.txt").exists()


PARENT = """
import sys
from pathlib import Path
from bench.run import isolate
isolate.become_subreaper()
outcome = isolate.run(
    [sys.executable, "-I", "-c", sys.argv[2]], directory=Path(sys.argv[1]), env={"TMPDIR": sys.argv[1]},
    cpus=[], timeout_s=100, scrubber=isolate.Scrubber.here(Path("/")),
)
print(outcome.status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="subreapers are Linux's")
def test_a_subreaper_ends_what_left_the_group(tmp_path: Path) -> None:
    """A daemon: forked twice, in a session of its own, holding the pipe."""
    daemon = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(600)\n"
        """print('{"type": "done"}', flush=True)"""
    )
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path), daemon], capture_output=True, text=True,
        cwd=Path(__file__).parents[3], timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ok", done.stderr
    assert alive(tmp_path) == []
