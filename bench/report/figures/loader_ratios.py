"""How much faster than the baseline is each loader, with the same tokenizer?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.report.figures import ratios

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Loaders: how many times as fast as the baseline"
CAPTION = (
    "Rates after the first batch, with the same tokenizer on both sides; what whole passes came to is in the "
    "sentences above. "
) + ratios.CAPTION


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return ratios.draw(analysis, wide)


def alt(analysis: Analysis) -> str:
    return "Loaders. " + ratios.alt(analysis)
