"""How long does training wait for each loader's first batch?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.report.figures import loading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Time to the first batch"
CAPTION = (
    "From before the loader is made until its first batch is there, in a fresh process: processes start, "
    "the tokenizer is read, indices are looked up. What a loader keeps was built before, and timed apart."
)


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return loading.draw(analysis, wide, lambda row: row.first_batch_s.map(lambda s: 1e3 * s), "milliseconds")


def alt(analysis: Analysis) -> str:
    return loading.alt(analysis, "Milliseconds to the first batch", lambda row: row.first_batch_s, 1e3)
