"""The gate where the timed shape is too large for float64: a small shape, then stack against stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import verify

ROOT = Path(__file__).resolve().parents[3]
SUITE = """
caches = "cold"
parity_steps = 4
reference_gflop = 0
[[matrix]]
workload = "train/moe-tiny"
arms = ["torch-eager:tuned", "torch-eager"]
axes = { batch = 2, sequence = 32 }
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_large_shapes_are_compared_with_each_other(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    (tmp_path / "large.toml").write_text(SUITE)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "run", str(tmp_path / "large.toml"), "--out", str(out), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "STACKBENCH_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (gate,) = [json.loads(p.read_text()) for p in (out / "gates").glob("*.json")]
    assert {row["status"] for row in gate["cases"].values()} == {"ok"}
    against = {row["against"] for row in gate["rows"] if row["measure"] == "weight"}
    assert against == {"float64, small shape", "itself, re-ordered", "torch-eager:tuned, timed shape"}
    roles = {json.loads(p.read_text())["role"] for p in out.glob("artifacts/*/run.json")}
    assert {"small shape", "timed shape", "timed shape, re-ordered"} <= roles


def test_forced_experts() -> None:
    ids = np.array([[[[0, 1], [2, 3]]]], np.int32)
    margin = np.array([[[1e-9, 0.5]]], np.float32)
    forced = verify.forced_routing({"routing/ids": ids, "routing/margin": margin}, 1e-5)
    assert forced.tolist() == [[[[0, 1], [-1, -1]]]]


def test_routing_counts_only_clear_choices() -> None:
    true = {
        "routing/ids": np.array([[[[0, 1], [2, 3]]]], np.int32),
        "routing/margin": np.array([[[1e-9, 0.5]]], np.float32),
    }
    order = {"routing/ids": np.array([[[[5, 6], [3, 2]]]], np.int32)}
    (row,) = verify.judge_routing(order, true, 1e-5)
    assert row.ok and "50.00%" in row.detail
    (row,) = verify.judge_routing({"routing/ids": np.array([[[[0, 1], [2, 4]]]], np.int32)}, true, 1e-5)
    assert not row.ok
    (row,) = verify.judge_routing({}, true, 1e-5)
    assert not row.ok


def test_error_levels_are_compared_with_the_median_of_the_others() -> None:
    rows = verify.judge_peers({"a": 1.0, "b": 1.1, "c": 2.5})
    assert rows["a"].ok and rows["b"].ok and not rows["c"].ok
    assert verify.judge_peers({"alone": 1.0}) == {}


def test_unreadable_parity_file(tmp_path: Path) -> None:
    path = tmp_path / "parity.safetensors"
    for content in (b"", b"\x00" * 64, b"\xff" * 16 + b"{}", (8).to_bytes(8, "little") + b'{"a":1}}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            verify.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        verify.read(tmp_path / "missing")
