"""What does a loader take from a training thread beside it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.loading import Loading
from bench.report.figures import loading
from bench.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The price of the interpreter's lock"
CAPTION = (
    "How much longer a unit of pure Python takes on one CPU while the loader is consumed by another thread "
    "of its process on another CPU, than while the same loader is consumed by another process there. One "
    "observation each, medians of interleaved windows; no interval. Below zero is noise, shown as zero."
)


def slowdown(row: Loading) -> Interval:
    value = row.gil_slowdown
    return Interval(estimate=None if value is None else max(0.0, 100 * value))


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return loading.draw(analysis, wide, slowdown, "% longer")


def alt(analysis: Analysis) -> str:
    return loading.alt(analysis, "Percent that a training thread is slowed", slowdown, 1)
