"""What the loaders' figures share: bars of one quantity, a panel for each group that is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.loading import Loading
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.figures import bars
from bench.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Quantity = Callable[[Loading], Interval]
NOTHING = Interval(estimate=None)


def draw(analysis: Analysis, wide: bool, quantity: Quantity, unit: str) -> Figure | None:
    """Bars; None where no loader has the quantity."""
    known = {(row.session, row.case_id): quantity(row) for row in analysis.loading}

    def of(case: CaseSummary) -> Interval:
        return known.get((case.session, case.case_id), NOTHING)

    return bars.draw(analysis.cases, wide, of, lambda c, p: None, unit, lambda v: words.number(v, 3))


def alt(analysis: Analysis, start: str, quantity: Quantity, scale: float) -> str:
    shown = [
        f"{row.tokenizer} tokenizer {row.arm} {words.number(value * scale, 3)}"
        for row in analysis.loading
        if (value := quantity(row).estimate) is not None
    ]
    return f"{start}: " + "; ".join(words.plain(text, 120) for text in shown[:40])
