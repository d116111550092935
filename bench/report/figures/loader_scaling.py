"""What does each loader make of more cores? Tokens a second over cores, a panel a tokenizer and condition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Scaling over cores"
CAPTION = (
    "Tokens a second, with intervals, against the number of CPUs that the whole process tree, consumer "
    "included, is bound to. Both axes are logarithmic: a straight diagonal is perfect scaling."
)


def families(analysis: Analysis) -> list[list[CaseSummary]]:
    """Cases that differ by stack and cores alone, where at least two numbers of cores were measured."""
    found: dict[str, list[CaseSummary]] = {}
    for case in analysis.cases:
        if case.timed and "cores" in case.axes:
            rest = {k: v for k, v in case.axes.items() if k != "cores"}
            key = json.dumps([case.session, case.workload, rest], sort_keys=True, default=str)
            found.setdefault(key, []).append(case)
    return [cases for cases in found.values() if len({c.axes["cores"] for c in cases}) > 1]


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    groups = families(analysis)[: style.MOST_PANELS]
    if not groups:
        return None
    look = style.Look(analysis.cases)
    with style.style():
        figure, axes = style.panels([2.9] * len(groups), wide)
        for panel, cases in zip(axes, groups, strict=True):
            lines(panel, cases, look, wide)
            rest = {k: v for k, v in cases[0].axes.items() if k != "cores"}
            panel.set_title(words.plain(f"{cases[0].workload}, {words.conditions(rest)}", 76 if wide else 42))
    return figure


def lines(panel: Axes, cases: Sequence[CaseSummary], look: style.Look, wide: bool) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    by_arm: dict[str, list[CaseSummary]] = {}
    for case in cases:
        by_arm.setdefault(case.arm, []).append(case)
    cores = sorted({int(case.axes["cores"]) for case in cases})
    for arm, members in by_arm.items():
        members = sorted(members, key=lambda c: int(c.axes["cores"]))
        x, y = [c.axes["cores"] for c in members], [c.tokens_per_s.estimate or 0.0 for c in members]
        colour = look.colour(members[0].stack)
        panel.plot(x, y, marker=look.marker(members[0].stack), color=colour, linewidth=1.4, markersize=5)
        for case in members:
            rate = case.tokens_per_s
            if rate.low is not None and rate.high is not None:
                panel.plot([case.axes["cores"]] * 2, [rate.low, rate.high], color=colour, linewidth=2.4)
        panel.annotate(style.label(arm, wide), (x[-1], y[-1]), (7, 0), textcoords="offset points",
                       va="center", fontsize=8, color=colour)  # fmt: skip
    panel.set_xticks(cores, [str(n) for n in cores])
    panel.set_xlim(cores[0] / 1.08, cores[-1] * (1.5 if wide else 1.9))
    panel.minorticks_off()
    panel.grid(axis="y")
    panel.yaxis.set_major_formatter(lambda value, _: style.tick(value))
    panel.set_xlabel("cores")
    panel.set_ylabel("tokens a second")


def alt(analysis: Analysis) -> str:
    shown = [
        f"{c.axes['tokenizer']} tokenizer {c.arm}, {words.axis('cores', c.axes['cores'])}: "
        f"{words.short(c.tokens_per_s.estimate)}"
        for cases in families(analysis)
        for c in cases
    ]
    return "Tokens a second by cores: " + "; ".join(words.plain(s, 120) for s in shown[:40])
