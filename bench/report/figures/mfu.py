"""What share of the device's peak does the training step use?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.report import words
from bench.report.figures import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Model FLOPs utilisation"
CAPTION = (
    "Tokens a second × (6N + 6·L·d·T) over the dense peak of the precision's dtype. The 12·L·d·T convention, "
    "which counts the masked half of attention too, stands in the table."
)


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return bars.draw(
        analysis.cases, wide, lambda c: c.mfu.map(lambda m: 100 * m),
        lambda c, p: 100 * (c.mfu.estimate or 0) * (c.step_s.estimate or 0) / p.step_s,
        "MFU, % of the dense peak", lambda v: f"{words.number(v, 3)} %",
    )  # fmt: skip


def alt(analysis: Analysis) -> str:
    known = [c for c in analysis.cases if c.mfu.estimate is not None]
    shown = [f"{c.workload} {c.arm} {words.percent(c.mfu)}" for c in known]
    return "Model FLOPs utilisation: " + "; ".join(words.plain(s, 120) for s in shown[:40])
