"""The suite `quick` itself, shortened: every case passes the gate and is timed; no tracked file changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.xdist_group("whole-runs")
@pytest.mark.timeout(900)
def test_quick_runs(tmp_path: Path) -> None:
    for name in ("torch", "jax"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    before = git_status()
    out = tmp_path / "out"
    short = ["--rounds", "1", "--set", "values=1", "--set", "warmup_s=0.1", "--set", "parity_steps=5"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "run", "quick", "--out", str(out), *short],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    gates = [json.loads(path.read_text()) for path in sorted((out / "gates").glob("*.json"))]
    cases = {case: row for gate in gates for case, row in gate["cases"].items()}
    skipped = {case for case, row in cases.items() if row["status"] == "skipped"}
    assert len(cases) - len(skipped) >= 4, done.stderr
    assert {row["status"] for row in cases.values()} <= {"ok", "skipped"}, cases
    rows = [json.loads(path.read_text()) for path in out.glob("artifacts/*/run.json")]
    timed = [row for row in rows if row["kind"] == "timed"]
    bad = [row["reason"] for row in timed if row["status"] != "ok"]
    assert all(reason.startswith("not steady") for reason in bad), bad  # a shared machine may be restless
    assert {row["case_id"] for row in timed} == set(cases) - skipped
    assert git_status() == before


def git_status() -> str:
    """What git sees changed, or nothing outside a checkout."""
    done = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout
