"""What a value is: where it starts and ends, what is waited for, when warm-up is over; on a fake clock."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import protocol
from bench.run import worker
from tests.fixtures.runs import PATIENCE_S

RULE = {"seconds": 1.0, "max_seconds": 8.0, "trend": 0.01, "window": 3}


class Machine:
    """A trainer and the clock of its machine: a step is enqueued at once and takes `step_ns` to finish.

    `calls` holds steps by number, "wait" and "loss", in order.
    """

    def __init__(self, durations: Iterator[int]) -> None:
        self.durations, self.now, self.busy_until = durations, 0, 0
        self.calls: list[Any] = []
        self.losses: Iterator[float] = iter(lambda: 1.5, None)

    def perf_counter_ns(self) -> int:
        return self.now

    def step(self, index: int) -> None:
        self.calls.append(index)
        self.busy_until = max(self.busy_until, self.now) + next(self.durations)
        self.now += 1  # to enqueue it

    def wait(self) -> None:
        self.calls.append("wait")
        self.now = max(self.now, self.busy_until)

    def loss(self) -> float:
        self.calls.append("loss")
        return next(self.losses)


class Sent:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.start_ns = 0

    def send(self, type_: str, **fields: Any) -> None:
        self.messages.append({"type": type_, **fields})
        json.dumps(fields, allow_nan=False)


def forever(value: int) -> Iterator[int]:
    while True:
        yield value


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`on(durations)` is a machine with those step times in ns, whose clock the worker reads."""

    def install(durations: Iterator[int]) -> Machine:
        machine = Machine(durations)
        monkeypatch.setattr(worker.time, "perf_counter_ns", machine.perf_counter_ns)
        return machine

    return install


def clock_of(machine: Machine, *, steps: int, sync: str = "value", done: int = 1) -> tuple[Any, Sent]:
    channel = Sent()
    job = {"steps_per_value": steps, "axes": {"sync": sync}}
    return worker.Clock(machine, job, channel, done), channel  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("steps", [1, 5])
def test_a_value_enqueues_all_steps_and_waits_once(on: Any, steps: int) -> None:
    machine = on(forever(1000))
    wall = worker.timed_value(machine, steps, 7, every_step=False)
    assert machine.calls == [*range(7, 7 + steps), "wait"]
    assert wall == 1000 * steps  # to the end of the last step: not to the end of enqueuing


def test_every_step_is_waited_for_where_the_axis_says_so(on: Any) -> None:
    machine = on(forever(1000))
    wall = worker.timed_value(machine, 3, 0, every_step=True)
    assert machine.calls == [0, "wait", 1, "wait", 2, "wait", "wait"]
    assert wall == 3000


def test_batches_go_on_and_the_loss_is_read_outside_the_window(on: Any) -> None:
    machine = on(forever(10**9))
    clock, channel = clock_of(machine, steps=2)
    assert [clock.value(warmup=True), clock.value(warmup=False)] == [2.0, 2.0]
    assert machine.calls == [1, 2, "wait", "loss", 3, 4, "wait", "loss"]
    first = {"type": "value", "index": 0, "warmup": True, "steps": 2, "wall_ns": 2 * 10**9, "device_ns": None,
             "loss": 1.5}  # fmt: skip
    assert channel.messages == [first, {**first, "index": 1, "warmup": False}]
    assert [protocol.problem(m) for m in channel.messages] == ["", ""]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it(on: Any, loss: float) -> None:
    machine = on(forever(1000))
    machine.losses = iter([loss])
    clock, channel = clock_of(machine, steps=2)
    with pytest.raises(worker.Refusal, match="after 3 steps") as error:
        clock.value(warmup=True)
    assert error.value.kind == "crash" and channel.messages == []


# ----------------------------------------------------------------------------------------------- warm-up
numbers = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6)


@given(numbers)
def test_a_trend_goes_one_way(values: list[float]) -> None:
    trend = worker.trend(values)
    one_way = sorted(values) in (values, values[::-1]) and len(set(values)) == len(values)
    assert (trend > 0) == one_way
    assert trend == pytest.approx(worker.trend(values[::-1]))
    if one_way:
        assert trend == abs(values[-1] - values[0]) / statistics.median(values)


@pytest.mark.parametrize(
    ("values", "trend"),
    [([1.0, 1.0, 1.0], 0), ([1.0, 2.0, 1.5], 0), ([1.0, 1.0, 1.1], 0), ([3.0, 2.0, 1.0], 1.0),
     ([1.0, 3.0], 1.0)],
)  # fmt: skip
def test_trends(values: list[float], trend: float) -> None:
    assert worker.trend(values) == trend


def warm(on: Any, seconds: list[float], rule: dict[str, float] = RULE) -> list[float]:
    """The warm-up values of a machine whose values last `seconds`, the last one for ever; they were sent."""
    durations = iter([*(round(s * 1e9) for s in seconds), *([round(seconds[-1] * 1e9)] * 200)])
    clock, channel = clock_of(on(durations), steps=1)
    try:
        worker.warm_up(clock, rule)
    finally:
        walls = [m["wall_ns"] / 1e9 for m in channel.messages]
        assert all(m["warmup"] for m in channel.messages)
        assert [m["index"] for m in channel.messages] == list(range(len(walls)))
    return walls


