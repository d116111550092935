"""How much faster than the baseline, and how sure is that? A forest plot on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.ratios import Comparison
from bench.report import words
from bench.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "How many times as fast as the baseline"
CAPTION = (
    "Hodges–Lehmann estimate over rounds, with its exact interval. An interval that crosses 1 shows no "
    "difference larger than the noise; a hollow marker has no interval and is no finding."
)


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    found: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in analysis.comparisons:
        if comparison.speedup.estimate is not None:
            found.setdefault((comparison.session, comparison.group), []).append(comparison)
    groups = list(found.values())[: style.MOST_PANELS]
    if not groups:
        return None
    look, titles = style.Look(analysis.cases), style.titles(analysis.cases, wide)
    with style.style():
        heights = [0.44 + 0.28 * len(g) + (0.22 if g is groups[-1] else 0) for g in groups]
        figure, axes = style.panels(heights, wide)
        low, high = limits(groups)
        for panel, group in zip(axes, groups, strict=True):
            rows(panel, group, look, wide)
            panel.set_title(titles[group[0].session, group[0].group])
            panel.set_xlim(low, high * (high / low) ** (0.1 if wide else 0.25))
        bases = {c.baseline for g in groups for c in g}
        base = words.plain(bases.pop(), 24) if len(bases) == 1 else "the baseline"
        axes[-1].set_xlabel(f"times as fast as {base} (logarithmic)")
    return figure


def limits(groups: Sequence[Sequence[Comparison]]) -> tuple[float, float]:
    """The same for all panels: every interval, and 1."""
    ratios = [c.speedup for g in groups for c in g]
    ends = [1.0, *(e for r in ratios for e in (r.estimate, r.low, r.high) if e)]
    margin = max((max(ends) / min(ends)) ** 0.06, 1.01)
    return min(ends) / margin, max(ends) * margin


def rows(panel: Axes, group: Sequence[Comparison], look: style.Look, wide: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    panel.set_xscale("log")
    panel.axvline(1, color=style.INK, linewidth=1)
    for y, comparison in enumerate(group):
        ratio, colour = comparison.speedup, look.colour(comparison.stack)
        estimate, low, high = ratio.estimate or 1.0, ratio.low, ratio.high
        if low is not None and high is not None:
            panel.plot([low, high], [y, y], color=colour, linewidth=2.2)
        panel.plot([estimate], [y], look.marker(comparison.stack), color=colour, markersize=5.5,
                   markerfacecolor=style.PAPER if low is None else colour, markeredgewidth=1.4)  # fmt: skip
        panel.annotate(f"{estimate:.2f}×", (max(estimate, high or 0), y), (8, 0), va="center", fontsize=8,
                       textcoords="offset points")  # fmt: skip
    style.name_rows(panel, [c.arm for c in group], wide)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6 if wide else 4, steps=[1, 2, 2.5, 5, 10]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))


def alt(analysis: Analysis) -> str:
    shown = [f"{c.workload}: {words.verdict(c)}" for c in analysis.comparisons]
    return "Ratios to the baseline. " + "; ".join(words.plain(s, 200) for s in shown[:40])
