"""How fast, how efficient? Bars from zero with intervals, one panel a workload, every process as a dot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench.analyze.ratios import groups
from bench.analyze.summary import CaseSummary, Process
from bench.report.figures import style
from bench.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Callable[[CaseSummary], Interval]
Points = Callable[[CaseSummary, Process], float | None]


def draw(
    cases: Sequence[CaseSummary], wide: bool, quantity: Quantity, points: Points, unit: str,
    show: Callable[[float], str],
) -> Figure | None:  # fmt: skip
    """Bars of a quantity; None where no case has it."""
    chosen = [[c for c in members if quantity(c).estimate is not None] for members in groups(cases).values()]
    chosen = [members for members in chosen if members][: style.MOST_PANELS]
    if not chosen:
        return None
    look, titles = style.Look(cases), style.titles(cases, wide)
    with style.style():
        figure, axes = style.panels([0.62 + 0.3 * len(members) for members in chosen], wide)
        for panel, members in zip(axes, chosen, strict=True):
            rows(panel, members, look, wide, quantity, points, show)
            panel.set_title(titles[members[0].session, members[0].group])
            panel.set_xlabel(unit)
    return figure


def rows(
    panel: Axes, members: Sequence[CaseSummary], look: style.Look, wide: bool, quantity: Quantity,
    points: Points, show: Callable[[float], str],
) -> None:  # fmt: skip
    top = 0.0
    for y, case in enumerate(members):
        interval, colour = quantity(case), look.colour(case.stack)
        estimate = interval.estimate or 0.0
        dots = [p for process in case.processes if (p := points(case, process)) is not None]
        panel.barh(y, estimate, height=0.56, color=colour, alpha=0.28 if case.variant == "default" else 0.16)
        panel.plot([estimate, estimate], [y - 0.28, y + 0.28], color=colour, linewidth=2)
        if interval.low is not None and interval.high is not None:
            panel.plot([interval.low, interval.high], [y, y], color=style.INK, linewidth=1.4, zorder=4)
        if dots:
            panel.plot(dots, [y + 0.17] * len(dots), look.marker(case.stack), color=colour, markersize=2.6,
                       markeredgewidth=0, alpha=0.8)  # fmt: skip
        end = max([estimate, interval.high or 0.0, *dots])
        panel.annotate(
            show(estimate), (end, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5
        )
        top = max(top, end)
    style.name_rows(panel, [case.arm for case in members], wide)
    panel.set_xlim(0, top * (1.14 if wide else 1.26) or 1)
    panel.xaxis.set_major_formatter(lambda value, _: style.tick(value))
    panel.locator_params(axis="x", nbins=6 if wide else 4)
