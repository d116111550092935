"""What does each loader cost beside its time? One row a case of the domain `load`.

A rate counts from the first batch to the last; `rate_in_all` counts from before the loader was made, so that
a loader that does its work before the first batch is seen. Nothing here compares across tokenizers: a group
of cases that are compared has one.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from bench import stats
from bench.analyze.ratios import Comparison
from bench.analyze.summary import NOTHING, CaseSummary
from bench.stats import Interval
from stacks.load.spec import STAGES

if TYPE_CHECKING:
    from bench.store import Tables

ORDER: Final = (*STAGES, "library threads", "other")
TELLING_SHARE: Final = 0.1  # of a pass: less work beforehand needs no words in a sentence
BEYOND: Final = 2.0  # times the rate that the CPU time allows, which holds the start of processes too
LATE_SHARE: Final = 0.25  # of all its time before the first batch: its rate alone would mislead


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """Medians over rounds where they come from timed observations, else of the one observation apart."""

    session: str
    case_id: str
    group: str
    workload: str
    arm: str
    stack: str
    tokenizer: str
    axes: Mapping[str, Any]
    rate_in_all: Interval
    first_batch_s: Interval
    cpu_s_per_mtok: Interval
    pss_bytes: Interval
    total_s: float | None
    beyond_cpu: bool  # its rate is more than its CPU time allows: the work was done before the first batch
    first_batch_share: float | None
    padding_share: float | None
    prepare_s: float | None
    prepared_bytes: float | None
    consumer_us_per_batch: float | None
    bytes_pickled_per_batch: float | None
    pickle_s_per_batch: float | None
    gil_slowdown: float | None
    gil_slowdown_alone: float | None
    stages: Mapping[str, float]  # CPU seconds a million tokens
    options: str
    points_tried: int
    totals: Mapping[str, float]  # seconds in all, by round


def loadings(tables: Tables, cases: Sequence[CaseSummary]) -> list[Loading]:
    """One for every case of the domain `load` that has a time, in the plan's order."""
    metrics: dict[str, dict[str, float | None]] = {}
    for row in tables.rows("metrics"):
        metrics.setdefault(row["run_id"], {})[row["metric"]] = row["value"]
    apart: dict[tuple[str, str], dict[str, float | None]] = {}
    tried: dict[tuple[str, str], int] = {}
    for run in tables.rows("runs"):
        key = (run["session"], run["case_id"])
        tried[key] = tried.get(key, 0) + (run["kind"] == "calibration")
        if run["kind"] in ("prepare", "consumer", "breakdown", "gil") and run["status"] == "ok":
            found = apart.setdefault(key, {})
            found.update({k: v for k, v in metrics.get(run["run_id"], {}).items() if k not in WATCHED})
    facts: dict[tuple[str, str], list[str]] = {}
    for row in tables.rows("manifest"):
        if (row["key"] or "").startswith("option."):
            words = f"{row['key'].removeprefix('option.')} {row['value']}"
            facts.setdefault((row["session"], row["case_id"]), []).append(words)
    out = []
    for case in cases:
        key = (case.session, case.case_id)
        if case.workload.startswith("load/") and case.timed:
            options = ", ".join(sorted(facts.get(key, [])))
            out.append(loading(case, metrics, apart.get(key, {}), options, tried.get(key, 0)))
    return out


WATCHED: Final = ("pss_bytes", "page_cache_resident_share")  # of every observation; the timed ones' count


