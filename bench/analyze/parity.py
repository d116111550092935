"""How far is each case from its tolerances? The worst quantity of every measure, as error over tolerance."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.store import Tables

MEASURES = ("loss", "gradient", "gradient_norm", "weight", "weight_norm", "dtype", "routing", "error_ratio")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """`distance` is error / tolerance of the worst quantity: at most 1 passes; inf for a missing one."""

    session: str
    group: str
    workload: str
    arm: str
    stack: str
    case_id: str
    measure: str
    parameter: str
    against: str
    error: float
    tolerance: float
    distance: float
    n: int


def distance_of(error: float | None, tolerance: float | None) -> float:
    """Error over tolerance; a NaN or a missing number is infinitely far."""
    if error is None or tolerance is None or math.isnan(error) or math.isnan(tolerance):
        return math.inf
    if error == 0:
        return 0.0
    return error / tolerance if tolerance > 0 else math.inf


def distances(tables: Tables) -> list[Distance]:
    cases = {(c["session"], c["case_id"]): c for c in tables.rows("cases")}
    worst: dict[tuple[str, str, str], tuple[float, dict[str, Any]]] = {}
    count: dict[tuple[str, str, str], int] = {}
    for row in tables.rows("parity"):
        if (row["session"], row["case_id"]) not in cases or not row["measure"]:
            continue
        key = (row["session"], row["case_id"], row["measure"])
        count[key] = count.get(key, 0) + 1
        distance = distance_of(row["error"], row["tolerance"])
        if key not in worst or distance > worst[key][0]:
            worst[key] = (distance, row)
    found = []
    for (session, case_id, measure), (distance, row) in worst.items():
        case = cases[session, case_id]
        found.append(
            Distance(
                session=session, group=case["group"], workload=case["workload"] or "", arm=case["arm"],
                stack=case["stack"] or "", case_id=case_id, measure=measure,
                parameter=row["parameter"] or "", against=row["against"] or "",
                error=math.inf if row["error"] is None else row["error"],
                tolerance=0.0 if row["tolerance"] is None else row["tolerance"],
                distance=distance, n=count[session, case_id, measure],
            )
        )  # fmt: skip
    rank = {name: i for i, name in enumerate(MEASURES)}
    position = {key: case["position"] or 0 for key, case in cases.items()}
    return sorted(
        found,
        key=lambda d: (d.session, position[d.session, d.case_id], rank.get(d.measure, len(rank)), d.measure),
    )
