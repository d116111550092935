"""The gate is sensitive: every planted fault is caught; and specific: legitimate variants pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from bench import verify

faults = pytest.importorskip("tests.faults", reason="torch is not installed", exc_type=ImportError)

from stacks.train import reference, spec, torch_eager  # noqa: E402

pytestmark = pytest.mark.xdist_group("gate")
OPTIONS = {"optimizer": "fused", "clip": "apart"}


def axes_of(model: spec.Model, **changed: Any) -> dict[str, Any]:
    return spec.resolve_axes(model, changed, "cpu")


@cache
def yardstick(family: str, precision: str, dropout: float = 0.0) -> Any:
    model = faults.small_model(family)
    return faults.Yardstick.of(model, axes_of(model, precision=precision, dropout=dropout))


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_caught(fault: Any) -> None:
    model = faults.small_model(fault.family)
    yard = yardstick(fault.family, fault.precision)
    axes = axes_of(model, precision=fault.precision)
    with fault.plant():
        rows = faults.judge(torch_eager.Trainer, model, axes, dict(fault.options), yard)
    status, reason = verify.verdict(rows)
    assert status == "not comparable", faults.distance(rows)
    assert reason


LEGITIMATE = [
    ("gpt2", "fp32", {}, {}),
    ("gpt2", "fp32", {"optimizer": "foreach"}, {}),
    ("gpt2", "fp32", {"clip": "folded"}, {}),
    ("gpt2", "fp32", {}, {"attention": "math"}),
    ("gpt2", "fp32", {}, {"remat": "block"}),
    ("gpt2", "fp32", {}, {"loss": "chunked"}),
    ("gpt2", "fp32", {}, {"accumulation": 2}),
    ("gpt2", "bf16", {}, {}),
    ("gpt2", "bf16", {"optimizer": "foreach"}, {"attention": "math"}),
    ("gpt2", "bf16", {"clip": "folded"}, {"remat": "block"}),
    ("gpt2", "bf16-pure", {}, {}),
    ("llama", "fp32", {}, {}),
    ("llama", "fp32", {}, {"attention": "math", "loss": "chunked"}),
    ("llama", "bf16", {}, {}),
    ("moe", "fp32", {}, {}),
    ("moe", "bf16", {}, {"remat": "block"}),
]


@pytest.mark.parametrize(("family", "precision", "options", "changed"), LEGITIMATE, ids=str)
def test_legitimate_variant_passes(
    family: str, precision: str, options: dict[str, Any], changed: dict[str, Any]
) -> None:
    model = faults.small_model(family)
    axes = axes_of(model, precision=precision, **changed)
    rows = faults.judge(torch_eager.Trainer, model, axes, OPTIONS | options, yardstick(family, precision))
    assert verify.verdict(rows) == ("ok", ""), faults.distance(rows)


@pytest.mark.parametrize("family", ["gpt2", "llama", "moe"])
def test_dropout_with_the_shared_masks_passes(family: str) -> None:
    model = faults.small_model(family)
    axes = axes_of(model, precision="fp32", dropout=0.1)
    rows = faults.judge(torch_eager.Trainer, model, axes, OPTIONS, yardstick(family, "fp32", 0.1))
    assert verify.verdict(rows) == ("ok", ""), faults.distance(rows)


def test_reference_passes_its_own_gate() -> None:
    model = faults.small_model("gpt2")
    yard = yardstick("gpt2", "fp32")
    options = {"arithmetic": "emulated", "order": "permuted"}
    rows = faults.judge(reference.Trainer, model, axes_of(model, precision="fp32"), options, yard)
    assert all(r.ok for r in rows if r.measure != "dtype"), faults.distance(rows)


def test_missing_and_misshapen_quantities_are_not_comparable() -> None:
    model, yard = faults.small_model("gpt2"), yardstick("gpt2", "fp32")
    for broken in ({}, {k: v[:1] for k, v in yard.exact.items()}):
        rows = verify.judge(model, "fp32", 0, broken, yard.exact, yard.emulated, "float64")
        assert verify.verdict(rows)[0] == "not comparable"


def test_nan_is_not_comparable() -> None:
    model, yard = faults.small_model("gpt2"), yardstick("gpt2", "fp32")
    poisoned = {k: v * float("nan") for k, v in yard.exact.items()}
    rows = verify.judge(model, "fp32", 0, poisoned, yard.exact, yard.emulated, "float64")
    assert verify.verdict(rows)[0] == "not comparable"