def test_warm_up_lasts_the_seconds_that_were_asked_for(on: Any) -> None:
    assert warm(on, [0.25]) == [0.25] * 4


def test_warm_up_has_a_whole_window_however_long_a_value_is(on: Any) -> None:
    assert warm(on, [5.0]) == [5.0] * 3
    assert warm(on, [0.1], {**RULE, "seconds": 0}) == [0.1] * 3


def test_warm_up_goes_on_while_the_values_move(on: Any) -> None:
    assert warm(on, [1.0, 0.8, 0.6, 0.5, 0.5]) == [1.0, 0.8, 0.6, 0.5, 0.5]
    assert warm(on, [1.0, 1.004, 1.008]) == [1.0, 1.004, 1.008]  # less than the limit


def test_values_that_never_settle_are_refused(on: Any) -> None:
    with pytest.raises(worker.Refusal, match=r"limit 1%") as error:
        warm(on, [1.0 + 0.1 * i for i in range(20)])
    assert error.value.kind == "not steady"
    assert error.value.kind in protocol.ERROR_KINDS


@given(st.lists(st.floats(0.05, 2.0), min_size=1, max_size=30))
def test_warm_up_ends_settled_or_refuses(seconds: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def on(durations: Iterator[int]) -> Machine:
            machine = Machine(durations)
            patch.setattr(worker.time, "perf_counter_ns", machine.perf_counter_ns)
            return machine

        try:
            walls = warm(on, seconds)
        except worker.Refusal as refusal:
            assert refusal.kind == "not steady"
        else:
            assert sum(walls) >= RULE["seconds"] - 1e-9
            assert len(walls) >= 3
            assert worker.trend(walls[-3:]) <= RULE["trend"]


def test_the_first_step_is_timed_to_its_end(on: Any) -> None:
    machine, channel = on(forever(5 * 10**9)), Sent()
    machine.now = 10**9
    worker.first_step(machine, channel)  # type: ignore[arg-type]
    assert machine.calls == [0, "wait"]
    assert channel.messages == [{"type": "compiled", "first_step_s": 5.0, "build_s": 1.0}]


def test_calibration_tells_the_fastest_step(on: Any) -> None:
    machine = on(iter([9 * 10**8, *([10**8] * 1000)]))

    class Metrics(Sent):
        def metric(self, name: str, value: float, unit: str, **extra: Any) -> None:
            self.send("metric", metric=name, value=value, unit=unit, **extra)

    channel = Metrics()
    worker.calibrate(machine, 1.0, 4, channel)  # type: ignore[arg-type]
    assert machine.calls == [4, "wait", 5, 6, "wait"]
    (message,) = channel.messages
    assert message["value"] == pytest.approx(0.1) and message["phase"] == "calibration"


# ------------------------------------------------------------------------------------- jobs and the process
def test_batches_have_the_hash_that_was_planned(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    (tmp_path / "b").write_bytes(data.tobytes())
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    row = {"path": str(tmp_path / "b"), "sha256": digest, "shape": [2, 2, 3]}
    assert (worker.read_batches({"batches": row}) == data).all()
    with pytest.raises(worker.Refusal, match="hash") as error:
        worker.read_batches({"batches": {**row, "sha256": "0"}})
    assert error.value.kind == "bad job"


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (worker.Refusal("not steady", "m"), "not steady"), (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("shapes differ"), "crash"), (KeyError("x"), "crash"),
    ],
)  # fmt: skip
def test_what_an_error_is_called(error: BaseException, kind: str) -> None:
    assert worker.error_kind(error) == kind
    assert kind in protocol.ERROR_KINDS


def work(tmp_path: Path, job: dict[str, Any]) -> tuple[int, list[dict[str, Any]], str]:
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "bench.run.worker", str(tmp_path / "job.json")]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=PATIENCE_S, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


STACK = """
import os, resource
import numpy as np
print("a stack may print")
os.write(1, b"and so may what it calls")

class Trainer:
    def __init__(self, **arguments):
        resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
        np.ones(1 << 40, np.uint8)
"""


def test_a_stack_that_needs_too_much_memory(tmp_path: Path) -> None:
    """And whatever it prints is no message."""
    (tmp_path / "greedy.py").write_text(STACK)
    (tmp_path / "b").write_bytes(b"")
    batches = {"path": str(tmp_path / "b"), "sha256": hashlib.sha256(b"").hexdigest(), "shape": [0, 1, 3]}
    model = {"name": "m", "family": "gpt2", "layers": 0, "d_model": 2, "heads": 1, "vocab": 9, "sequence": 2,
             "batch": 1}  # fmt: skip
    job = {"kind": "timed", "stack": "greedy", "stack_file": str(tmp_path / "greedy.py"), "model": model,
           "axes": {}, "options": {}, "device": "cpu", "batches": batches, "seed": 0, "threads": 1,
           "parity": None}  # fmt: skip
    code, messages, log = work(tmp_path, job)
    assert code == 1
    assert [m["type"] for m in messages] == ["event", "error"]
    assert messages[-1]["kind"] == "out of memory"
    assert "a stack may print\nand so may what it calls" in log and "Traceback" in log


def test_a_job_that_is_none(tmp_path: Path) -> None:
    code, messages, _ = work(tmp_path, {"kind": "timed"})
    assert code == 1 and messages[-1]["type"] == "error" and messages[-1]["kind"] == "crash"
