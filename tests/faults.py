"""Faults planted in torch-eager's training step, and its legitimate variants: what the gate tells apart.

A fault is a way to make the trainer wrong. Each names the precision and the model in which it shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from bench import verify
from bench.run import worker
from bench.run.gate import ROUTER_MARGIN
from stacks.train import reference, spec, torch_eager

STEPS = 20
MODELS = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "kv_heads": 2, "d_ff": 96, "rope_theta": 10000.0},
    "moe": {
        "family": "moe",
        "kv_heads": 1,
        "d_ff": 64,
        "rope_theta": 10000.0,
        "experts": 4,
        "top_k": 2,
    },
}


def small_model(family: str) -> spec.Model:
    shape = MODELS[family]
    return spec.Model(
        name=f"{family}-gate", layers=2, d_model=64, heads=4, vocab=384, sequence=32, batch=4, **shape
    )


def batches(model: spec.Model) -> np.ndarray:
    """Zipf-like ids, as text has them: int32 [STEPS, batch, sequence + 1]."""
    bits = spec.hash_bits("gate batches", 0, STEPS * model.batch * (model.sequence + 1))
    uniform = (bits.astype(np.float64) + 0.5) / 2**32
    ids = np.floor(model.vocab**uniform) - 1
    return ids.astype(np.int32).reshape(STEPS, model.batch, model.sequence + 1)


class Silent:
    """A channel that keeps nothing."""

    def send(self, *args: Any, **fields: Any) -> None: ...

    def event(self, name: str) -> None: ...


def run(
    make: Callable[..., Any], model: spec.Model, axes: dict[str, Any], options: dict[str, Any],
    routing: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], Any]:  # fmt: skip
    """The parity arrays of a trainer, by the worker's own code, and the trainer."""
    trainer = make(
        model=model, axes=axes, options=options, device="cpu", batches=batches(model), seed=0, threads=1,
        gate=True, routing=routing,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "parity.safetensors")
        rule = {"steps": STEPS, "sample": 4096, "whole_up_to": 65536, "out": out}
        worker.run_gate(trainer, {"parity": rule}, Silent(), first=False)
        return verify.read(Path(out)), trainer


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """References of one model and axes: float64, and emulated in two orders."""

    exact: dict[str, np.ndarray]
    emulated: tuple[dict[str, np.ndarray], ...]
    routing: np.ndarray | None

    @classmethod
    def of(cls, model: spec.Model, axes: dict[str, Any]) -> Yardstick:
        options = {"arithmetic": "float64", "order": "natural"}
        exact, _ = run(reference.Trainer, model, axes, options)
        routing = None
        if model.family == "moe":
            routing = verify.forced_routing(exact, ROUTER_MARGIN[axes["precision"]])
        emulated = tuple(
            run(reference.Trainer, model, axes, {"arithmetic": "emulated", "order": order}, routing)[0]
            for order in ("natural", "permuted")
        )
        return cls(exact, emulated, routing)


def judge(
    make: Callable[..., Any], model: spec.Model, axes: dict[str, Any], options: dict[str, Any],
    yard: Yardstick,
) -> list[verify.Row]:  # fmt: skip
    """Every row of the gate for one trainer, its error level against the emulated references' included."""
    got, trainer = run(make, model, axes, options, yard.routing)
    precision = axes["precision"]
    rows = verify.judge(model, precision, 0, got, yard.exact, yard.emulated, "float64")
    facts = {f"dtype.{k}": ", ".join(v) for k, v in trainer.dtypes().items()}
    rows += verify.judge_dtypes(model, precision, facts)
    rows += verify.judge_routing(got, yard.exact, ROUTER_MARGIN[precision])
    levels = {"it": verify.level(model, got, yard.exact)}
    levels |= {str(i): verify.level(model, e, yard.exact) for i, e in enumerate(yard.emulated)}
    return [*rows, verify.judge_peers(levels)["it"]]


def distance(rows: list[verify.Row]) -> tuple[float, verify.Row]:
    """The worst quantity's error over its tolerance, and that row."""
    worst = max(rows, key=lambda r: r.error / r.tolerance if r.tolerance else float(r.error > 0) * 1e9)
    return worst.error / worst.tolerance if worst.tolerance else float(worst.error > 0) * 1e9, worst


