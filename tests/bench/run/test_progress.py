"""The bar counts what is left; lines of a gate or a round may be anything."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from bench.run import progress

END = {"event": "end", "case_id": "c", "status": "ok", "reason": "", "wall_s": 1.5, "role": ""}


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> progress.Progress:
    """Two groups; every look at the clock is ten seconds later than the one before."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    estimate = SimpleNamespace(gate_s=30.0, observation_s=5.0)
    monkeypatch.setattr(progress.planning, "estimate", lambda *_: estimate)
    bar = progress.Progress({})
    plan: Any = SimpleNamespace(groups={"a": ["x", "y"], "b": ["z"]})
    bar.begin(tasks_total=6, plan=plan, counts={"gate": 2, "round": 4})
    return bar


def test_time_left_comes_from_the_plan_then_from_what_was_seen(bar: progress.Progress) -> None:
    assert bar.expected("gate", "a") == 60 and bar.expected("round", "b") == 5
    assert bar.left == {"gate": 2, "round": 4, "details": 0}
    assert bar.seconds_left() == 2 * (60 + 30) / 2 + 4 * (10 + 5) / 2
    bar.advance("gate", "a")
    assert bar.seconds_left() == 1 * 10 + 4 * 7.5
    for _ in range(4):
        bar.advance("round", "a")
    bar.advance("gate", "b")
    assert bar.seconds_left() == 0
    bar.advance("gate", "b")  # more than planned: never negative
    assert bar.left == {"gate": 0, "round": 0, "details": 0}


def test_plain_lines_without_a_terminal(bar: progress.Progress, capsys: pytest.CaptureFixture[str]) -> None:
    bar.event({"event": "start", "case_id": "c", "round": 0})
    bar.event({"event": "start", "case_id": "c", "gate": "timed shape"})
    bar.event(END)
    bar.event({**END, "status": "failed", "reason": "crash: [red]x[/]", "wall_s": None})
    bar.event({"event": "disk", "reason": "No space left on device"})
    bar.say("input of c")
    bar.advance("round", "a")
    said = capsys.readouterr().err
    assert "c  timed  ok  1.5 s\n" in said
    assert "crash: [red]x[/]" in said and "No space left" in said and "input of c" in said
    assert bar.failed == 1
    bar.end()


@pytest.mark.parametrize("message", [{}, {"event": "end"}, {"event": "start"}, {"event": 7}, [], 3, None])
def test_any_line_is_taken(bar: progress.Progress, message: Any) -> None:
    bar.event(message)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.Progress({}, quiet=True)
    bar.begin(tasks_total=1, plan=SimpleNamespace(groups={"a": []}))  # type: ignore[arg-type]
    bar.event({**END, "status": "failed", "reason": "r"})
    bar.say("x")
    bar.advance("round", "a")
    bar.end()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    bar = progress.Progress({})
    screen = io.StringIO()
    bar.console, bar.live = Console(file=screen, force_terminal=True, width=100), True
    bar.begin(tasks_total=2, plan=SimpleNamespace(groups={"a": []}))  # type: ignore[arg-type]
    bar.event({"event": "start", "case_id": "gpt-tiny.b8", "round": 2})
    bar.event({**END, "status": "failed", "reason": "crash: [bold]"})
    bar.advance("round", "a")
    bar.end()
    assert "1/2" in screen.getvalue() and "gpt-tiny.b8, round 3" in screen.getvalue()
    assert "crash: [bold]" in screen.getvalue()
