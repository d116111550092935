"""Where does each loader's CPU time go? Stacked bars of CPU seconds a million tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.loading import ORDER, Loading
from bench.report import words
from bench.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Where the CPU time goes"
CAPTION = (
    "CPU seconds a million tokens of the whole process tree, by stage, from one instrumented observation "
    "apart from the timed ones. Library threads: pools that Python cannot time from inside, mostly the "
    "tokenizer's. Other: what no stage claims, the start of processes and the consumer's sum included."
)


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    found: dict[tuple[str, str], list[Loading]] = {}
    for row in analysis.loading:
        if row.stages:
            found.setdefault((row.session, row.group), []).append(row)
    groups = list(found.values())[: style.MOST_PANELS]
    if not groups:
        return None
    stages = [name for name in ORDER if any(name in row.stages for g in groups for row in g)]
    titles = style.titles(analysis.cases, wide)
    with style.style():
        figure, axes = style.panels(
            [0.62 + 0.3 * len(g) + (0.5 if g is groups[0] else 0) for g in groups], wide
        )
        for panel, group in zip(axes, groups, strict=True):
            rows(panel, group, stages, wide)
            panel.set_title(titles[group[0].session, group[0].group])
            panel.set_xlabel("CPU seconds a million tokens")
        columns = 5 if wide else 3
        handles = [axes[0].barh(0, 0, color=colour(name), label=name) for name in stages]
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=7.5)
    return figure


def colour(stage: str) -> str:
    """Every stage has its colour; what nobody claims is grey."""
    if stage == "other":
        return style.SERIES[-1]
    return style.SERIES[ORDER.index(stage) % (len(style.SERIES) - 1)]


def rows(panel: Axes, group: Sequence[Loading], stages: Sequence[str], wide: bool) -> None:
    top = 0.0
    for y, row in enumerate(group):
        left = 0.0
        for name in stages:
            value = row.stages.get(name, 0.0)
            late = ORDER.index(name) >= len(style.SERIES) - 1
            panel.barh(y, value, left=left, height=0.6, color=colour(name), edgecolor=style.PAPER,
                       linewidth=0.6, alpha=0.55 if late else 0.9)  # fmt: skip
            left += value
        panel.annotate(words.number(left, 3), (left, y), (5, 0), textcoords="offset points", va="center",
                       fontsize=8.5)  # fmt: skip
        top = max(top, left)
    style.name_rows(panel, [row.arm for row in group], wide)
    panel.set_xlim(0, top * (1.14 if wide else 1.26) or 1)
    panel.xaxis.set_major_formatter(lambda value, _: style.tick(value))
    panel.locator_params(axis="x", nbins=6 if wide else 4)


def alt(analysis: Analysis) -> str:
    shown = [
        f"{row.tokenizer} tokenizer {row.arm}: "
        + ", ".join(f"{name} {words.number(value, 2)}" for name, value in row.stages.items())
        for row in analysis.loading
        if row.stages
    ]
    return "CPU seconds a million tokens by stage. " + "; ".join(words.plain(s, 200) for s in shown[:24])
