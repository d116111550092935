"""A suite of loaders through calibration, gate, rounds, details and report; and loaders with faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import registry
from tests.fixtures.runs import OUTSIDE

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("loaders"),
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and mincore"),
]  # fmt: skip
FAULTS = {  # arm: what the gate, or the timed run, says of it
    "drop-last": "parity: documents: 2 of ",
    "twice": "parity: documents: 0 of ",
    "open": "parity: padding: ",
    "dtype": "parity: dtype: ",
    "shape": "parity: ",
    "padding": "parity: padding: ",
    "special": "parity: documents: ",
    "order": "parity: order: ",
    "crash": "crash: RuntimeError: this loader always crashes",
    "timed": "wrong tokens: ",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def stackbench(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.cli", *words], cwd=registry.ROOT, capture_output=True, text=True,
        env={**os.environ, "STACKBENCH_CACHE": str(cache)}, timeout=850, check=False,
    )  # fmt: skip


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(out.glob("artifacts/*/run.json"))]
    return [row for row in found if row["kind"] == kind]


def metrics(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    lines = (out / "artifacts" / row["run_id"] / "messages.jsonl").read_text().splitlines()
    messages = [json.loads(line) for line in lines]
    return {m["metric"]: m["value"] for m in messages if m["type"] == "metric"}


def test_loaders_are_calibrated_proved_timed_and_reported(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    words = ["loaders", "--path", str(OUTSIDE), "--out", str(out), "--set", "calibrate=true"]
    done = stackbench(cache, "run", *words)
    assert done.returncode == 0, done.stderr
    (path,) = (out / "gates").glob("*.json")
    gate = json.loads(path.read_text())
    assert {row["status"] for row in gate["cases"].values()} == {"ok"}
    by_arm = {case_id.split(".")[2]: options for case_id, options in gate["options"].items()}
    best = by_arm["plain-loader"]
    assert (best["pause_ms"], best["start"]) == (0, "plain") and by_arm["plain-loader-fast"] == {
        "pause_ms": 0
    }
    assert any(row["tokens_per_s"] is None for row in gate["tried"]), "the point that crashes"
    assert len(rows(out, "calibration")) == len(gate["tried"]) == 1 + 2 + 1 + 1
    timed = rows(out, "timed")
    assert [row["status"] for row in timed] == ["ok"] * 4
    check_timed(out, timed)
    assert {row["kind"] for kind in ("consumer", "breakdown") for row in rows(out, kind)} == {
        "consumer", "breakdown",
    }  # fmt: skip
    breakdown = metrics(out, rows(out, "breakdown")[0])
    assert breakdown["stage.tokenize"] > 0 and breakdown["bytes_pickled_per_batch"] == 0
    check_report(cache, out)
    again = stackbench(cache, "run", *words, "--resume")
    assert again.returncode == 0 and len(rows(out, "timed")) == 4, again.stderr


def check_timed(out: Path, timed: list[dict[str, Any]]) -> None:
    for row in timed:
        found = metrics(out, row)
        assert 0 < found["time_to_first_batch_s"] < found["total_s"]
        assert found["cpu_s_per_mtok"] > 0 and found["pss_bytes"] > 1e6
        assert found["page_cache_resident_share"] == 1.0
        assert 0 <= found["padding_share"] < 0.05
        job = json.loads((out / "artifacts" / row["run_id"] / "job.json").read_text())
        assert len(job["cpus"]) == job["threads"] == 1 and "files" not in job


def check_report(cache: Path, out: Path) -> None:
    done = stackbench(cache, "report", str(out))
    assert done.returncode == 0, done.stderr
    assert "hf tokenizer: " in done.stdout and "CPU s/M" in done.stdout
    page = (out / "report.html").read_text()
    for words in ("the same batches from every loader", "Tokens a second, by tokenizer", "Where the CPU time",
                  "Time to the first batch", "Memory of the process tree", "At which options"):  # fmt: skip
        assert words in page, words
    assert "training step" not in page.split("<footer>")[0].split("<h1>")[1].split("</h1>")[0]
    assert str(registry.ROOT) not in page
    done = stackbench(cache, "compare", str(out), "--baseline", "plain-loader:fast", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (claim,) = document["claims"]
    assert claim["tokenizer"] == "hf" and claim["sentence"].startswith("hf tokenizer: plain-loader is ")
    assert document["loading"][0]["stages"]["tokenize"] > 0


def test_every_fault_is_caught(tmp_path: Path, cache: Path) -> None:
    suite = tmp_path / "faults.toml"
    arms = ["plain-loader:kept", *FAULTS]
    suite.write_text(
        f'device = "cpu"\nrounds = 1\ndetails = []\n[[matrix]]\nworkload = "load/synthetic"\narms = {arms}\n'
        'axes = { tokenizer = "hf", megabytes = 1, batch = 4, sequence = 255, cores = 1 }\n'
        + "".join(
            f'[arms.{name}]\nstack = "plain-loader"\nvariables = {{ PLAIN_FAULT = "{name}" }}\n'
            for name in FAULTS
        )
    )
    out = tmp_path / "out"
    done = stackbench(cache, "run", str(suite), "--path", str(OUTSIDE), "--out", str(out))
    assert done.returncode == 1, done.stderr
    (path,) = (out / "gates").glob("*.json")
    reasons = {i.split(".")[2]: row["reason"] for i, row in json.loads(path.read_text())["cases"].items()}
    timed = {row["arm"]: row for row in rows(out, "timed")}
    kept = timed["plain-loader:kept"]
    assert reasons["plain-loader-kept"] == "" and (kept["status"], kept["cache_changes"]) == ("ok", 0)
    assert len(rows(out, "prepare")) == 1
    for name, words in FAULTS.items():
        reason = reasons[name] or timed[name]["reason"]
        assert reason.startswith(words), (name, reason)
        assert f".{name}." in done.stderr
    assert set(timed) == {"plain-loader:kept", "timed"}
