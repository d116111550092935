"""How many tokens a second does each loader deliver, each tokenizer apart?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.report import words
from bench.report.figures import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Tokens a second, by tokenizer"
CAPTION = (
    "From the first batch to the last of one pass over unseen text. Bar: median over rounds; dark line: its "
    "interval; dots: every process. The scale differs between panels: panels of different tokenizers are not "
    "to be compared."
)


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return bars.draw(
        analysis.cases, wide, lambda c: c.tokens_per_s,
        lambda c, p: (c.tokens_per_s.estimate or 0) * (c.step_s.estimate or 0) / p.step_s,
        "tokens a second", words.short,
    )  # fmt: skip


def alt(analysis: Analysis) -> str:
    shown = [
        f"{c.axes.get('tokenizer')} tokenizer {c.arm} {words.short(c.tokens_per_s.estimate)}"
        for c in analysis.cases
        if c.timed
    ]
    return "Tokens a second by tokenizer: " + "; ".join(words.plain(s, 120) for s in shown[:40])
