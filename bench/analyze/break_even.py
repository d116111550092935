"""After how many steps has compiling paid for itself? Extra compile seconds over seconds saved a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.analyze.ratios import Comparison
from bench.analyze.summary import CaseSummary


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """Steps from the start until the arm has caught up with the baseline; None with a reason where never.

    `low` and `high` come from the interval of the step-time ratio, compile times taken as measured.
    """

    session: str
    group: str
    workload: str
    arm: str
    baseline: str
    cache: str  # cold | seeded
    extra_compile_s: float | None
    saved_s_per_step: float | None
    steps: float | None
    low: float | None
    high: float | None
    reason: str


def break_even(cases: Sequence[CaseSummary], comparisons: Sequence[Comparison]) -> list[BreakEven]:
    """Cold and seeded, for every comparison."""
    known = {(case.session, case.case_id): case for case in cases}
    found = []
    for comparison in comparisons:
        case = known[comparison.session, comparison.case_id]
        base = known[comparison.session, comparison.baseline_case_id]
        for cache in ("cold", "seeded"):
            name = f"compile_{cache}_s"
            found.append(one(comparison, base, getattr(case, name), getattr(base, name), cache))
    return found


def one(
    comparison: Comparison,
    base: CaseSummary,
    compile_s: float | None,
    base_compile_s: float | None,
    cache: str,
) -> BreakEven:
    speedup, step = comparison.speedup, base.step_s.estimate
    extra = None if compile_s is None or base_compile_s is None else compile_s - base_compile_s
    saved = None
    if speedup.estimate is not None and step is not None:
        saved = step * (1 - 1 / speedup.estimate)
    steps: float | None = None
    low: float | None = None
    high: float | None = None
    reason = ""
    if extra is None:
        reason = f"the {cache} compile time of one of the two is not known"
    elif saved is None or step is None:
        reason = "the two have no common round"
    elif speedup.differs is False:
        reason = "no difference larger than the noise"
    elif saved <= 0:
        reason = f"never: a step of {comparison.arm} takes longer than one of {comparison.baseline}"
    else:
        steps = max(0.0, extra / saved)
        if speedup.low is not None and speedup.high is not None:
            low = max(0.0, extra / (step * (1 - 1 / speedup.high)))
            high = max(0.0, extra / (step * (1 - 1 / speedup.low)))
    return BreakEven(
        session=comparison.session, group=comparison.group, workload=comparison.workload, arm=comparison.arm,
        baseline=comparison.baseline, cache=cache, extra_compile_s=extra, saved_s_per_step=saved, steps=steps,
        low=low, high=high, reason=reason,
    )  # fmt: skip
