"""One look for all figures: colours and markers by stack, quiet axes, and SVG that follows the page's theme.

Matplotlib draws with the light page's colours; in the SVG they become CSS variables, so that one drawing
serves light and dark.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.words import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#16191d", "#5c6570", "#d5dae0", "#fdfdfe"
# Okabe and Ito's palette, darkened where it was too light for white; CSS holds the shades for dark pages.
SERIES: Final = ("#0072b2", "#c4500a", "#00835f", "#a8518a", "#6b5fc7", "#8a6d00", "#2a8fbd", "#6b7280")
MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X", "h")
KNOWN: Final = ("jax-xla", "torch-eager", "torch-compile")  # always the same colour, whatever else is there
WIDE_IN, NARROW_IN = 7.4, 3.75
MOST_PANELS: Final = 16


class Look:
    """Colour and marker of every stack in an analysis."""

    def __init__(self, cases: Sequence[CaseSummary]) -> None:
        others = sorted({case.stack for case in cases} - set(KNOWN))
        order = [*KNOWN, *others]
        self.index = {stack: i % len(SERIES) for i, stack in enumerate(order)}

    def colour(self, stack: str) -> str:
        return SERIES[self.index.get(stack, len(SERIES) - 1)]

    def marker(self, stack: str) -> str:
        return MARKERS[self.index.get(stack, len(MARKERS) - 1)]

    def variable(self, stack: str) -> str:
        """The CSS variable of its colour."""
        return f"var(--s{self.index.get(stack, len(SERIES) - 1)})"


@contextlib.contextmanager
def style() -> Iterator[None]:
    import matplotlib

    quiet: dict[Any, Any] = {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5,
        "text.parse_math": False, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE,
        "axes.facecolor": "none", "figure.facecolor": "none", "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "axes.grid": True, "axes.grid.axis": "x",
        "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.spines.left": False, "axes.titlesize": 9,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlepad": 7,
        "ytick.major.size": 0, "xtick.major.size": 3, "axes.labelsize": 8.5, "legend.frameon": False,
        "legend.fontsize": 8, "svg.fonttype": "none",
        "svg.hashsalt": "stackbench", "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(quiet), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph.*missing")  # a name in a script the font lacks
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def panels(heights_in: Sequence[float], wide: bool, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with a column of panels of given heights (or a grid of equal ones)."""
    from matplotlib.figure import Figure

    rows = -(-len(heights_in) // columns)
    total = sum(heights_in[i * columns] for i in range(rows))
    figure = Figure(figsize=(WIDE_IN if wide else NARROW_IN, total), layout="constrained")
    ratios = [heights_in[i * columns] for i in range(rows)]
    grid: Any = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": ratios})
    axes = list(grid.flat)
    for spare in axes[len(heights_in) :]:
        spare.remove()
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=0.09, w_pad=0.05)
    return figure, axes[: len(heights_in)]


def tick(value: float) -> str:
    """A tick's number: 0, 2.5, 10 k."""
    for size, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{prefix}"
    return f"{value:.4g}"


def titles(cases: Sequence[CaseSummary], wide: bool) -> dict[tuple[str, str], str]:
    """What stands over a panel, by session and group."""
    short = {key: plain(label, 42) for key, label in words.labels(cases).items()}
    if not wide:
        return short
    several = len({case.session for case in cases}) > 1
    long: dict[tuple[str, str], str] = {}
    for case in cases:
        session = f" [{plain(case.session, 20)}]" if several else ""
        name = f"{plain(case.workload, 40)}, {words.conditions(case.axes)}{session}"
        long.setdefault((case.session, case.group), plain(name, 76))
    return long


def label(text: str, wide: bool) -> str:
    """A name that fits beside an axis."""
    return plain(text, 30 if wide else 20)


def name_rows(axes: Axes, names: Sequence[str], wide: bool) -> None:
    """Rows from top to bottom, each with its name."""
    axes.set_yticks(range(len(names)), [label(name, wide) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.6)


def to_svg(figure: Figure, uid: str, alt: str) -> str:
    """Inline SVG: no sizes, no scripts, no outside references, colours as CSS variables, ids of its own."""
    buffer = io.StringIO()
    empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with style():
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{uid}-', text)
    text = re.sub(r"url\(#", f"url(#{uid}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{uid}-', text)
    for colour, variable in theme().items():
        text = text.replace(colour, variable)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[\d. ]+"', head)
    view = box[0] if box else ""
    opening = f'<svg {view} role="img" aria-label="{html.escape(alt)}" xmlns="http://www.w3.org/2000/svg"'
    return f"{opening}>{rest.strip()}"


def theme() -> dict[str, str]:
    """Stand-in colours to CSS variables."""
    named = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
    return named | {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
