"""How many tokens a second does each loader deliver, each tokenizer apart?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.loading import worth_telling
from bench.analyze.ratios import groups
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.figures import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Tokens a second, by tokenizer"
CAPTION = (
    "From the first batch to the last of one pass over unseen text. Bar: median over rounds; dark line: its "
    "interval; dots: every process. The scale differs between panels: panels of different tokenizers are not "
    "to be compared. Loaders that tokenized beforehand and are off the scale stand in the table alone."
)
OFF_SCALE = 3.0  # times as fast as the fastest of those that did their work in time


def on_scale(analysis: Analysis) -> list[CaseSummary]:
    """Cases without those whose work was done beforehand, where they would make all other bars alike."""
    kept = {(row.session, row.case_id) for row in analysis.loading if worth_telling(row)}
    shown: list[CaseSummary] = []
    for members in groups(analysis.cases).values():
        working = [c.tokens_per_s.estimate or 0 for c in members if (c.session, c.case_id) not in kept]
        limit = OFF_SCALE * max(working, default=0) or float("inf")
        shown += [
            c for c in members
            if (c.session, c.case_id) not in kept or (c.tokens_per_s.estimate or 0) <= limit
        ]  # fmt: skip
    return shown


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return bars.draw(
        on_scale(analysis), wide, lambda c: c.tokens_per_s,
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
