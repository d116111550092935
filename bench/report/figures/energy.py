"""How much energy does a token take?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.report import words
from bench.report.figures import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Energy a token"
CAPTION = "The device's cumulative energy counter around the timed window, over the tokens trained in it."


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return bars.draw(
        analysis.cases, wide, lambda c: c.joules_per_token.map(lambda j: 1e3 * j),
        lambda c, p: None if p.joules_per_token is None else 1e3 * p.joules_per_token,
        "millijoules a token", lambda v: f"{words.number(v, 3)} mJ",
    )  # fmt: skip


def alt(analysis: Analysis) -> str:
    known = [c for c in analysis.cases if c.joules_per_token.estimate is not None]
    shown = [f"{c.workload} {c.arm} {words.number(c.joules_per_token.estimate, 3)} J" for c in known]
    return "Energy a token: " + "; ".join(words.plain(s, 120) for s in shown[:40])