# ------------------------------------------------------------------------------------------------ faults
@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    plant: Callable[[], Any]  # a context manager within which a trainer is made and run
    family: str = "gpt2"
    precision: str = "fp32"
    options: tuple[tuple[str, str], ...] = (("optimizer", "foreach"), ("clip", "apart"))


def patched(name: str, value: Any, place: Any = torch_eager) -> Callable[[], Any]:
    return lambda: mock.patch.object(place, name, value)


def optimizer(**changed: Any) -> Callable[[], Any]:
    """torch_eager sees another optimizer; the reference and the judge do not."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        true = torch_eager.Trainer.make_optimizer

        def make(self: Any) -> Any:
            made = true(self)
            for group in made.param_groups:
                group.update(changed)
            return made

        with mock.patch.object(torch_eager.Trainer, "make_optimizer", make):
            yield

    return plant


@contextlib.contextmanager
def no_bias_correction() -> Iterator[None]:
    """m and v used as they are: the rate scaled so that both corrections cancel out."""
    true = torch_eager.Trainer.update

    def update(self: Any) -> None:
        o, t = spec.OPTIMIZER, self.count + 1
        rates = self.rates
        factor = (1 - o.beta1**t) / (1 - o.beta2**t) ** 0.5
        self.rates = rates * factor
        true(self)
        self.rates = rates

    with mock.patch.object(torch_eager.Trainer, "update", update):
        yield


@contextlib.contextmanager
def vectors_decay() -> Iterator[None]:
    with optimizer(weight_decay=spec.OPTIMIZER.decay)():
        yield


def attention(change: Callable[..., dict[str, Any]]) -> Callable[[], Any]:
    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        true = F.scaled_dot_product_attention

        def changed(q: Any, k: Any, v: Any, **named: Any) -> Any:
            return true(q, k, v, **change(q, **named))

        with mock.patch.object(F, "scaled_dot_product_attention", changed):
            yield

    return plant


def mask_off_by_one(q: Any, **named: Any) -> dict[str, Any]:
    t = q.shape[-2]
    mask = torch.ones(t, t, dtype=torch.bool).tril(diagonal=1)
    return {**named, "is_causal": False, "attn_mask": mask}


def unscaled(q: Any, **named: Any) -> dict[str, Any]:
    return {**named, "scale": 1.0}


@contextlib.contextmanager
def last_token_dropped() -> Iterator[None]:
    true = F.cross_entropy

    def changed(logits: Any, targets: Any, **named: Any) -> Any:
        return true(logits[:-1], targets[:-1], **named)

    with mock.patch.object(F, "cross_entropy", changed):
        yield


@contextlib.contextmanager
def untied_gradient() -> Iterator[None]:
    """The head's share of the embedding's gradient is lost."""
    true = torch_eager.Transformer.loss

    def loss(self: Any, x: Any, targets: Any) -> Any:
        weight = self.head.weight
        return F.cross_entropy(F.linear(x, weight.detach()).float(), targets) + 0 * true(
            self, x.detach(), targets
        )

    with mock.patch.object(torch_eager.Transformer, "loss", loss):
        yield


@contextlib.contextmanager
def wrong_rope_base() -> Iterator[None]:
    def tables(model: spec.Model, sequence: int) -> Any:
        return spec.rope_tables(dataclasses.replace(model, rope_theta=500000.0), sequence)

    with mock.patch.object(torch_eager, "spec", Shadow(rope_tables=tables)):
        yield


class Shadow:
    """`spec` with some names replaced, for torch_eager alone."""

    def __init__(self, **changed: Any) -> None:
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(spec, name)


@contextlib.contextmanager
def not_renormalised() -> Iterator[None]:
    def forward(self: Any, x: Any) -> Any:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        probability = F.linear(x.float(), self.router.weight.float()).softmax(dim=-1)
        ids = self.choose(probability)
        combine = torch.zeros_like(probability).scatter(1, ids, probability.gather(1, ids))
        gate, up = torch.einsum("nd,efd->enf", x, self.gate_up.weight).chunk(2, dim=-1)
        out = torch.einsum("enf,edf->end", F.gelu(gate, approximate="tanh") * up, self.down.weight)
        return torch.einsum("end,ne->nd", out.float(), combine).to(x.dtype).view(shape)

    with mock.patch.object(torch_eager.Experts, "forward", forward):
        yield


@contextlib.contextmanager
def stale_rate() -> Iterator[None]:
    table = spec.lr_table()
    with mock.patch.object(
        torch_eager, "spec", Shadow(lr_table=lambda: np.concatenate([table[:1], table[:-1]]))
    ):
        yield


@contextlib.contextmanager
def clipped_after() -> Iterator[None]:
    with mock.patch.object(torch_eager.Trainer, "clip", lambda self, masters: None):
        yield


@contextlib.contextmanager
def fp32_residual() -> Iterator[None]:
    """The stream between blocks in fp32, where the table says bf16."""
    true = torch_eager.Block.forward

    def forward(self: Any, x: Any, rope: Any) -> Any:
        feed_forward = self.moe if hasattr(self, "moe") else self.mlp
        x = x.float() + self.attn(self.ln1(x.bfloat16()), rope).float()
        return x + feed_forward(self.ln2(x.bfloat16())).float()

    final = torch_eager.Transformer.loss

    def loss(self: Any, x: Any, targets: Any) -> Any:
        return final(self, x.bfloat16(), targets)

    class Norm(torch_eager.LayerNorm):
        def forward(self, x: Any) -> Any:
            return super().forward(x.bfloat16())

    assert true
    with (
        mock.patch.object(torch_eager.Block, "forward", forward),
        mock.patch.object(torch_eager.Transformer, "loss", loss),
        mock.patch.object(torch_eager, "LayerNorm", Norm),
    ):
        yield


@contextlib.contextmanager
def bf16_statistics() -> Iterator[None]:
    with mock.patch.object(torch_eager.LayerNorm, "forward", torch.nn.LayerNorm.forward):
        yield


@contextlib.contextmanager
def bf16_loss() -> Iterator[None]:
    def loss(self: Any, x: Any, targets: Any) -> Any:
        return F.cross_entropy(self.head(x), targets)

    with mock.patch.object(torch_eager.Transformer, "loss", loss):
        yield


def other_table(**changed: str) -> Callable[[], Any]:
    """torch_eager builds another row of the precision table under the name asked for."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        rows = {**spec.PRECISION, "bf16": {**spec.PRECISION["bf16"], **changed}}
        with mock.patch.object(torch_eager, "spec", Shadow(PRECISION=rows)):
            yield

    return plant


