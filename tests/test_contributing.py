"""CONTRIBUTING.md's recipe for a new stack, taken to the letter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.run.rounds import parse_round_id

ROOT = Path(__file__).resolve().parent.parent
FILE = re.compile(r"<!-- file: (?P<path>\S+) -->\n```\w*\n(?P<text>.*?)```", re.DOTALL)
RUN = re.compile(r"<!-- run -->\n```sh\n(?P<text>.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.xdist_group("whole-runs")
@pytest.mark.timeout(900)  # for hangs alone: three commands, on a machine that may be busy
def test_recipe_for_a_stack(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = {m["path"]: m["text"] for m in FILE.finditer(text)}
    assert len(files) == 2
    for path, content in files.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    lines = RUN.search(text)["text"].strip().splitlines()
    assert [line.split()[1] for line in lines] == ["plan", "run", "report"]
    # passive: threads of OpenMP that spin beside other tests slow a step a hundredfold
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STACKBENCH_CACHE": str(tmp_path / "cache"),
           "OMP_WAIT_POLICY": "passive"}  # fmt: skip
    restless = False  # a machine that tests keep busy may give no steady value: then a round's row says so
    for line in lines:
        program, *arguments = line.split()
        assert program == "stackbench"
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", *arguments],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=850, check=False,
        )  # fmt: skip
        bad = [said for said in done.stderr.splitlines() if said.startswith("not timed:")]
        restless |= bool(bad) and all("not steady" in said for said in bad)
        assert done.returncode in ((0, 1) if restless else (0,)), f"{line}\n{done.stdout}\n{done.stderr}"
    out = tmp_path / "results" / "local" / "math"
    rows = [json.loads(p.read_text()) for p in out.glob("artifacts/*/run.json")]
    timed = [r for r in rows if r["kind"] == "timed"]
    assert all(r["status"] == "ok" or r["reason"].startswith("not steady") for r in timed), timed
    seen = {(r["arm"], parse_round_id(r["round_id"])[2]) for r in timed}
    assert seen == {(arm, index) for arm in ("torch-eager", "torch-math") for index in (0, 1)}
    assert "torch-math" in done.stdout
    assert (out / "report.html").stat().st_size > 10_000
