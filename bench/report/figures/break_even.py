"""When has compiling paid for itself? Cumulative time of each arm against steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.break_even import BreakEven
from bench.analyze.ratios import groups
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Break-even: time spent after a number of steps"
CAPTION = (
    "Compile time plus steps × median step time. Solid: cold caches; dashed: seeded. A ring marks where an "
    "arm overtakes the baseline; where there is no ring it does not, or not beyond the noise."
)
LEGEND = True


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    chosen = []
    for key, members in groups(analysis.cases).items():
        able = [c for c in members if c.timed and c.compile_cold_s is not None]
        rows_ = [r for r in analysis.break_even if (r.session, r.group) == key]
        if len(able) > 1 and rows_:
            chosen.append((able, rows_))
    chosen = chosen[: style.MOST_PANELS]
    if not chosen:
        return None
    look, titles = style.Look(analysis.cases), style.titles(analysis.cases, False)
    columns = 2 if wide and len(chosen) > 1 else 1
    with style.style():
        figure, axes = style.panels([2.75] * len(chosen), wide, columns)
        for panel, (members, rows_) in zip(axes, chosen, strict=True):
            curves(panel, members, rows_, look)
            panel.set_title(titles[members[0].session, members[0].group])
    return figure


def last_step(rows: Sequence[BreakEven]) -> float:
    """The axis ends beyond the last crossing."""
    known = [r.steps for r in rows if r.steps is not None]
    return max([1.35 * max(known, default=0.0), 100.0])


def curves(panel: Axes, members: Sequence[CaseSummary], rows: Sequence[BreakEven], look: style.Look) -> None:
    end, top = last_step(rows), 0.0
    for case in members:
        step, colour = case.step_s.estimate or 0.0, look.colour(case.stack)
        for name, dashes in (("compile_cold_s", "-"), ("compile_seeded_s", (0, (4, 2)))):
            start = getattr(case, name)
            if start is not None:
                quiet = case.variant != "default"
                line = [start, start + end * step]
                panel.plot([0, end], line, linestyle=dashes, color=colour,
                           linewidth=1 if quiet else 1.6, alpha=0.6 if quiet else 1)  # fmt: skip
                top = max(top, start + end * step)
    base = next((c for c in members if c.arm == rows[0].baseline), None)
    for row in rows:
        start = getattr(base, f"compile_{row.cache}_s", None)
        if base is not None and row.steps is not None and start is not None and row.steps >= 1:
            y = start + row.steps * (base.step_s.estimate or 0.0)
            panel.plot([row.steps], [y], "o", color=style.INK, markerfacecolor=style.PAPER, markersize=4.5,
                       markeredgewidth=1.2, zorder=5)  # fmt: skip
    panel.set_xlim(0, end)
    panel.set_ylim(0, top * 1.05 or 1)
    panel.set_xlabel("steps")
    panel.set_ylabel("seconds, compilation included")
    panel.grid(axis="y")
    panel.tick_params(axis="y", labelcolor=style.MUTED)
    panel.locator_params(nbins=5)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def alt(analysis: Analysis) -> str:
    shown = [f"{r.workload} {r.arm}, {r.cache} caches: {words.pays_off(r)}" for r in analysis.break_even]
    return "Break-even. " + "; ".join(words.plain(s, 160) for s in shown[:40])
