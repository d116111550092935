"""Questions to the tables, one a file; `analyze` asks all that a report answers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.analyze.break_even import BreakEven
    from bench.analyze.differences import Differences
    from bench.analyze.loading import Loading
    from bench.analyze.parity import Distance
    from bench.analyze.ratios import Comparison
    from bench.analyze.summary import CaseSummary
    from bench.store import Tables


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Everything that report and compare show; pure data."""

    cases: list[CaseSummary]
    comparisons: list[Comparison]
    break_even: list[BreakEven]
    differences: list[Differences]
    parity: list[Distance]
    failures: list[dict[str, str]]
    notes: list[str]
    loading: list[Loading] = dataclasses.field(default_factory=list)

    def of(self, domain: str) -> Analysis:
        """The part about one kind of work; what names none (old results, foreign names) is training's."""
        from bench import domains

        def kind(workload: str) -> str:
            name = domains.named(workload)
            return name if name in domains.DOMAINS else "train"

        parts: dict[str, Any] = {
            name: [row for row in getattr(self, name) if kind(row.workload) == domain]
            for name in ("cases", "comparisons", "break_even", "differences", "parity", "loading")
        }
        return dataclasses.replace(self, **parts)

    @property
    def exit_code(self) -> int:
        """design.md: 4 no timed value, 1 a case failed or is not comparable, else 0."""
        if not any(c.measured for c in self.cases):
            return 4
        bad = ("failed", "not comparable", "unreadable")
        return 1 if any(f["status"] in bad for f in self.failures) else 0


def analyze(tables: Tables, *, baseline: str | None = None, price_per_hour: float | None = None) -> Analysis:
    """Raises UserError for a baseline that no group holds."""
    from bench.analyze import break_even, differences, loading, notes, parity, ratios, summary

    cases = summary.summarize(tables, price_per_hour)
    comparisons = ratios.compare(cases, baseline)
    loaders = loading.loadings(tables, cases)
    return Analysis(
        cases=cases,
        comparisons=comparisons,
        break_even=break_even.break_even(cases, [c for c in comparisons if compiled(c.workload)]),
        differences=differences.differences(tables),
        parity=parity.distances(tables),
        failures=notes.failures(tables, cases),
        notes=notes.notes(tables, cases, comparisons, loaders),
        loading=loaders,
    )


def compiled(workload: str) -> bool:
    """Whether a workload has compilations that may pay off: loading has none."""
    return not workload.startswith("load/")
