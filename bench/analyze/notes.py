"""What must a reader know beside the numbers? What is missing and why; what the intervals do not cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench import stats
from bench.analyze import loading
from bench.analyze.ratios import Comparison
from bench.analyze.summary import CaseSummary

if TYPE_CHECKING:
    from bench.store import Tables


def failures(tables: Tables, cases: Sequence[CaseSummary]) -> list[dict[str, str]]:
    """Cases without a clean result, single observations that failed, artifacts that cannot be read."""
    found = [
        {"kind": "case", "session": c.session, "name": c.case_id, "status": c.status, "reason": c.reason}
        for c in cases
        if c.status != "ok"
    ]
    told = {(c.session, c.case_id) for c in cases if c.status != "ok"}
    for run in sorted(tables.rows("runs"), key=lambda r: str(r["run_id"])):
        parts = (run["session"], run["case_id"])
        if run["kind"] != "timed" or run["status"] == "ok" or parts in told:
            continue
        status = "interrupted" if run["reason"] == "interrupted" else run["status"]
        status = "repeated" if run["superseded"] else status
        name = f"{run['case_id']}, observation {run['run_id']}"
        found.append(
            {"kind": "observation", "session": run["session"] or "", "name": name,
             "status": status or "failed", "reason": run["reason"] or "no reason was recorded"}
        )  # fmt: skip
    found += [
        {"kind": "artifact", "session": row["session"] or "", "name": row["place"] or "",
         "status": "unreadable", "reason": row["problem"] or ""}
        for row in tables.rows("problems")
    ]  # fmt: skip
    return found


def notes(
    tables: Tables, cases: Sequence[CaseSummary], comparisons: Sequence[Comparison],
    loaders: Sequence[loading.Loading] = (),
) -> list[str]:  # fmt: skip
    """Sentences, the most important first."""
    found = []
    timed = [case for case in cases if case.timed]
    sessions = tables.rows("sessions")
    if not timed:
        cold = any(case.measured for case in cases)
        found.append(
            "Only compilation was measured: the suite's caches are cold." if cold else "Nothing was timed."
        )
    few = sorted({case.n_rounds for case in timed if case.step_s.low is None})
    if few:
        rounds = " or ".join(str(n) for n in few)
        found.append(
            f"Some numbers have no interval: {rounds} complete round{'' if few == [1] else 's'}, and 95 % "
            f"needs {stats.least_rounds()}. Such numbers are not findings."
        )
    trained = [case for case in timed if not case.workload.startswith("load/")]
    draws = sorted({case.n_draws for case in trained if case.caches == "seeded"})
    if draws and draws[0] == 1:
        found.append(
            "One autotuning draw: every timed process of an arm read the same compiled code, so the "
            "intervals do not cover what another compilation would have picked (cache_draws = 1)."
        )
    elif draws and draws[0] < stats.DRAWS_LEVEL:
        found.append(
            "Two autotuning draws: too few to be a level of the interval, which speaks of this compiled code."
        )
    elif draws:
        found.append(f"{draws[0]} autotuning draws: the draw is the level that intervals are taken over.")
    if len(sessions) > 1:
        found.append(
            f"{len(sessions)} sessions: environments or devices differ between them, and ratios are formed "
            "within a session only."
        )
    compared = {(c.session, c.group) for c in comparisons}
    several = [(c.session, c.group) for c in timed]
    lost = sorted(
        {group for s, group in several if several.count((s, group)) > 1 and (s, group) not in compared}
    )
    if lost:
        found.append(f"The baseline has no time, so nothing is compared, in: {', '.join(lost)}.")
    if names := [f"{row.arm} ({row.tokenizer} tokenizer)" for row in loaders if row.beyond_cpu]:
        found.append(
            "The rate after the first batch is more than the CPU time allows, since the work was done before "
            "that batch: quote the rate in all of " + ", ".join(dict.fromkeys(names)) + "."
        )
    if names := loading.late(loaders):
        found.append(
            "Rates count what comes after the first batch, and the rate in all stands beside them. Before "
            "the first batch passed more than a quarter of all the time: " + "; ".join(names) + "."
        )
    if comparisons:
        found.append("Each interval holds by itself at the confidence stated; they do not hold jointly.")
    found += harness_notes(tables)
    return found


def harness_notes(tables: Tables) -> list[str]:
    found = [
        f"Of {row['wall_s']:,.0f} s the workers took {share(row, 'workers_s')}, preparing the input "
        f"{share(row, 'preparation_s')} and the harness itself {100 * row['harness_share']:.1f} % "
        f"({row['n_invocations']} invocation{'' if row['n_invocations'] == 1 else 's'})."
        for row in tables.rows("sessions")
        if row["harness_share"] is not None and row["wall_s"]
    ]
    dirty = {row["git_sha"] for row in tables.rows("environments") if row["git_dirty"]}
    if dirty:
        found.append("The working tree had uncommitted changes: these numbers belong to no commit.")
    if any(row["agrees_with_lock"] is False for row in tables.rows("environments")):
        found.append("Installed packages differ from the lock.")
    return found


def share(row: dict[str, Any], name: str) -> str:
    return f"{100 * (row[name] or 0) / row['wall_s']:.1f} %"
