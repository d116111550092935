"""What did each case cost? One row a case and session: status, times with intervals, what follows from them.

Everything starts from process medians of complete rounds (`bench.stats`). A derived figure whose inputs are
unknown (a peak, an energy counter) is None.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench import stats
from bench.stats import Interval

if TYPE_CHECKING:
    from bench.store import Tables

Row = dict[str, Any]
NOTHING = Interval(estimate=None, reason="not timed")
PEAK_OF = {
    "fp32": "fp32",
    "tf32": "tf32",
    "bf16": "bf16",
    "bf16-pure": "bf16",
}  # precision -> dtype of the peak


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One timed observation that entered the statistics."""

    run_id: str
    round_id: str
    round_index: int | None
    draw: int | None
    complete: bool
    step_s: float  # median of its values
    within: float | None  # relative spread of its values
    values: tuple[tuple[bool, float], ...]  # (warm-up, seconds a step), in order
    joules_per_token: float | None
    loss: float | None
    steps: int  # trained until the last value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CaseSummary:
    """A case in a session. `reason` explains every status but ok; `step_s` is per training step."""

    session: str
    case_id: str
    group: str
    workload: str
    stack: str
    arm: str
    variant: str
    precision: str
    axes: Mapping[str, Any]
    position: int
    status: str
    reason: str
    step_s: Interval
    tokens_per_s: Interval
    mfu: Interval
    mfu_noncausal: Interval
    joules_per_token: Interval
    usd_per_gtoken: Interval
    compile_cold_s: float | None
    compile_seeded_s: float | None
    n_cold: int
    peak_allocated_bytes: float | None
    pss_bytes: float | None
    loss_end: float | None
    steps_end: int | None
    n_rounds: int
    n_failed: int
    n_draws: int
    caches: str
    spread_between: float | None
    spread_within: float | None
    processes: tuple[Process, ...]

    @property
    def timed(self) -> bool:
        return self.step_s.estimate is not None

    @property
    def measured(self) -> bool:
        """A timed value, or in a `cold` suite, which times no rounds, a compilation."""
        return self.timed or (
            self.caches == "cold" and self.compile_cold_s is not None and self.status == "ok"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Rows of the tables that summaries need, by run or case."""

    sessions: Mapping[str, Row]
    timed: Mapping[tuple[str, str], list[Row]]
    cold: Mapping[tuple[str, str], list[Row]]
    values: Mapping[str, list[Row]]
    metrics: Mapping[str, dict[str, float | None]]


def summarize(tables: Tables, price_per_hour: float | None = None) -> list[CaseSummary]:
    """Every case of every session, in the plan's order."""
    facts = collect(tables)
    ordered = list(facts.sessions)
    cases = sorted(tables.rows("cases"), key=lambda c: (ordered.index(c["session"]), c["position"]))
    return [summarize_case(case, facts, price_per_hour) for case in cases]


def collect(tables: Tables) -> Facts:
    timed: dict[tuple[str, str], list[Row]] = {}
    cold: dict[tuple[str, str], list[Row]] = {}
    for run in sorted(tables.rows("runs"), key=lambda r: str(r["run_id"])):
        key = (str(run["session"]), str(run["case_id"]))
        role = run["role"] or ""
        if run["kind"] == "timed":
            timed.setdefault(key, []).append(run)
        elif run["cache"] == "cold" and (role == "timed shape" or role.startswith("cache draw")):
            cold.setdefault(key, []).append(run)
    values: dict[str, list[Row]] = {}
    for value in tables.rows("values"):
        values.setdefault(value["run_id"], []).append(value)
    metrics: dict[str, dict[str, float | None]] = {}
    for metric in tables.rows("metrics"):
        metrics.setdefault(metric["run_id"], {})[metric["metric"]] = metric["value"]
    sessions = {str(s["session"]): s for s in tables.rows("sessions")}
    for case in tables.rows("cases"):
        sessions.setdefault(case["session"], {"session": case["session"]})
    return Facts(sessions, timed, cold, values, metrics)


def process_of(run: Row, facts: Facts) -> Process | None:
    """An observation's numbers; None where it has no timed value."""
    rows = sorted(facts.values.get(run["run_id"], []), key=lambda v: v["index"])
    series = [(bool(v["is_warmup"]), v["wall_ns"] / 1e9 / v["steps"]) for v in rows]
    timed = [seconds for warmup, seconds in series if not warmup]
    if not timed:
        return None
    metrics = facts.metrics.get(run["run_id"], {})
    joules, tokens = metrics.get("energy_j"), run["tokens_per_step"]
    steps = sum(v["steps"] for v in rows if not v["is_warmup"])
    return Process(
        run_id=run["run_id"], round_id=run["round_id"] or run["run_id"], round_index=run["round_index"],
        draw=run["cache_id"], complete=bool(run["complete"]), step_s=statistics.median(timed),
        within=stats.spread(timed), values=tuple(series),
        joules_per_token=joules / (steps * tokens) if joules and joules > 0 and tokens else None,
        loss=rows[-1]["loss"], steps=1 + sum(v["steps"] for v in rows),
    )  # fmt: skip


def summarize_case(case: Row, facts: Facts, price_per_hour: float | None) -> CaseSummary:
    key = (case["session"], case["case_id"])
    session, runs = facts.sessions[case["session"]], facts.timed.get(key, [])
    good = [p for run in runs if run["status"] == "ok" and (p := process_of(run, facts))]
    if case["gate"] != "ok" or case["planned"] == "skipped":
        good = []  # same work first: a case that did not pass the gate has no time
    whole = [p for p in good if p.complete]
    used = whole or good
    step = step_interval(used, interrupted=not whole and bool(good))
    failed = [
        run for run in runs
        if run["status"] != "ok" and run["reason"] != "interrupted" and not run["superseded"]
    ]  # fmt: skip
    cold = [facts.metrics.get(run["run_id"], {}) for run in facts.cold.get(key, []) if run["status"] == "ok"]
    if case["gate"] != "ok":
        cold = []
    status, reason = status_of(case, session, good, runs, failed, cold)
    seeded = [facts.metrics.get(p.run_id, {}).get("first_step_s") for p in used]
    steps = [p.step_s for p in used]
    tokens = case["tokens_per_step"]
    rate = step.map(lambda s: tokens / s) if tokens else NOTHING
    price = price_per_hour if price_per_hour is not None else session.get("price_per_hour")
    joules = [(p.joules_per_token, p.draw) for p in used if p.joules_per_token is not None]
    return CaseSummary(
        **{k: case[k] or "" for k in ("session", "case_id", "group", "workload", "stack", "arm", "variant",
                                      "precision")},
        axes=axes_of(case), position=case["position"] or 0, status=status, reason=reason, step_s=step,
        tokens_per_s=rate, mfu=mfu(case, session, step, "flops_per_step"),
        mfu_noncausal=mfu(case, session, step, "flops_per_step_noncausal"),
        joules_per_token=stats.level([j for j, _ in joules], [d for _, d in joules]) if joules else NOTHING,
        usd_per_gtoken=rate.map(lambda r: price / 3600 / r * 1e9) if price is not None else NOTHING,
        compile_cold_s=compile_s([m.get("first_step_s") for m in cold], steps or calibrated(cold)),
        compile_seeded_s=compile_s(seeded, steps), n_cold=len(cold),
        peak_allocated_bytes=middle(metric(facts, used, "peak_allocated_bytes")),
        pss_bytes=middle(metric(facts, used, "pss_bytes")), loss_end=middle(p.loss for p in used),
        steps_end=round(statistics.median([p.steps for p in used])) if used else None,
        n_rounds=len({p.round_id for p in whole}), n_failed=len(failed),
        n_draws=len({p.draw for p in used}), caches=session.get("caches") or "",
        spread_between=stats.spread(steps), spread_within=middle(p.within for p in used),
        processes=tuple(good),
    )  # fmt: skip


def step_interval(used: Sequence[Process], *, interrupted: bool) -> Interval:
    """Seconds a step; of interrupted rounds only, a number without an interval."""
    if not used:
        return NOTHING
    if interrupted:
        return Interval(
            estimate=stats.median([p.step_s for p in used]), n=len(used), method="order statistics",
            reason="no interval: no round was finished by every arm",
        )  # fmt: skip
    return stats.level([p.step_s for p in used], [p.draw for p in used])


def status_of(
    case: Row, session: Row, good: Sequence[Process], runs: Sequence[Row], failed: Sequence[Row],
    cold: Sequence[Mapping[str, float | None]],
) -> tuple[str, str]:  # fmt: skip
    """The case's status, and why it is not ok."""
    if case["planned"] == "skipped":
        return "skipped", case["reason"] or "skipped by the plan"
    if case["gate"] is None and not runs:
        return "skipped", "not reached: the run ended before its parity gate"
    if case["gate"] is None:
        return "not comparable", "gates/ holds no result for it, so that its times cannot be shown"
    if case["gate"] != "ok":
        return case["gate"], case["reason"] or "the parity gate gives no reason"
    if good and len(failed) < len(good):
        return "ok", ""
    if failed:
        share = f" ({len(failed)} of {len(failed) + len(good)} observations)" if good else ""
        return "failed", (failed[-1]["reason"] or "no reason was recorded") + share
    if session.get("caches") == "cold" and cold:
        return "ok", ""
    return "skipped", "passed the gate, but no round of it was finished"


def mfu(case: Row, session: Row, step: Interval, column: str) -> Interval:
    """Model FLOPs utilisation over the dense peak of the precision's dtype; None where a peak is unknown."""
    dtype, flops = PEAK_OF.get(case["precision"] or ""), case[column]
    try:
        peak = json.loads(session.get("peak_flops") or "{}").get(dtype)
    except (ValueError, AttributeError, RecursionError):
        peak = None
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or peak <= 0 or not flops:
        return Interval(estimate=None, reason=f"the device's {dtype} peak is not known")
    return step.map(lambda s: flops / s / peak)


def compile_s(first: Iterable[float | None], steps: Sequence[float]) -> float | None:
    """First step minus a median step: what compiling and lazy initialisation cost. Median; never below 0."""
    known = [value for value in first if value is not None]
    if not known or not steps:
        return None
    return max(0.0, statistics.median(known) - statistics.median(steps))


def calibrated(cold: Sequence[Mapping[str, float | None]]) -> list[float]:
    return [s for m in cold if (s := m.get("step_s")) is not None]


def metric(facts: Facts, used: Sequence[Process], name: str) -> list[float | None]:
    return [facts.metrics.get(p.run_id, {}).get(name) for p in used]


def middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def axes_of(case: Row) -> dict[str, Any]:
    try:
        axes = json.loads(case["axes"] or "{}")
    except (ValueError, RecursionError):
        return {}
    return axes if isinstance(axes, dict) else {}
