"""The bar of a run: current case, counts, time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from bench import plan as planning

DETAILS = 2.5  # observations' worth of time of what is observed apart, a case
KINDS = ("gate", "round", "details")  # of tasks


class Progress:
    """Counts finished gates and rounds; time left comes from the durations seen, else from the plan."""

    def __init__(self, history: Mapping[str, Mapping[str, float]], *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.history, self.quiet = history, quiet
        self.live = self.console.is_terminal and not quiet
        self.bar: Any = None
        self.task: Any = None
        self.plan: planning.Plan | None = None
        self.seen: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.left = dict.fromkeys(KINDS, 0)
        self.failed = 0
        self.last = time.monotonic()

    # ------------------------------------------------------------------------------------- expectations
    def expected(self, kind: str, group: str) -> float:
        """Seconds that the next gate or round of a group should take."""
        if self.plan is None:
            return 0.0
        cases = self.plan.groups[group]
        estimates = [planning.estimate(c, self.plan, self.history) for c in cases]
        if kind == "details":
            return sum(DETAILS * e.observation_s for e in estimates)
        return sum(e.gate_s if kind == "gate" else e.observation_s for e in estimates)

    def seconds_left(self) -> float | None:
        total = 0.0
        for kind, count in self.left.items():
            if count and not self.seen[kind]:
                if self.plan is None:
                    return None
                groups = list(self.plan.groups)
                total += count * sum(self.expected(kind, g) for g in groups) / len(groups)
            elif count:
                total += count * sum(self.seen[kind]) / len(self.seen[kind])
        return total

    # ------------------------------------------------------------------------------------------- display
    def begin(
        self, *, tasks_total: int, plan: planning.Plan, counts: Mapping[str, int] | None = None
    ) -> None:
        self.plan = plan
        self.left = {kind: (counts or {"round": tasks_total}).get(kind, 0) for kind in KINDS}
        self.last = time.monotonic()
        if not self.live:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", table_column=None),
            console=self.console,
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task("starting", total=tasks_total, left="")

    def say(self, text: str) -> None:
        if self.live and self.bar is not None:
            self.bar.update(self.task, description=text)
        elif not self.live and not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def event(self, message: Any) -> None:
        """A line from a gate or round process: any JSON value, should something else print there."""
        if not isinstance(message, dict):
            return
        kind = message.get("event")
        if kind == "start":
            place = f"round {message['round'] + 1}" if "round" in message else f"gate: {message.get('gate')}"
            if self.live:
                self.say(f"{message.get('case_id')}, {place}")
        elif kind == "end":
            ok = message.get("status") == "ok"
            self.failed += not ok
            seconds = f"{message['wall_s']:.1f} s" if message.get("wall_s") is not None else ""
            what = message.get("role") or "timed"
            line = f"{message.get('case_id')}  {what}  {message.get('status')}  {seconds}"
            if not ok:
                line += f"  {message.get('reason')}"
            if not self.live or not ok:
                self.note(line)
        elif kind == "note":
            self.note(str(message.get("text")))
        elif kind == "disk":
            self.note(f"the disk refuses to take more: {message.get('reason')}")

    def note(self, line: str) -> None:
        if self.quiet:
            return
        if self.live:
            self.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def advance(self, kind: str, group: str) -> None:
        now = time.monotonic()
        self.seen[kind].append(now - self.last)
        self.last = now
        self.left[kind] = max(0, self.left[kind] - 1)
        left = self.seconds_left()
        text = (
            "" if left is None else f"about {left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"
        )
        if self.live and self.bar is not None:
            self.bar.update(self.task, advance=1, left=text)
        elif not self.quiet:
            print(f"{kind} of {group} done; {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
