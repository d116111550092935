"""How do step times scatter, within a process and between processes? Every value that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.ratios import groups
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Every measured value"
CAPTION = (
    "One row of marks a process, one mark a value (its wall time over its steps). Filled: timed; hollow: "
    "warm-up, kept but not counted; ›: a warm-up beyond the axis; vertical stroke: median of the process."
)
MOST_PROCESSES = 24
LOGARITHMIC = 5.0  # where the slowest value is so many times the fastest


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    chosen = [[c for c in members if c.processes] for members in groups(analysis.cases).values()]
    chosen = [members for members in chosen if members][: style.MOST_PANELS]
    if not chosen:
        return None
    look, titles = style.Look(analysis.cases), style.titles(analysis.cases, wide)
    with style.style():
        heights = [0.62 + sum(0.16 + 0.062 * shown(c) for c in members) for members in chosen]
        figure, axes = style.panels(heights, wide)
        for panel, members in zip(axes, chosen, strict=True):
            rows(panel, members, look, wide)
            panel.set_title(titles[members[0].session, members[0].group])
    return figure


def shown(case: CaseSummary) -> int:
    return min(len(case.processes), MOST_PROCESSES)


def limits(members: Sequence[CaseSummary]) -> tuple[float, float]:
    """All timed values, and a third of their range more for warm-ups."""
    series = [v for c in members for p in c.processes for v in p.values]
    timed = [1e3 * s for warmup, s in series if not warmup]
    room = max(0.35 * (max(timed) - min(timed)), 0.06 * max(timed))
    high = min(max(1e3 * s for _, s in series), max(timed) + room)
    low = max(min(1e3 * s for _, s in series), min(timed) - room)
    pad = 0.03 * (high - low) or 0.05 * high
    return max(0.9 * low, low - pad), high + pad


def rows(panel: Axes, members: Sequence[CaseSummary], look: style.Look, wide: bool) -> None:
    low, high = limits(members)
    y, ticks = 0.0, []
    for case in members:
        colour, marker = look.colour(case.stack), look.marker(case.stack)
        chosen = case.processes[:MOST_PROCESSES]
        lines = [y + i for i in range(len(chosen))]
        marks = [(1e3 * s, at, warm) for p, at in zip(chosen, lines, strict=True) for warm, s in p.values]
        near = [(x, at) for x, at, warm in marks if warm and low <= x <= high]
        far = sorted({at for x, at, warm in marks if warm and x > high})
        timed = [(x, at) for x, at, warm in marks if not warm]
        panel.plot([x for x, _ in near], [at for _, at in near], marker, markerfacecolor=style.PAPER,
                   markeredgecolor=colour, markersize=3, markeredgewidth=0.7, alpha=0.7)  # fmt: skip
        if far:  # an empty unclipped line would upset the layout
            panel.plot([high] * len(far), far, ">", color=colour, markersize=3.2, alpha=0.7, clip_on=False)
        panel.plot([x for x, _ in timed], [at for _, at in timed], marker, color=colour, markersize=3,
                   markeredgewidth=0, alpha=0.75)  # fmt: skip
        panel.plot([1e3 * p.step_s for p in chosen], lines, "|", color=style.INK, markersize=5,
                   markeredgewidth=1.1)  # fmt: skip
        ticks.append((lines[0] + lines[-1]) / 2)
        y = lines[-1] + 3.4
    panel.set_yticks(ticks, [style.label(case.arm, wide) for case in members])
    panel.set_ylim(y - 2.4, -1)
    if low > 0 and high / low > LOGARITHMIC:
        panel.set_xscale("log")
        panel.set_xlabel("milliseconds a step (logarithmic)")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.minorticks_off()
    else:
        panel.set_xlabel("milliseconds a step")
        panel.locator_params(axis="x", nbins=7 if wide else 4)
    panel.set_xlim(low, high)


def alt(analysis: Analysis) -> str:
    shown = [
        f"{c.workload} {c.arm}: median {words.number((c.step_s.estimate or 0) * 1e3)} ms, spread between "
        f"processes {100 * (c.spread_between or 0):.1f} %"
        for c in analysis.cases
        if c.timed
    ]
    return "Step times of every process. " + "; ".join(words.plain(s, 160) for s in shown[:40])
