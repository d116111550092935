"""The suite `input-quick` itself, shortened: every loader passes the gate and is timed; no file changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_quick import ROOT, git_status


@pytest.mark.slow
@pytest.mark.xdist_group("whole-runs")
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc and mincore")
def test_input_quick_runs(tmp_path: Path) -> None:
    for name in ("torch", "tokenizers", "fastokens"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    before = git_status()
    out = tmp_path / "out"
    short = ["--rounds", "1", "--set", "megabytes=4", "--set", "details=[]"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "run", "input-quick", "--out", str(out), *short],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gates = [json.loads(path.read_text()) for path in sorted((out / "gates").glob("*.json"))]
    cases = {case: row for gate in gates for case, row in gate["cases"].items()}
    assert len(gates) == 2 and len(cases) >= 7, done.stderr
    assert {row["status"] for row in cases.values()} == {"ok"}, cases
    rows = [json.loads(path.read_text()) for path in out.glob("artifacts/*/run.json")]
    timed = [row for row in rows if row["kind"] == "timed"]
    assert {row["case_id"] for row in timed if row["status"] == "ok"} == set(cases)
    assert git_status() == before
