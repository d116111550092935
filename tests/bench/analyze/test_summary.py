"""What a case cost: only passed gates and complete rounds count, and what is unknown stays unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import store
from bench.analyze import Analysis, analyze
from bench.analyze.summary import CaseSummary
from tests.fixtures.results import Results, make


def analysis(out: Path, **more: Any) -> Analysis:
    return analyze(store.load([out]), **more)


def case(found: Analysis, arm: str, workload: str = "train/gpt-tiny") -> CaseSummary:
    return next(c for c in found.cases if (c.arm, c.workload) == (arm, workload))


def test_a_good_run(tmp_path: Path) -> None:
    found = analysis(make(tmp_path / "r"), price_per_hour=3.6)
    eager = case(found, "torch-eager")
    assert found.exit_code == 0 and not found.failures and eager.status == "ok"
    assert eager.step_s.estimate == pytest.approx(0.0162, rel=0.03)
    assert eager.step_s.low is not None and eager.step_s.confidence == 0.96875 and eager.n_rounds == 6
    assert eager.tokens_per_s.estimate == pytest.approx(8 * 64 / (eager.step_s.estimate or 0))
    assert (eager.tokens_per_s.low or 0) < (eager.tokens_per_s.estimate or 0) < (eager.tokens_per_s.high or 0)
    assert eager.usd_per_gtoken.estimate == pytest.approx(1e-3 * 1e9 / (eager.tokens_per_s.estimate or 0))
    assert eager.mfu.estimate is None and "peak" in eager.mfu.reason  # a CPU's peak is not known
    assert eager.joules_per_token.estimate is None and eager.peak_allocated_bytes is None
    assert eager.pss_bytes == 6.1e8
    assert case(found, "torch-compile").compile_cold_s == pytest.approx(21.4, rel=0.01)
    assert case(found, "torch-compile").compile_seeded_s == pytest.approx(4.9, rel=0.01)


def test_mfu_and_energy_on_a_known_device(tmp_path: Path) -> None:
    out = make(tmp_path / "r", device="h200", precision="bf16", energy=True)
    one = case(analysis(out), "jax-xla")
    plan = json.loads((out / "plan.json").read_text())
    flops = next(c for c in plan["cases"] if c["case_id"] == one.case_id)
    step = one.step_s.estimate or 0
    assert one.mfu.estimate == pytest.approx(flops["flops_per_step"] / step / 989e12)
    assert one.mfu_noncausal.estimate == pytest.approx(flops["flops_per_step_noncausal"] / step / 989e12)
    assert one.joules_per_token.estimate == pytest.approx(100 * step / (8 * 64), rel=0.05)


def test_one_precision_has_a_peak_another_has_none(tmp_path: Path) -> None:
    out = make(tmp_path / "r", device="h200", precision="fp32")
    plan = json.loads((out / "plan.json").read_text())
    plan["device"]["peak_flops"] = {"bf16": 989e12, "fp32": "67e12"}
    (out / "plan.json").write_text(json.dumps(plan))
    assert all(c.mfu.estimate is None for c in analysis(out).cases)


def test_a_case_that_failed_the_gate_has_no_time(tmp_path: Path) -> None:
    out = make(tmp_path / "r")
    for path in (out / "gates").iterdir():
        gate = json.loads(path.read_text())
        for case_id, row in gate["cases"].items():
            if "torch-compile" in case_id:
                row.update(status="not comparable", reason="parity: loss of step 0")
        path.write_text(json.dumps(gate))
    found = analysis(out)
    one = case(found, "torch-compile")
    assert (one.status, one.reason, one.step_s.estimate) == ("not comparable", "parity: loss of step 0", None)
    assert not any(c.arm == "torch-compile" for c in found.comparisons) and found.exit_code == 1


def test_a_lost_gate_takes_the_times_with_it(tmp_path: Path) -> None:
    out = make(tmp_path / "r")
    shutil.rmtree(out / "gates")
    found = analysis(out)
    assert {c.status for c in found.cases} == {"not comparable"} and found.exit_code == 4


def test_statuses(tmp_path: Path) -> None:
    out = make(
        tmp_path / "r",
        gates={
            "torch-compile": ("failed", "out of memory: 1 GiB"),
            "jax-xla@gpt-tiny": ("skipped", "unsupported"),
        },
        skips={"torch-eager": "torch not installed"},
        fail=lambda w, a, i: "timeout: no end after 900 s" if "llama" in w else "",
    )
    found = analysis(out)
    told = {(c.workload, c.arm): (c.status, c.reason) for c in found.cases}
    assert told["train/gpt-tiny", "torch-compile"] == ("failed", "out of memory: 1 GiB")
    assert told["train/gpt-tiny", "jax-xla"] == ("skipped", "unsupported")
    assert told["train/gpt-tiny", "torch-eager"] == ("skipped", "torch not installed")
    assert told["train/llama-tiny", "jax-xla"] == ("failed", "timeout: no end after 900 s")
    assert found.exit_code == 4 and "Nothing was timed." in found.notes
    assert {f["kind"] for f in found.failures} == {"case"}


def test_a_run_that_ended_early(tmp_path: Path) -> None:
    out = make(tmp_path / "r")
    for path in (out / "artifacts").iterdir():
        shutil.rmtree(path)
    llama = next(p for p in (out / "gates").iterdir() if "llama" in p.name)
    llama.unlink()
    told = {c.workload: c.reason for c in analysis(out).cases}
    assert "no round" in told["train/gpt-tiny"] and "before its parity gate" in told["train/llama-tiny"]


def test_one_failed_observation_is_told_and_the_case_keeps_its_time(tmp_path: Path) -> None:
    out = make(
        tmp_path / "r",
        rounds=7,
        fail=lambda w, a, i: "crash: x" if (a, i) == ("jax-xla", 2) and "gpt" in w else "",
    )
    found = analysis(out)
    one = case(found, "jax-xla")
    assert one.status == "ok" and one.n_rounds == 6 and one.n_failed == 1 and one.step_s.low is not None
    assert [f["kind"] for f in found.failures] == ["observation"] and found.exit_code == 1
    eager = next(c for c in found.comparisons if c.arm == "torch-compile" and c.workload == "train/gpt-tiny")
    assert eager.speedup.n_rounds == 7  # the other two arms lost nothing


def test_few_rounds_give_a_number_without_an_interval(tmp_path: Path) -> None:
    found = analysis(make(tmp_path / "r", rounds=2))
    one = case(found, "jax-xla")
    assert one.step_s.estimate is not None and one.step_s.low is None and "needs 6" in one.step_s.reason
    assert found.exit_code == 0 and any("no interval" in note for note in found.notes)
    assert {c.verdict for c in found.comparisons} == {"no interval"}


def test_only_interrupted_rounds(tmp_path: Path) -> None:
    out = make(tmp_path / "r", rounds=1)
    for path in (out / "artifacts").iterdir():
        row = json.loads((path / "run.json").read_text())
        if row["kind"] == "timed" and row["arm"] == "torch-eager":
            shutil.rmtree(path)
    found = analysis(out)
    one = case(found, "jax-xla")
    assert (
        one.step_s.estimate is not None and one.n_rounds == 0 and "no round was finished" in one.step_s.reason
    )
    assert all(c.speedup.estimate is None for c in found.comparisons)


def test_cold_suites_measure_compilation_only(tmp_path: Path) -> None:
    found = analysis(make(tmp_path / "r", caches="cold"))
    one = case(found, "torch-compile")
    assert one.status == "ok" and one.measured and not one.timed
    assert one.compile_cold_s == pytest.approx(21.4, rel=0.01) and found.exit_code == 0
    assert any("Only compilation" in note for note in found.notes)


def test_sessions_are_kept_apart(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a", rounds=3), make(tmp_path / "b", rounds=3, seed=9)
    found = analyze(store.load([one, other]))
    assert len(found.cases) == 12 and {c.session for c in found.cases} == {"a/s1", "b/s1"}
    assert all(c.speedup.n_rounds == 3 for c in found.comparisons)
    assert any("2 sessions" in note for note in found.notes)


@pytest.mark.parametrize(
    ("draws", "word"), [(1, "One autotuning draw"), (2, "Two autotuning"), (3, "3 autotuning")]
)
def test_cache_draws_are_said(tmp_path: Path, draws: int, word: str) -> None:
    found = analysis(make(tmp_path / "r", cache_draws=draws))
    assert any(note.startswith(word) for note in found.notes)
    one = case(found, "jax-xla")
    assert one.n_draws == draws and one.n_cold == draws
    assert ("draws" in one.step_s.method) == (draws == 3)


def test_a_fixture_is_deterministic(tmp_path: Path) -> None:
    a, b = (analysis(Results().write(tmp_path / name)) for name in "ab")
    assert [c.step_s for c in a.cases] == [c.step_s for c in b.cases]
