"""The analysis as one JSON document with stable keys; unknown is null, infinite is the text "infinity"."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bench import schema
from bench.analyze import Analysis, loading
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.store import Tables


def document(command: str, tables: Tables, analysis: Analysis, *, page: str | None = None) -> dict[str, Any]:
    """Keys are added over time, never renamed."""
    found: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "command": command,
        "directories": [str(path) for path in tables.directories],
        "page": page,
        "exit_code": analysis.exit_code,
        "sessions": tables.rows("sessions"),
        "cases": [case_document(case) for case in analysis.cases],
        "comparisons": [
            {**dataclasses.asdict(c), "verdict": c.verdict, "sentence": words.verdict(c)}
            for c in analysis.comparisons
        ],
        "break_even": [dataclasses.asdict(row) for row in analysis.break_even],
        "differences": [dataclasses.asdict(row) for row in analysis.differences],
        "loading": [dataclasses.asdict(row) for row in analysis.loading],
        "claims": [
            {**row, "sentence": words.claim(row)}
            for row in loading.claims(analysis.comparisons, analysis.cases, analysis.loading)
        ],
        "parity": [dataclasses.asdict(row) for row in analysis.parity],
        "failures": analysis.failures,
        "notes": analysis.notes,
    }
    clean: dict[str, Any] = finite(found)
    return clean


def case_document(case: CaseSummary) -> dict[str, Any]:
    """A case without its raw values, which the tables hold; the run ids are the evidence."""
    row = dataclasses.asdict(dataclasses.replace(case, processes=()))
    row["run_ids"] = [p.run_id for p in case.processes]
    row["process_step_s"] = [p.step_s for p in case.processes]
    del row["processes"]
    return row


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
