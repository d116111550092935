"""One round: an observation of every arm of a group, back to back in balanced random order.

    python -m bench.run.rounds OUT ROUND_ID        a process of its own: a launcher loops, a queue submits

A round id is `<session>.<group>.r<index>.<attempt>`. An interrupted round is repeated whole under the next
attempt; what is complete is read off the artifacts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from bench import domains, protocol
from bench import plan as planning
from bench.run import isolate, observe
from bench.run.observe import Context, Request

GIVE_UP_AFTER = 2  # failed rounds of one case: it is not tried again
NOT_STEADY = "not steady"  # the machine's doing, not the case's: the round is repeated whole, once


def round_id(session: str, group: str, index: int, attempt: int) -> str:
    return f"{session}.{group}.r{index}.{attempt}"


def parse_round_id(text: str) -> tuple[str, str, int, int]:
    session, rest = text.split(".", 1)
    group, index, attempt = rest.rsplit(".", 2)
    return session, group, int(index.removeprefix("r")), int(attempt)


def read_rows(out: Path) -> Iterator[dict[str, Any]]:
    """Rows of all finished observations, in order of time; an unreadable one is passed over by name."""
    for path in sorted((out / "artifacts").glob(f"[!.]*/{observe.DONE}")):
        try:
            row = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(row, dict) and row.get("run_id") == path.parent.name:
            yield row


def failed(row: Mapping[str, Any]) -> bool:
    """The case's own failure: no interruption, and not a machine too restless for a steady value."""
    return (
        row["kind"] == "timed"
        and row["status"] != protocol.STATUS_OK
        and row["reason"] != "interrupted"
        and not str(row["reason"]).startswith(NOT_STEADY)
    )


def given_up(rows: Iterable[Mapping[str, Any]], session: str) -> set[str]:
    """Cases that failed in GIVE_UP_AFTER rounds of a session and are not tried any more."""
    count: dict[str, int] = {}
    for row in rows:
        if row["session"] == session and failed(row):
            count[row["case_id"]] = count.get(row["case_id"], 0) + 1
    return {case_id for case_id, n in count.items() if n >= GIVE_UP_AFTER}


def superseded(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Run ids of unsteady observations whose round was repeated with a steady one of the same case."""
    later: dict[tuple[str, str, int, str], int] = {}
    unsteady = []
    for row in rows:
        try:
            session, group, index, attempt = parse_round_id(row["round_id"] or "")
        except ValueError:  # no round, or an artifact that is not ours
            continue
        key = (session, group, index, row["case_id"])
        if row["status"] == protocol.STATUS_OK:
            later[key] = max(later.get(key, -1), attempt)
        elif str(row["reason"]).startswith(NOT_STEADY):
            unsteady.append((row["run_id"], key, attempt))
    return {run_id for run_id, key, attempt in unsteady if later.get(key, -1) > attempt}


def runnable(
    context: Context, group: str, gate: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
) -> list[planning.Case]:
    """Cases of a group that passed the gate and have not failed too often in this session."""
    lost = given_up(rows, context.session["session"])
    return [
        case
        for case in context.plan.groups[group]
        if gate["cases"][case.case_id]["status"] == protocol.STATUS_OK and case.case_id not in lost
    ]


def run_round(out: Path, name: str, tell: Any = print) -> int:
    """Makes every observation of the round. Returns how many are not ok."""
    context = Context.open(out)
    session, group, index, _ = parse_round_id(name)
    gate = json.loads((out / "gates" / f"{session}.{group}.json").read_text())
    cases = {c.arm: c for c in runnable(context, group, gate, read_rows(out))}
    seed = f"{context.plan.suite['seed']}:{group}"
    order = planning.orders(cases, index + 1, int(planning.digest(seed), 16))[index]
    draws = context.plan.suite["cache_draws"]
    bad = 0
    for position, arm in enumerate(order):
        case = cases[arm]
        tell(json.dumps({"event": "start", "case_id": case.case_id, "round": index}), flush=True)
        fresh = context.plan.suite["caches"] == "fresh"
        cache = cache_directory(context, case, index % draws)
        if fresh:
            cache = out / "caches" / f"fresh-{case.case_id}-{index}"
        row = observe.observe(
            context,
            Request(
                case=case, kind="timed", cache=cache, cache_state="fresh" if fresh else "seeded",
                cache_id=index if fresh else index % draws, round_id=name, order=position,
                steps_per_value=gate["steps_per_value"], options=gate.get("options", {}).get(case.case_id),
            ),
        )  # fmt: skip
        if fresh:
            observe.remove_tree(cache)
        bad += row["status"] != protocol.STATUS_OK
        tell(json.dumps({"event": "end", **{k: row[k] for k in TOLD}}), flush=True)
    return bad


def domain_of(out: Path, name: str) -> domains.Domain:
    """The domain of the group in a task's name."""
    group = name.partition(":")[2]
    return domains.of(Context.open(out).plan.groups[group][0].workload)


TOLD = ("case_id", "status", "reason", "wall_s", "kind", "role")


def cache_directory(context: Context, case: planning.Case, draw: int) -> Path:
    """Compile caches of one case, environment and draw, seeded by one cold compilation."""
    key = planning.digest([case.case_id, context.session["arms"][case.arm], context.session["session"]])
    return context.out / "caches" / f"{key}-{draw}"


def stop(signum: int, frame: Any) -> NoReturn:
    isolate.stopping.set()
    raise KeyboardInterrupt


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv: list[str]) -> int:
    """Exit codes: 0 done (failures are rows), 3 interrupted, 5 the disk is full."""
    signal.signal(signal.SIGTERM, stop)
    if len(argv) > 2:  # the launcher's process id: nothing goes on without it
        isolate.die_with(int(argv[2]))
    isolate.become_subreaper()
    out, name = Path(argv[0]), argv[1]
    try:
        if name.startswith("gate:"):
            domain_of(out, name).module("gate").run_gate(out, name.removeprefix("gate:"))
        elif name.startswith("details:"):
            domain_of(out, name).module("details").run_details(out, name.removeprefix("details:"))
        else:
            run_round(out, name)
    except KeyboardInterrupt:
        return 3
    except OSError as error:
        if error.errno not in DISK:
            raise
        with contextlib.suppress(OSError):
            print(json.dumps({"event": "disk", "reason": str(error.strerror)}), flush=True)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
