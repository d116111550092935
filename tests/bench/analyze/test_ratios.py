"""Ratios pair the arms of a round, break-even divides what compiling costs by what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import store
from bench.analyze import analyze
from bench.analyze.parity import distance_of
from bench.errors import UserError
from tests.fixtures.results import FIRST_S, STEP_S, make


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ratios") / "good")


def test_the_usual_baseline_is_torch_eager(good: Path) -> None:
    found = analyze(store.load([good])).comparisons
    assert {c.baseline for c in found} == {"torch-eager"} and len(found) == 4
    for c in found:
        assert c.speedup.estimate == pytest.approx(STEP_S["torch-eager"] / STEP_S[c.stack], rel=0.04)
        assert c.verdict == "faster" and c.speedup.n_rounds == 6 and c.speedup.confidence == 0.96875


def test_another_baseline_turns_the_ratio(good: Path) -> None:
    usual = {(c.group, c.arm): c for c in analyze(store.load([good])).comparisons}
    found = analyze(store.load([good]), baseline="jax-xla").comparisons
    turned = [c for c in found if c.arm == "torch-eager"]
    assert len(turned) == 2
    for c in turned:
        other = usual[c.group, "jax-xla"].speedup
        assert c.verdict == "slower" and c.speedup.estimate == pytest.approx(1 / (other.estimate or 0))
        assert c.speedup.low == pytest.approx(1 / (other.high or 0))


def test_an_unknown_baseline_is_the_users_to_correct(good: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'jax-xla'") as caught:
        analyze(store.load([good]), baseline="jax_xla")
    assert caught.value.valid == ["jax-xla", "torch-eager", "torch-compile"]


def test_equal_arms_do_not_differ(tmp_path: Path) -> None:
    out = make(tmp_path / "r", step_s=dict.fromkeys(STEP_S, 0.01), seed=3)
    found = analyze(store.load([out]))
    assert {c.verdict for c in found.comparisons} == {"no difference larger than the noise"}
    assert {b.reason for b in found.break_even} == {"no difference larger than the noise"}


def test_without_the_usual_baseline_the_first_timed_arm_is_taken(tmp_path: Path) -> None:
    out = make(tmp_path / "r", gates={"torch-eager": ("failed", "x")})
    found = analyze(store.load([out]))
    assert {c.baseline for c in found.comparisons} == {"jax-xla"}
    wanted = analyze(store.load([out]), baseline="torch-eager")
    assert not wanted.comparisons and any("baseline has no time" in note for note in wanted.notes)


def test_break_even(good: Path) -> None:
    rows = {(r.workload, r.arm, r.cache): r for r in analyze(store.load([good])).break_even}
    cold = rows["train/gpt-tiny", "torch-compile", "cold"]
    extra = FIRST_S["torch-compile"] - FIRST_S["torch-eager"]
    saved = STEP_S["torch-eager"] - STEP_S["torch-compile"]
    assert cold.extra_compile_s == pytest.approx(extra, rel=0.01)
    assert cold.steps == pytest.approx(extra / saved, rel=0.1)
    assert cold.low is not None and cold.high is not None and cold.low < (cold.steps or 0) < cold.high
    assert (rows["train/gpt-tiny", "torch-compile", "seeded"].steps or 0) < (cold.steps or 0)


def test_break_even_never(tmp_path: Path) -> None:
    out = make(tmp_path / "r", step_s={**STEP_S, "torch-compile": 0.03})
    rows = [r for r in analyze(store.load([out])).break_even if r.arm == "torch-compile"]
    assert rows and all(r.steps is None and r.reason.startswith("never") for r in rows)


@pytest.mark.parametrize(
    ("error", "tolerance", "distance"),
    [(1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (1e-9, 0.0, float("inf")), (float("nan"), 1.0, float("inf")),
     (float("inf"), 1.0, float("inf")), (None, 1.0, float("inf")), (1.0, None, float("inf"))],
)  # fmt: skip
def test_parity_distance(error: float | None, tolerance: float | None, distance: float) -> None:
    assert distance_of(error, tolerance) == distance


def test_parity_and_differences(tmp_path: Path) -> None:
    bad = ("not comparable", "parity: gradient of wte.weight: error 1.2e-05, tolerance 4.0e-06")
    found = analyze(store.load([make(tmp_path / "r", gates={"torch-compile": bad})]))
    over = [d for d in found.parity if d.distance > 1]
    assert {(d.arm, d.measure) for d in over} == {("torch-compile", "gradient")}
    one = found.differences[0]
    assert set(one.differing) == {"attention_kernel", "optimizer", "compile", "generator"}
    assert one.alike["matmul_precision"] == "highest" and not set(one.alike) & set(one.differing)
