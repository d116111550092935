"""Where do the stacks differ? Manifest facts that are not alike in all arms of a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.store import Tables

NOT_REPORTED = "not reported"
PROVENANCE = ("library.", "option.")  # versions stand in the environment, options in their own table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """Facts of one group's manifests: `differing` by key and arm; `partial`, where those arms that report the
    fact agree; `alike` by key."""

    session: str
    group: str
    workload: str
    arms: tuple[str, ...]
    differing: Mapping[str, Mapping[str, str]]
    partial: Mapping[str, Mapping[str, str]]
    alike: Mapping[str, str]


def differences(tables: Tables) -> list[Differences]:
    """One for every group of which at least one arm reported facts."""
    cases = {(c["session"], c["case_id"]): c for c in tables.rows("cases")}
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in tables.rows("manifest"):
        case = cases.get((row["session"], row["case_id"]))
        if case is None or row["key"] is None or row["key"].startswith(PROVENANCE):
            continue
        group = found.setdefault((row["session"], case["group"]), {})
        group.setdefault(case["arm"], {})[row["key"]] = row["value"] or ""
    out = []
    for (session, name), facts in found.items():
        members = [c for c in cases.values() if (c["session"], c["group"]) == (session, name)]
        arms = tuple(c["arm"] for c in sorted(members, key=lambda c: c["position"] or 0) if c["arm"] in facts)
        keys = sorted({key for values in facts.values() for key in values})
        table = {key: {arm: facts[arm].get(key, NOT_REPORTED) for arm in arms} for key in keys}
        out.append(
            Differences(
                session=session, group=name, workload=members[0]["workload"] or "", arms=arms,
                differing={k: v for k, v in table.items() if kind_of(v) == "differing"},
                partial={k: v for k, v in table.items() if kind_of(v) == "partial"},
                alike={k: next(iter(v.values())) for k, v in table.items() if kind_of(v) == "alike"},
            )
        )  # fmt: skip
    rank = {(c["session"], c["group"]): i for i, c in reversed(list(enumerate(cases.values())))}
    return sorted(out, key=lambda d: rank[d.session, d.group])


def kind_of(values: Mapping[str, str]) -> str:
    """differing | partial | alike"""
    if len(set(values.values())) == 1:
        return "alike"
    return "partial" if len(set(values.values()) - {NOT_REPORTED}) == 1 else "differing"
