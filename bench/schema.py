"""Columns of every table, in one place: name, Polars dtype, meaning. Units stand in the names.

A table is Parquet under `tables/<table>/<session>.parquet`, built from artifacts and never edited; it can be
thrown away and built again. Missing columns are read as null and unknown ones ignored, so that old and new
results can be read together; `schema_version` stands in the Parquet metadata and in `runs`.
"""

from __future__ import annotations

from typing import Final

SCHEMA_VERSION: Final = 1

TEXT, INT, REAL, FLAG = "String", "Int64", "Float64", "Boolean"

TABLES: Final[dict[str, dict[str, str]]] = {
    "sessions": {
        "session": TEXT, "started": TEXT, "suite": TEXT, "seed": INT, "rounds_planned": INT,
        "cache_draws": INT, "caches": TEXT, "device_kind": TEXT, "device_name": TEXT, "device_class": TEXT,
        "peak_flops": TEXT, "cpus": INT, "threads": INT, "inputs": TEXT, "price_per_hour": REAL,
        "n_invocations": INT, "wall_s": REAL, "workers_s": REAL, "preparation_s": REAL,
        "harness_share": REAL, "schema_version": INT,
    },
    # every case of the plan in every session: what became of it, also where nothing ran
    "cases": {
        "session": TEXT, "case_id": TEXT, "group": TEXT, "workload": TEXT, "stack": TEXT, "arm": TEXT,
        "variant": TEXT, "axes": TEXT, "options": TEXT, "precision": TEXT, "position": INT, "planned": TEXT,
        "gate": TEXT, "reason": TEXT, "tokens_per_step": INT, "flops_per_step": INT,
        "flops_per_step_noncausal": INT, "flops_per_step_executed": INT,
    },
    "environments": {
        "env_id": TEXT, "session": TEXT, "python": TEXT, "versions": TEXT, "distributions_hash": TEXT,
        "agrees_with_lock": FLAG, "libraries": TEXT, "device_uuid": TEXT, "device_name": TEXT,
        "driver": TEXT, "cpu_model": TEXT, "cpus": INT, "memory_bytes": INT, "flags": TEXT, "git_sha": TEXT,
        "git_dirty": FLAG,
    },
    "runs": {
        "run_id": TEXT, "parent_run_id": TEXT, "kind": TEXT, "role": TEXT, "case_id": TEXT, "group": TEXT,
        "workload": TEXT, "stack": TEXT, "arm": TEXT, "axes": TEXT, "env_id": TEXT, "session": TEXT,
        "round_id": TEXT, "round_index": INT, "order": INT, "cache": TEXT, "cache_id": INT,
        "cache_changes": INT, "steps_per_value": INT, "status": TEXT, "reason": TEXT, "complete": FLAG,
        "superseded": FLAG,
        "tokens_per_step": INT, "flops_per_step": INT, "started": TEXT, "wall_s": REAL, "exit": INT,
        "device_uuid": TEXT, "schema_version": INT,
    },
    "processes": {
        "run_id": TEXT, "rank": INT, "role": TEXT, "host": TEXT, "device_uuid": TEXT, "clock_offset_ns": INT,
        "clock_error_ns": INT, "exit": INT,
    },
    "values": {
        "run_id": TEXT, "rank": INT, "index": INT, "is_warmup": FLAG, "steps": INT, "wall_ns": INT,
        "device_ns": INT, "loss": REAL,
    },
    "metrics": {
        "run_id": TEXT, "rank": INT, "phase": TEXT, "metric": TEXT, "value": REAL, "unit": TEXT,
        "censored": FLAG, "source": TEXT,
    },
    "parity": {
        "case_id": TEXT, "session": TEXT, "group": TEXT, "against": TEXT, "parameter": TEXT, "measure": TEXT,
        "error": REAL, "tolerance": REAL, "detail": TEXT,
    },
    # what could not be read while the tables were built
    "problems": {"session": TEXT, "place": TEXT, "problem": TEXT},
    "manifest": {"case_id": TEXT, "session": TEXT, "key": TEXT, "value": TEXT},
    "ceilings": {
        "device_uuid": TEXT, "metric": TEXT, "dtype": TEXT, "size": INT, "value": REAL, "unit": TEXT,
        "stack": TEXT,
    },
    "verdicts": {
        "question": TEXT, "verdict": TEXT, "effect": REAL, "low": REAL, "high": REAL, "n_rounds": INT,
        "device_class": TEXT, "source": TEXT, "evidence": TEXT,
    },
}  # fmt: skip
