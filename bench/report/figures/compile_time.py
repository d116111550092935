"""How long does compiling take, with cold and with seeded caches?"""

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

TITLE = "Compile time"
CAPTION = (
    "First step minus a median step. Filled: every cache empty; hollow: caches seeded by an earlier "
    "compilation. Logarithmic axis; below 10 ms shown at 10 ms."
)
FLOOR_S = 0.01


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    chosen = [
        [c for c in members if c.compile_cold_s is not None or c.compile_seeded_s is not None]
        for members in groups(analysis.cases).values()
    ]
    chosen = [members for members in chosen if members][: style.MOST_PANELS]
    if not chosen:
        return None
    look, titles = style.Look(analysis.cases), style.titles(analysis.cases, wide)
    times = [
        max(s, FLOOR_S)
        for m in chosen
        for c in m
        for s in (c.compile_cold_s, c.compile_seeded_s)
        if s is not None
    ]
    with style.style():
        figure, axes = style.panels([0.62 + 0.32 * len(members) for members in chosen], wide)
        for panel, members in zip(axes, chosen, strict=True):
            rows(panel, members, look, wide)
            panel.set_xlim(min(times) / 1.6, max(times) * (2.0 if wide else 3.2))
            panel.set_title(titles[members[0].session, members[0].group])
            panel.set_xlabel("seconds (logarithmic)")
    return figure


def rows(panel: Axes, members: Sequence[CaseSummary], look: style.Look, wide: bool) -> None:
    panel.set_xscale("log")
    for y, case in enumerate(members):
        colour, marker = look.colour(case.stack), look.marker(case.stack)
        known = [max(s, FLOOR_S) for s in (case.compile_cold_s, case.compile_seeded_s) if s is not None]
        if len(known) == 2:
            panel.plot(known, [y, y], color=colour, linewidth=1.2, alpha=0.5)
        if case.compile_seeded_s is not None:
            panel.plot([max(case.compile_seeded_s, FLOOR_S)], [y], marker, color=colour, markersize=6,
                       markerfacecolor=style.PAPER, markeredgewidth=1.4)  # fmt: skip
        if case.compile_cold_s is not None:
            panel.plot([max(case.compile_cold_s, FLOOR_S)], [y], marker, color=colour, markersize=6)
        texts = [words.seconds(s) for s in (case.compile_cold_s, case.compile_seeded_s) if s is not None]
        panel.annotate(" / ".join(texts), (max(known), y), (8, 0), textcoords="offset points", va="center",
                       fontsize=8)  # fmt: skip
    style.name_rows(panel, [case.arm for case in members], wide)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.minorticks_off()


def alt(analysis: Analysis) -> str:
    shown = [
        f"{c.workload} {c.arm}: {words.seconds(c.compile_cold_s)} cold, "
        f"{words.seconds(c.compile_seeded_s)} seeded"
        for c in analysis.cases
        if c.compile_cold_s is not None or c.compile_seeded_s is not None
    ]
    return "Compile time. " + "; ".join(words.plain(s, 160) for s in shown[:40])
