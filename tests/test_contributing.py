"""CONTRIBUTING.md's recipe for a new stack, taken to the letter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = re.compile(r"<!-- file: (?P<path>\S+) -->\n```\w*\n(?P<text>.*?)```", re.DOTALL)
RUN = re.compile(r"<!-- run -->\n```sh\n(?P<text>.*?)```", re.DOTALL)


@pytest.mark.slow
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
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STACKBENCH_CACHE": str(tmp_path / "cache")}
    for line in lines:
        program, *arguments = line.split()
        assert program == "stackbench"
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", *arguments],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=850, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    out = tmp_path / "results" / "local" / "math"
    rows = [json.loads(p.read_text()) for p in out.glob("artifacts/*/run.json")]
    timed = [r for r in rows if r["kind"] == "timed" and r["status"] == "ok"]
    assert sorted(r["arm"] for r in timed) == ["torch-eager"] * 2 + ["torch-math"] * 2
    assert "torch-math" in done.stdout
    assert (out / "report.html").stat().st_size > 10_000
