"""How much faster is each arm than a baseline? Ratios over rounds that both took part in, in one session."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench import stats
from bench.analyze.summary import CaseSummary, Process
from bench.errors import UserError, did_you_mean
from bench.stats import Ratio

USUAL = ("torch-eager", "torch-dataloader")  # what others are compared with where nothing else was asked for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """`speedup` is the baseline's step time over the arm's: above 1 the arm is faster."""

    session: str
    group: str
    workload: str
    arm: str
    stack: str
    case_id: str
    baseline: str
    baseline_case_id: str
    speedup: Ratio

    @property
    def verdict(self) -> str:
        """faster | slower | no difference larger than the noise | no interval | not compared"""
        if self.speedup.estimate is None:
            return "not compared"
        if self.speedup.differs is None:
            return "no interval"
        if not self.speedup.differs:
            return "no difference larger than the noise"
        return "faster" if self.speedup.estimate > 1 else "slower"


def groups(cases: Sequence[CaseSummary]) -> dict[tuple[str, str], list[CaseSummary]]:
    """Cases that are compared with one another, by session and group, in order."""
    found: dict[tuple[str, str], list[CaseSummary]] = {}
    for case in cases:
        found.setdefault((case.session, case.group), []).append(case)
    return found


def compare(cases: Sequence[CaseSummary], baseline: str | None = None) -> list[Comparison]:
    """Every timed arm against the baseline of its group; groups without it are left out.

    Raises UserError where `baseline` names no arm at all.
    """
    if baseline is not None:
        check(cases, baseline)
    found: list[Comparison] = []
    for members in groups(cases).values():
        base = baseline_of(members, baseline)
        if base is not None:
            found += [against(base, case) for case in members if case is not base and case.timed]
    return found


def against(base: CaseSummary, case: CaseSummary) -> Comparison:
    return Comparison(
        session=case.session, group=case.group, workload=case.workload, arm=case.arm, stack=case.stack,
        case_id=case.case_id, baseline=base.arm, baseline_case_id=base.case_id,
        speedup=speedup(base, case),
    )  # fmt: skip


def check(cases: Sequence[CaseSummary], baseline: str) -> None:
    arms = list(dict.fromkeys(case.arm for case in cases))
    if baseline not in arms:
        raise UserError(
            f"--baseline {baseline!r} is no arm of these results{did_you_mean(baseline, arms)}",
            valid=arms,
            next_command=f"stackbench compare DIR --baseline {arms[0]}" if arms else "",
        )


def baseline_of(members: Sequence[CaseSummary], wanted: str | None) -> CaseSummary | None:
    """The timed case of the wanted arm; by default the usual one's, else the first that has a time."""
    timed = [case for case in members if case.timed]
    if wanted is not None:
        return next((case for case in timed if case.arm == wanted), None)
    return next((case for case in timed if case.arm in USUAL), timed[0] if timed else None)


def speedup(base: CaseSummary, case: CaseSummary) -> Ratio:
    """base / case over complete rounds in which both have a time."""
    pairs = paired(base.processes, case.processes)
    draws = [b.draw for _, b in pairs]
    return stats.ratio([a.step_s for a, _ in pairs], [b.step_s for _, b in pairs], draws)


def paired(a: Sequence[Process], b: Sequence[Process]) -> list[tuple[Process, Process]]:
    """Observations of the same complete round; the first of each arm, should a round hold more."""
    first: dict[str, Process] = {}
    for process in a:
        if process.complete:
            first.setdefault(process.round_id, process)
    seen: set[str] = set()
    found = []
    for process in b:
        if process.complete and process.round_id in first and process.round_id not in seen:
            seen.add(process.round_id)
            found.append((first[process.round_id], process))
    return found