def loading(
    case: CaseSummary, metrics: Mapping[str, Mapping[str, float | None]], apart: Mapping[str, float | None],
    options: str, tried: int,
) -> Loading:  # fmt: skip
    used = [p for p in case.processes if p.complete] or list(case.processes)

    def timed(name: str) -> list[float]:
        found = [metrics.get(p.run_id, {}).get(name) for p in used]
        return [value for value in found if value is not None and value > 0]

    def middle(name: str) -> float | None:
        found = timed(name)
        return statistics.median(found) if found else None

    total, first = middle("total_s"), middle("time_to_first_batch_s")
    stages = {
        name.removeprefix("stage."): value
        for name, value in apart.items()
        if name.startswith("stage.") and value is not None and value > 0
    }
    names = ("prepare_s", "prepared_bytes", "consumer_us_per_batch", "bytes_pickled_per_batch",
              "pickle_s_per_batch", "gil_slowdown", "gil_slowdown_alone")  # fmt: skip
    single: dict[str, Any] = {name: apart.get(name) for name in names}
    return Loading(
        **{k: getattr(case, k) for k in ("session", "case_id", "group", "workload", "arm", "stack", "axes")},
        tokenizer=str(case.axes.get("tokenizer", "")), rate_in_all=level(timed("tokens_per_s_in_all")),
        first_batch_s=level(timed("time_to_first_batch_s")), cpu_s_per_mtok=level(timed("cpu_s_per_mtok")),
        pss_bytes=level(timed("pss_bytes")), total_s=total, beyond_cpu=beyond(case, middle("cpu_s_per_mtok")),
        first_batch_share=first / total if first and total else None,
        padding_share=middle("padding_share"), options=options, points_tried=tried,
        totals={p.round_id: s for p in used if (s := metrics.get(p.run_id, {}).get("total_s"))},
        stages={name: stages[name] for name in sorted(stages, key=stage_order)},
        **single,
    )  # fmt: skip


def beyond(case: CaseSummary, cpu_s_per_mtok: float | None) -> bool:
    rate, cores = case.tokens_per_s.estimate, case.axes.get("cores")
    if rate is None or not cpu_s_per_mtok or not isinstance(cores, int):
        return False
    return rate > BEYOND * cores * 1e6 / cpu_s_per_mtok


def level(values: Sequence[float]) -> Interval:
    return stats.level(values) if values else NOTHING


def stage_order(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER) - 1, name)


def claims(
    comparisons: Sequence[Comparison], cases: Sequence[CaseSummary], found: Sequence[Loading]
) -> list[dict[str, Any]]:
    """What may be quoted of loaders: a sentence a comparison, that names its tokenizer, and what it leaves
    out where a loader did part of its work beforehand."""
    known = {(c.session, c.case_id): c for c in cases}
    kept = {(row.session, row.case_id): row.prepare_s for row in found if worth_telling(row)}
    totals = {(row.session, row.case_id): row.totals for row in found}
    starters = {(row.session, row.case_id) for row in found if (row.first_batch_share or 0) > LATE_SHARE}
    out = []
    for c in comparisons:
        case = known[c.session, c.case_id]
        if case.workload.startswith("load/"):
            case_key, base_key = (c.session, c.case_id), (c.session, c.baseline_case_id)
            whole = in_all(totals, case_key, base_key)
            out.append({
                "session": c.session, "group": c.group, "case_id": c.case_id, "arm": c.arm,
                "baseline": c.baseline, "tokenizer": case.axes.get("tokenizer"), "ratio": c.speedup.estimate,
                "low": c.speedup.low, "high": c.speedup.high, "n_rounds": c.speedup.n_rounds,
                "in_all": whole.estimate, "in_all_low": whole.low, "in_all_high": whole.high,
                "late": bool({case_key, base_key} & starters),
                "prepare_s": kept.get(case_key), "verdict": c.verdict,
                "run_ids": [p.run_id for p in case.processes],
            })  # fmt: skip
    return out


def in_all(
    totals: Mapping[tuple[str, str], Mapping[str, float]], case: tuple[str, str], base: tuple[str, str]
) -> stats.Ratio:
    """How many times as fast as the baseline from before the loader was made; over the rounds of both."""
    mine, theirs = totals.get(case, {}), totals.get(base, {})
    rounds = [name for name in mine if name in theirs]
    return stats.ratio([theirs[name] for name in rounds], [mine[name] for name in rounds])


def worth_telling(row: Loading) -> bool:
    """Whether what was done beforehand is more than a small part of the pass: an index is not."""
    return row.prepare_s is not None and (row.total_s is None or row.prepare_s > TELLING_SHARE * row.total_s)


def late(found: Sequence[Loading]) -> list[str]:
    """Loaders whose rate alone would mislead, a text a tokenizer: `fast tokenizer: rust 55 %, …`."""
    shares: dict[str, dict[str, float]] = {}
    for row in found:
        if row.first_batch_share is not None and row.first_batch_share > LATE_SHARE:
            arms = shares.setdefault(row.tokenizer, {})
            arms[row.arm] = max(arms.get(row.arm, 0.0), row.first_batch_share)
    return [
        f"{tokenizer} tokenizer: " + ", ".join(f"{arm} {100 * share:.0f} %" for arm, share in arms.items())
        for tokenizer, arms in shares.items()
    ]