@contextlib.contextmanager
def bf16_moments() -> Iterator[None]:
    """First and second moments kept in bf16 between steps."""
    true = torch_eager.Trainer.update

    def update(self: Any) -> None:
        for state in self.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].float()
        true(self)
        for state in self.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].bfloat16()

    with mock.patch.object(torch_eager.Trainer, "update", update):
        yield


FAULTS = (
    Fault("epsilon of the optimizer (1e-6 for 1e-8)", optimizer(eps=1e-6)),
    Fault("bias correction missing", no_bias_correction),
    Fault("weight decay missing", optimizer(weight_decay=0.0)),
    Fault("weight decay on vectors", vectors_decay),
    Fault("causal mask off by one", attention(mask_off_by_one)),
    Fault("unscaled attention", attention(unscaled)),
    Fault("last token dropped", last_token_dropped),
    Fault("untied embedding gradient", untied_gradient),
    Fault("wrong RoPE base", wrong_rope_base, family="llama"),
    Fault("expert weights not renormalised", not_renormalised, family="moe"),
    Fault("stale learning rate", stale_rate),
    Fault("clipping after the update", clipped_after),
    Fault("fp32 residual in bf16", fp32_residual, precision="bf16"),
    Fault("bf16 statistics", bf16_statistics, precision="bf16"),
    Fault("bf16 loss", bf16_loss, precision="bf16"),
    Fault("bf16 moments", bf16_moments, precision="bf16"),
    Fault("no masters", other_table(weights="bfloat16", accumulation="bfloat16", moments="bfloat16"),
          precision="bf16"),
)  # fmt: skip
