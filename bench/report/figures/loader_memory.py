"""How much memory does each loader's tree of processes take?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.report.figures import loading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Memory of the process tree"
CAPTION = (
    "Peak of the proportional set size over the consumer and everything the loader started, sampled from "
    "outside: memory that processes share is counted once."
)


def draw(analysis: Analysis, wide: bool) -> Figure | None:
    return loading.draw(analysis, wide, lambda row: row.pss_bytes.map(lambda b: 1e-6 * b), "megabytes")


def alt(analysis: Analysis) -> str:
    return loading.alt(analysis, "Megabytes of memory", lambda row: row.pss_bytes, 1e-6)
