"""How far from its tolerance is each measure of the parity gate?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.parity import Distance
from bench.report import words
from bench.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Parity: is it the same work?"
CAPTION = (
    "The worst error of each measure, as a multiple of its tolerance, which is a multiple of measured "
    "round-off. Left of the line passes. Below 0.001 shown at 0.001, above 1,000 at 1,000."
)
LEGEND = True  # arms are told apart by colour alone
LOW, HIGH = 1e-3, 1e3


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    found: dict[tuple[str, str], list[Distance]] = {}
    for distance in analysis.parity:
        if distance.measure != "dtype":  # exact: in the table
            found.setdefault((distance.session, distance.group), []).append(distance)
    groups = list(found.values())[: style.MOST_PANELS]
    if not groups:
        return None
    look, titles = style.Look(analysis.cases), style.titles(analysis.cases, wide)
    with style.style():
        heights = [0.66 + 0.26 * len({d.measure for d in group}) for group in groups]
        figure, axes = style.panels(heights, wide)
        for panel, group in zip(axes, groups, strict=True):
            rows(panel, group, look, wide)
            panel.set_title(titles[group[0].session, group[0].group])
            panel.set_xlabel("error / tolerance (logarithmic)")
    return figure


def rows(panel: Axes, group: Sequence[Distance], look: style.Look, wide: bool) -> None:
    measures = list(dict.fromkeys(d.measure for d in group))
    arms = list(dict.fromkeys(d.arm for d in group))
    panel.set_xscale("log")
    panel.axvline(1, color=style.INK, linewidth=1.2)
    worst = 1.0
    for d in group:
        x = min(max(d.distance, LOW), HIGH)
        offset = 0.5 * (arms.index(d.arm) / max(1, len(arms) - 1) - 0.5) if len(arms) > 1 else 0.0
        colour = look.colour(d.stack)
        y, fill = measures.index(d.measure) + offset, colour if d.distance <= 1 else style.PAPER
        panel.plot([x], [y], look.marker(d.stack), color=colour, markersize=5, markerfacecolor=fill,
                   markeredgewidth=1.3)  # fmt: skip
        worst = max(worst, x)
    style.name_rows(panel, measures, wide)
    panel.set_xlim(LOW / 1.5, 10 ** math.ceil(math.log10(worst * 1.5) + 0.3))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.minorticks_off()


def alt(analysis: Analysis) -> str:
    shown = [f"{d.workload} {d.arm} {d.measure} {words.number(d.distance, 2)}" for d in analysis.parity]
    return "Worst error over tolerance. " + "; ".join(words.plain(s, 120) for s in shown[:60])
