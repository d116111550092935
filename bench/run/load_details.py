"""What is observed of loaders apart from their times, after the rounds: one observation of each kind a case.

consumer    what the consumer's own `next` costs while a batch is ready
breakdown   CPU seconds by stage, what is pickled (suite key `details`)
gil         what the loader takes from a training thread (suite key `details`; one case an arm)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import plan as planning
from bench.run import observe, rounds
from bench.run.gate import tell
from bench.run.observe import Context, Request


def wanted(plan: planning.Plan, group: str) -> list[str]:
    """Kinds of observation for a group. The price of the lock does not depend on the page cache or the
    number of CPUs, and needs two of them."""
    axes = plan.groups[group][0].axes
    kinds = [kind for kind in ("breakdown",) if kind in plan.suite["details"]]
    if "gil" in plan.suite["details"] and axes["cores"] == 2 and axes["page_cache"] == "warm":
        kinds.append("gil")
    return ["consumer", *kinds] if plan.suite["details"] else []


def missing(plan: planning.Plan, out: Path, session: str, group: str) -> list[tuple[str, str]]:
    """(case id, kind) of what is left to observe, read off the gate and the artifacts."""
    path = out / "gates" / f"{session}.{group}.json"
    kinds = wanted(plan, group)
    if not kinds or not path.exists():
        return []
    passed = [i for i, row in json.loads(path.read_text())["cases"].items() if row["status"] == "ok"]
    done = {
        (row["case_id"], row["kind"])
        for row in rounds.read_rows(out)
        if row["session"] == session and row["reason"] != "interrupted"
    }
    return [(i, kind) for kind in kinds for i in passed if (i, kind) not in done]


def run_details(out: Path, group: str) -> None:
    """Makes what is missing of a group."""
    context = Context.open(out)
    session = context.session["session"]
    gate: dict[str, Any] = json.loads((out / "gates" / f"{session}.{group}.json").read_text())
    cases = {case.case_id: case for case in context.plan.groups[group]}
    for case_id, kind in missing(context.plan, out, session, group):
        case = cases[case_id]
        tell({"event": "start", "case_id": case_id, "gate": kind})
        cache, state = rounds.cache_directory(context, case, 0), "seeded"
        if kind != "breakdown":  # another text than the timed one: it keeps things of its own
            cache, state = cache.with_name(f"{cache.name}-apart"), "cold"
            observe.remove_tree(cache)
        row = observe.observe(
            context,
            Request(
                case=case, kind=kind, cache=cache, cache_state=state, role=kind,
                options=gate["options"].get(case_id),
            ),
        )  # fmt: skip
        if state == "cold":
            observe.remove_tree(cache)
        tell({"event": "end", **{k: row[k] for k in rounds.TOLD}})
