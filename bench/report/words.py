"""How numbers and findings are said: the same words in the terminal, on the page and in the README."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench import domains
from bench.analyze.break_even import BreakEven
from bench.analyze.ratios import Comparison
from bench.analyze.summary import CaseSummary
from bench.stats import Interval

NONE: Final = "–"
_BIDI: Final = re.compile("[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff]")


def plain(text: Any, longest: int = 500) -> str:
    """Text of unknown origin as one printable line: no control characters, no bidirectional overrides."""
    kept = _BIDI.sub("", str(text).encode("utf-8", "replace").decode())
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") else c for c in kept)
    shown = " ".join(shown.split())
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, thousands separated: 11.78, 43,460, 0.0312."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = float(f"{value:.{digits - 1}e}")
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    shown = f"{value:.{digits - 1}e}" if abs(value) < 1e-4 else f"{value:,.{places}f}"
    return shown.replace("-", "−")


def short(value: float | None) -> str:
    """Large numbers with a unit prefix: 43.5 k, 1.21 M."""
    if value is None:
        return NONE
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return number(value / size, 3) + prefix
    return number(value, 3)


def span(interval: Interval, scale: float = 1.0, digits: int = 4) -> str:
    """`11.61–12.12`, or nothing where there is no interval. As many decimals as the estimate has."""
    if interval.low is None or interval.high is None or interval.estimate is None:
        return ""
    shown = number(interval.estimate * scale, digits)
    places = len(shown.partition(".")[2]) if "." in shown else 0
    return "–".join(f"{end * scale:,.{places}f}" for end in (interval.low, interval.high))


def with_span(interval: Interval, scale: float = 1.0, digits: int = 4) -> str:
    """`11.78 (11.61–12.12)`"""
    ends = span(interval, scale, digits)
    return number(None if interval.estimate is None else interval.estimate * scale, digits) + (
        f" ({ends})" if ends else ""
    )


def percent(interval: Interval) -> str:
    if interval.estimate is None:
        return NONE
    share = 100 * interval.estimate
    return f"{share:.1f} %" if share >= 1 else f"{number(share, 2)} %"


def bytes_(value: float | None) -> str:
    if value is None:
        return NONE
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{number(value / size, 3)} {unit}"
    return f"{value:.0f} B"


def brief(value: float | None) -> str:
    """Seconds without the unit: 21.4, 6.2, 0.09."""
    if value is None:
        return NONE
    if abs(value) < 0.1:
        return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
    return number(value, 3 if abs(value) >= 10 else 2)


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{brief(value)} s"


def count(value: float | None) -> str:
    """A number of steps: two or three digits are all that it is good for."""
    if value is None:
        return NONE
    return f"{float(f'{value:.3g}'):,.0f}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


# ------------------------------------------------------------------------------------------------- sentences
def evidence(comparison: Comparison, low: float, high: float) -> str:
    ratio = comparison.speedup
    parts = [f"{low:.2f}–{high:.2f}", plural(ratio.n_rounds, "round")]
    if "draws" in ratio.method:
        parts.append(plural(ratio.n_draws, "cache draw"))
    return ", ".join([*parts, f"{100 * (ratio.confidence or 0):.3g} %"])


def verdict(comparison: Comparison) -> str:
    """One sentence that can be read alone."""
    arm, base, ratio = plain(comparison.arm, 80), plain(comparison.baseline, 80), comparison.speedup
    if ratio.estimate is None:
        return f"{arm} and {base}: {ratio.reason}"
    if ratio.low is None or ratio.high is None:
        rounds = plural(ratio.n_rounds, "round")
        return f"{arm} is {ratio.estimate:.2f}× as fast as {base} ({rounds}, no interval: not a finding)"
    if not ratio.differs:
        shown = f"{ratio.estimate:.2f}×, {evidence(comparison, ratio.low, ratio.high)}"
        return f"{arm} and {base}: no difference larger than the noise ({shown})"
    if ratio.estimate >= 1:
        shown = evidence(comparison, ratio.low, ratio.high)
        return f"{arm} is {ratio.estimate:.2f}× as fast as {base} ({shown})"
    shown = evidence(comparison, 1 / ratio.high, 1 / ratio.low)
    return f"{arm} takes {1 / ratio.estimate:.2f}× as long as {base} ({shown})"


def claim(row: Mapping[str, Any]) -> str:
    """`fast tokenizer: rust is 5.10× torch-dataloader (4.80–5.40, 6 rounds)`: to be quoted as it is."""
    arm, base = plain(row["arm"], 80), plain(row["baseline"], 80)
    before = "" if row["prepare_s"] is None else f", after {seconds(row['prepare_s'])} of work beforehand,"
    start = f"{plain(row['tokenizer'], 20)} tokenizer: {arm}{before}"
    if row["ratio"] is None:
        return f"{start} and {base}: no round in which both have a time"
    rounds = plural(row["n_rounds"], "round")
    if row["low"] is None or row["high"] is None:
        return f"{start} is {row['ratio']:.2f}× {base} ({rounds}, no interval: not a finding)"
    ratio, low, high = row["ratio"], row["low"], row["high"]
    also, other = "start included", row["in_all"]
    if row["late"] and row["in_all_low"] is not None:  # the whole pass is what can be compared
        ratio, low, high = row["in_all"], row["in_all_low"], row["in_all_high"]
        also, other = "start included; after the first batch", row["ratio"]
    total = "" if other is None else f"; {also} {other:.2f}×"
    ends = f"{low:.2f}–{high:.2f}, {rounds}{total}"
    if low <= 1 <= high:
        return f"{start} and {base}: no difference larger than the noise ({ratio:.2f}×, {ends})"
    return f"{start} is {ratio:.2f}× {base} ({ends})"


def pays_off(row: BreakEven) -> str:
    """`after 1,400 steps (1,350–1,520)`, or why never."""
    if row.steps is None:
        return plain(row.reason)
    if row.steps < 1:
        return "from the first step"
    ends = f" ({count(row.low)}–{count(row.high)})" if row.low is not None else " (no interval)"
    return f"after {count(row.steps)} steps{ends}"


def labels(cases: Sequence[CaseSummary]) -> dict[tuple[str, str], str]:
    """The shortest name of every group, by session and group: its workload, and the axes that tell it from
    others of the same workload; the session where there are several."""
    groups = {(case.session, case.group): case for case in cases}
    several = len({session for session, _ in groups}) > 1
    found = {}
    for key, case in groups.items():
        alike = [c.axes for c in groups.values() if (c.session, c.workload) == (case.session, case.workload)]
        telling = [n for n in case.axes if len({repr(axes.get(n)) for axes in alike}) > 1]
        telling = [n for n in telling if always(n) or not at_default(n, case.axes[n])]
        if len(alike) > 1 and not telling:
            telling = [n for n in ("precision",) if n in case.axes]
        parts = [axis(n, case.axes[n]) for n in telling]
        session = f" [{plain(case.session, 40)}]" if several else ""
        found[key] = plain(", ".join([plain(case.workload, 60), *parts]), 110) + session
    return found


SAID: Final = {  # how an axis is said; others are their name and their value
    "precision": "{}", "format": "{}", "tokenizer": "{} tokenizer", "cores": "{} cores",
    "page_cache": "{} page cache", "megabytes": "{} MB",
}  # fmt: skip
ALWAYS: Final = ("precision", "format", "tokenizer", "cores")  # said at their default too


def axis(name: str, value: Any) -> str:
    """`fp32`, `hf tokenizer`, `attention math`"""
    shown = plain(value, 20)
    said = SAID.get(name, f"{plain(name, 40)} {{}}").format(shown)
    return said.removesuffix("s") if said == "1 cores" else said


def always(name: str) -> bool:
    """Whether it tells groups apart also at its default: a tokenizer is never left unsaid."""
    return name in ALWAYS and name != "precision"


def at_default(name: str, value: Any) -> bool:
    return name in domains.AXES and value == domains.AXES[name].default


def conditions(axes: Mapping[str, Any]) -> str:
    """`batch 8 × 64 tokens, fp32`, what is always said, and every other axis that is not at its default."""
    parts = []
    if "batch" in axes and "sequence" in axes:
        parts.append(f"batch {plain(axes['batch'], 20)} × {plain(axes['sequence'], 20)} tokens")
    parts += [axis(name, axes[name]) for name in ALWAYS if name in axes]
    said = ("batch", "sequence", *ALWAYS)
    parts += [axis(n, value) for n, value in axes.items() if n not in said and not at_default(n, value)]
    return ", ".join(parts[:12])
