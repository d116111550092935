"""The reference is right: by finite differences, torch's autograd, scalar loops and its symmetries."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacks.train import reference, spec

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"heads": 2},
    "llama": {"heads": 4, "kv_heads": 2, "d_ff": 24, "rope_theta": 100.0},
    "moe": {"heads": 4, "kv_heads": 1, "d_ff": 12, "rope_theta": 100.0, "experts": 4, "top_k": 2},
}
FAMILIES = list(TINY)


def tiny(family: str, **change: Any) -> spec.Model:
    shape = {"layers": 2, "d_model": 16, "vocab": 100, "sequence": 8, "batch": 4}
    return spec.Model(name=f"{family}-test", family=family, **{**shape, **TINY[family], **change})


def trainer(model: spec.Model, *, arithmetic: str = "float64", order: str = "natural",
            routing: np.ndarray | None = None, **axes: Any) -> reference.Trainer:  # fmt: skip
    full = spec.resolve_axes(model, axes, "cpu")
    shape = (3, full["batch"], full["sequence"] + 1)
    batches = np.random.default_rng(1).integers(0, model.vocab, shape, dtype=np.int32)
    return reference.Trainer(
        model=model, axes=full, options={"arithmetic": arithmetic, "order": order}, device="cpu",
        batches=batches, seed=0, threads=1, gate=True, routing=routing,
    )  # fmt: skip


def roughen(t: reference.Trainer) -> reference.Trainer:
    """Weights at which no term of a gradient is small or zero by accident."""
    rng = np.random.default_rng(2)
    for name, w in t.stored.items():
        w *= 10 if w.ndim > 1 else 1
        w += rng.normal(0, 0.2, w.shape).astype(w.dtype)
        assert t.used[name] is w
    return t


def train(t: reference.Trainer, steps: int) -> list[float]:
    losses = []
    for i in range(steps):
        t.step(i)
        losses.append(t.loss())
    return losses


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))


# ---------------------------------------------------------------------------------------------- gradients
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", {}, {}),
    ("gpt2", {"tied": False}, {"dropout": 0.3, "accumulation": 2}),
    ("gpt2", {"sequence": 12}, {"sequence": 5}),  # more positions than tokens
    ("llama", {}, {"dropout": 0.2}),
    ("llama", {"tied": False}, {"accumulation": 2}),
    ("llama", {"kv_heads": 4}, {}),
    ("moe", {}, {"dropout": 0.2, "accumulation": 2}),
    ("moe", {"tied": False, "top_k": 3}, {}),
    ("moe", {"top_k": 4}, {}),  # every expert
    ("gpt2", {"layers": 0}, {"dropout": 0.1}),
    ("llama", {"layers": 0, "tied": False}, {}),
]


@pytest.mark.parametrize(("family", "shape", "axes"), VARIANTS)
def test_gradients_are_finite_differences(family: str, shape: dict[str, Any], axes: dict[str, Any]) -> None:
    t = roughen(trainer(tiny(family, **shape), **axes))
    _, gradients = t.loss_and_gradients(0)
    if t.routing() is not None:
        t.forced = t.routing()[0][None]  # a step across a choice of experts would jump
    rng = np.random.default_rng(3)
    assert gradients.keys() == t.parameters.keys()
    for name, w in t.stored.items():
        assert gradients[name].shape == w.shape
        places = [rng.normal(size=w.shape)]  # everywhere at once, and single elements
        for flat in rng.integers(0, w.size, 2):
            places.append(np.zeros(w.shape))
            places[-1].flat[flat] = 1
        before = w.copy()
        for place in places:
            ends = []
            for side in (1, -1):
                w[...] = before + side * 1e-5 * place
                ends.append(t.loss_and_gradients(0)[0])
            w[...] = before
            expected = (ends[0] - ends[1]) / 2e-5
            assert np.vdot(gradients[name], place) == pytest.approx(expected, rel=2e-6, abs=3e-9), name


def torch_loss(w: dict[str, Any], t: reference.Trainer, inputs: Any, targets: Any) -> Any:
    """The same model by torch's own operations. `w`: canonical name -> float64 leaf."""
    import torch
    import torch.nn.functional as F

    m, rate = t.model, t.axes["dropout"]
    b, n = inputs.shape

    def drop(x: Any, site: str) -> Any:
        bits = spec.hash_bits(spec.dropout_path(t.count, site), 0, x.numel()).reshape(x.shape)
        kept = torch.from_numpy(bits >= spec.dropout_threshold(rate))
        return x * kept * float(np.float32(1 / (1 - rate)))

    def norm(x: Any, name: str) -> Any:
        if m.family == "gpt2":
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], m.norm_eps)
        return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], m.norm_eps)

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def turn(x: Any) -> Any:  # RoPE as a product of complex numbers
        cos, sin = (torch.from_numpy(y.astype(np.float64)) for y in spec.rope_tables(m, n))
        z = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
        return torch.cat([z.real, z.imag], dim=-1)

    def attention(x: Any, name: str) -> Any:
        heads = linear(x, f"{name}.qkv").view(b, n, -1, m.head_dim).transpose(1, 2)
        q, k, v = heads.split([m.heads, m.kv_heads, m.kv_heads], dim=1)
        if m.family != "gpt2":
            q, k = turn(q), turn(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return linear(y.transpose(1, 2).reshape(b, n, -1), f"{name}.proj")

    def feed_forward(x: Any, name: str) -> Any:
        if m.family == "gpt2":
            return linear(F.gelu(linear(x, f"{name}.mlp.fc"), approximate="tanh"), f"{name}.mlp.proj")
        if m.family == "llama":
            gate, up = linear(x, f"{name}.mlp.gate_up").chunk(2, dim=-1)
            return linear(F.silu(gate) * up, f"{name}.mlp.down")
        top, ids = linear(x, f"{name}.moe.router").softmax(-1).topk(m.top_k, dim=-1)
        share = top / top.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(m.experts):
            gate, up = (x @ w[f"{name}.moe.gate_up.weight"][e].T).chunk(2, dim=-1)
            out = (F.gelu(gate, approximate="tanh") * up) @ w[f"{name}.moe.down.weight"][e].T
            y = y + (share * (ids == e)).sum(-1, keepdim=True) * out
        return y

    x = F.embedding(inputs, w["wte.weight"])
    if m.family == "gpt2":
        x = x + w["wpe.weight"][:n]
    x = drop(x, "embedding")
    for i in range(m.layers):
        x = x + drop(attention(norm(x, f"h.{i}.ln1"), f"h.{i}.attn"), f"h.{i}.attn")
        x = x + drop(feed_forward(norm(x, f"h.{i}.ln2"), f"h.{i}"), f"h.{i}.mlp")
    logits = norm(x, "ln_f") @ w.get("head.weight", w["wte.weight"]).T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "moe-tiny"])
def test_torch_autograd_and_adamw_agree(name: str) -> None:
    torch = pytest.importorskip("torch")
    model = dataclasses.replace(spec.MODELS[name], batch=2)
    t = trainer(model, dropout=0.1)
    w = {n: torch.from_numpy(x.copy()).requires_grad_() for n, x in t.weights()}
    o = spec.OPTIMIZER
    groups = [
        {"params": [w[p.name] for p in t.parameters.values() if p.decay == decay], "weight_decay": value}
        for decay, value in ((True, o.decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    for i in range(2):
        inputs, targets = (torch.from_numpy(x[i].astype(np.int64)) for x in (t.inputs, t.targets))
        loss = torch_loss(w, t, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        whole = math.sqrt(sum(float(x.grad.square().sum()) for x in w.values()))
        for n, g in t.loss_and_gradients(i)[1].items():
            scale = max(float(w[n].grad.norm()), 1e-6 * whole)
            assert np.linalg.norm(g - w[n].grad.numpy()) <= 1e-12 * scale, n
        torch.nn.utils.clip_grad_norm_(w.values(), o.clip)
        for group in optimizer.param_groups:
            group["lr"] = float(spec.lr_table()[i])
        optimizer.step()
        t.step(i)
        assert t.loss() == pytest.approx(loss.item(), rel=1e-13)
    for n, x in t.weights():
        assert np.abs(x - w[n].detach().numpy()).max() < 1e-11, n


def test_the_gradient_of_a_key_bias_is_zero() -> None:
    t = roughen(trainer(tiny("gpt2")))
    gradients = t.loss_and_gradients(0)[1]
    for p in t.parameters.values():
        for part, start, stop in p.parts:
            if part in p.zero_gradient:
                assert np.abs(gradients[p.name][start:stop]).max() < 1e-15
                assert np.abs(gradients[p.name][:start]).max() > 1e-6


# ---------------------------------------------------------------------------------------------- optimizer
@pytest.mark.parametrize(("scale", "active"), [(1.0, False), (40.0, True)])
def test_adamw_by_a_scalar_loop(scale: float, active: bool) -> None:
    """Twelve steps, past the warm-up, with clipping inactive and active, element by element."""
    t = trainer(tiny("llama", layers=1, d_model=8, heads=2, kv_heads=1, d_ff=8, vocab=20))
    rates, o = spec.lr_table(), spec.OPTIMIZER
    real = t.loss_and_gradients
    rng = np.random.default_rng(4)
    picks = {n: rng.integers(0, w.size, 5) for n, w in t.stored.items()}
    state = {n: [[float(t.stored[n].flat[i]), 0.0, 0.0] for i in picks[n]] for n in picks}
    for step in range(1, 13):
        loss, gradients = real(step)
        norm = math.sqrt(sum(float(x) ** 2 for g in gradients.values() for x in g.flat))
        gradients = {n: g * (scale * 0.5 / norm) for n, g in gradients.items()}  # norm 0.5, or 20
        t.loss_and_gradients = lambda index, out=(loss, gradients): out  # type: ignore[method-assign]
        t.step(step)
        norm = math.sqrt(sum(float(x) ** 2 for g in gradients.values() for x in g.flat))
        assert (norm > o.clip) == active
        factor = min(1.0, o.clip / (norm + o.clip_eps))
        lr = float(rates[step - 1])
        for name, elements in state.items():
            decay = o.decay if t.stored[name].ndim > 1 else 0.0
            for element, place in zip(elements, picks[name], strict=True):
                w, m, v = element
                g = float(gradients[name].flat[place]) * factor
                m = o.beta1 * m + (1 - o.beta1) * g
                v = o.beta2 * v + (1 - o.beta2) * g**2
                m_hat, v_hat = m / (1 - o.beta1**step), v / (1 - o.beta2**step)
                w = w * (1 - lr * decay) - lr * m_hat / (math.sqrt(v_hat) + o.eps)
                element[:] = w, m, v
    moments, weights = dict(t.first_moments()), dict(t.weights())
    for name, elements in state.items():
        for (w, m, _), place in zip(elements, picks[name], strict=True):
            assert weights[name].flat[place] == pytest.approx(w, rel=1e-13, abs=1e-15)
            assert moments[name].flat[place] == pytest.approx(m, rel=1e-12, abs=1e-18)


def test_the_first_moment_after_one_step_is_the_clipped_gradient() -> None:
    t = roughen(trainer(tiny("gpt2")))
    gradients = t.loss_and_gradients(0)[1]
    norm = math.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    t.step(0)
    for name, moment in t.first_moments():
        clipped = gradients[name] * min(1, 1 / (norm + 1e-6))
        np.testing.assert_allclose(moment / (1 - spec.OPTIMIZER.beta1), clipped, rtol=1e-12, atol=1e-18)


def test_the_learning_rate_stays_at_the_floor_after_the_horizon() -> None:
    a, o = reference.Arithmetic(None), spec.OPTIMIZER
    moved = []
    for t in (o.horizon, o.horizon + 500):
        w, m, v = np.zeros(1), np.ones(1), np.ones(1)
        reference.adamw(a, o, t, 1.0, 0.0, w, m, v, np.ones(1))
        moved.append(-w[0])
    assert moved == pytest.approx([o.peak_lr * o.floor] * 2, rel=1e-6)


# ------------------------------------------------------------------------------ axes that change no number
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axes", [{}, {"dropout": 0.25, "accumulation": 2}])
def test_permuted_is_natural_in_float64(family: str, axes: dict[str, Any]) -> None:
    runs = [trainer(tiny(family), order=order, **axes) for order in ("natural", "permuted")]
    losses = [train(t, 5) for t in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    different = 0.0
    for (name, a), (_, b) in zip(*(t.weights() for t in runs), strict=True):
        assert np.abs(a - b).max() < 1e-12, name
        different += np.mean(a != b)
    assert different > 0  # another order indeed
    for (name, a), (_, b) in zip(*(t.first_moments() for t in runs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14, err_msg=name)
    if family == "moe":
        (ids, margins), (permuted_ids, permuted_margins) = (t.routing() for t in runs)
        np.testing.assert_array_equal(ids, permuted_ids)
        np.testing.assert_allclose(margins, permuted_margins, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_is_the_mean_over_micro_batches(family: str) -> None:
    """With dropout too: the mask belongs to the whole batch, so micro-batches continue its index."""
    runs = [roughen(trainer(tiny(family), dropout=0.2, accumulation=n)) for n in (1, 4)]
    (loss, gradients), (split_loss, split) = (t.loss_and_gradients(1) for t in runs)
    assert loss == pytest.approx(split_loss, rel=1e-13)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, split[name], rtol=1e-9, atol=1e-14, err_msg=name)


def test_chunks_remat_and_sync_change_no_bit() -> None:
    plain = trainer(tiny("llama"))
    other = trainer(tiny("llama"), loss="chunked", remat="block", sync="every-step")
    assert train(plain, 2) == train(other, 2)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    family=st.sampled_from(FAMILIES), groups=st.integers(1, 3), kv=st.integers(1, 2), half=st.integers(1, 3),
    rows=st.integers(1, 3), accumulation=st.integers(1, 2), sequence=st.integers(2, 7), tied=st.booleans(),
)  # fmt: skip
def test_any_shape_has_gradients_that_no_order_changes(
    family: str, groups: int, kv: int, half: int, rows: int, accumulation: int, sequence: int, tied: bool
) -> None:
    heads = groups * kv
    model = tiny(family, heads=heads, kv_heads=kv, d_model=heads * 2 * half, d_ff=10, sequence=sequence,
                 batch=rows * accumulation, tied=tied)  # fmt: skip
    natural, permuted = (
        trainer(model, order=order, accumulation=accumulation) for order in ("natural", "permuted")
    )
    (loss, gradients), (other_loss, others) = (t.loss_and_gradients(0) for t in (natural, permuted))
    assert loss == pytest.approx(other_loss, rel=1e-13)
    for name, p in natural.parameters.items():
        g = permuted.order.undo(p, others[name])
        np.testing.assert_allclose(gradients[name], g, rtol=1e-8, atol=1e-13, err_msg=name)


# ---------------------------------------------------------------------------------------------- dropout
def test_dropout_masks_are_the_shared_bits_of_their_step() -> None:
    model = tiny("gpt2")
    t = trainer(model, dropout=0.25, accumulation=2)
    t.step(0)
    size = 4 * 8 * 16
    bits = spec.hash_bits(spec.dropout_path(1, "h.1.mlp"), 0, size).reshape(-1, 16)
    expected = np.where(bits >= spec.dropout_threshold(0.25), float(np.float32(1 / 0.75)), 0.0)
    masks = [t.masks(rows)("h.1.mlp") for rows in (np.arange(2), np.arange(2, 4))]
    np.testing.assert_array_equal(np.concatenate(masks), expected)
    assert not np.array_equal(masks[0], masks[1])
    assert np.mean(expected == 0) == pytest.approx(0.25, abs=0.08)


# ---------------------------------------------------------------------------------------------- experts
def test_routing_is_reported_by_descending_probability_and_can_be_forced() -> None:
    model = tiny("moe")
    free = roughen(trainer(model))
    loss = free.loss_and_gradients(0)[0]
    ids, margins = free.routing()
    assert ids.shape == (2, 32, 2)
    assert ids.dtype == np.int32
    assert margins.shape == (2, 32)
    assert (margins > 0).all()
    same = roughen(trainer(model, routing=ids[None, ..., ::-1].copy()))  # the order of a pair is no matter
    assert same.loss_and_gradients(0)[0] == loss
    np.testing.assert_array_equal(same.routing()[0], ids)
    forced = np.full((1, 2, 32, 2), -1, np.int32)
    forced[0, 0, 5] = sorted(set(range(4)) - set(ids[0, 5].tolist()))
    forced[0, 1, 7, 1] = next(e for e in range(4) if e not in ids[1, 7])
    for order in ("natural", "permuted"):
        t = trainer(model, routing=forced, order=order)
        source = roughen(trainer(model))
        for name, p in t.parameters.items():
            t.stored[name][...] = t.order.apply(p, source.stored[name])
        assert t.loss_and_gradients(0)[0] != loss
        used, margin = t.routing()
        assert set(used[0, 5]) == set(forced[0, 0, 5])
        assert forced[0, 1, 7, 1] in used[1, 7]
        assert len(set(used[1, 7])) == 2
        assert margin[0, 5] < 0
        assert margin[1, 7] < 0
        others = np.arange(32) != 5
        np.testing.assert_array_equal(used[0, others], ids[0, others])
    t.step(0)
    t.step(1)  # beyond the forced steps the router is free
    assert (t.routing()[1] > 0).all()


def test_shares_of_forced_experts_are_renormalised() -> None:
    """One layer, by a loop over tokens: the outputs of two experts, weighted by p / (p1 + p2)."""
    t = roughen(trainer(tiny("moe")))
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 16))
    forced = np.array([rng.permutation(4)[:2] for _ in range(6)])
    p = reference.Pass(t.a, t.model, 6, t.used, t.rope, t.masks(np.arange(4)), forced[None])
    y, _ = reference.moe(p, x, "h.0.moe")
    router, gate_up, down = (t.used[f"h.0.moe.{n}.weight"] for n in ("router", "gate_up", "down"))
    for token in range(6):
        e = np.exp(router @ x[token])
        expected = 0
        for expert in forced[token]:
            gate, up = np.split(gate_up[expert] @ x[token], 2)
            inner = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
            expected = expected + e[expert] / e[forced[token]].sum() * (down[expert] @ inner)
        np.testing.assert_allclose(y[token], expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------- precision
def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    return reference.round_mantissa(x.copy(), reference.MANTISSA_BITS_DROPPED[kind])


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bf16_rounding_is_bit_exact(patterns: list[int]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(patterns[0])
    x = np.concatenate([
        np.array(patterns, np.uint32),
        rng.integers(0, 2**32, 4096, dtype=np.uint32),
        rng.integers(0, 2**16, 4096, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000),  # ties
        np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x7FC00000], np.uint32),
    ]).view(np.float32)  # fmt: skip
    x = x[~np.isnan(x) | (x.view(np.uint32) == 0x7FC00000)]
    with np.errstate(over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(rounded(x, "bfloat16").view(np.uint32), expected.view(np.uint32))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from(["bfloat16", "tf32"]))
def test_rounding_is_idempotent_odd_and_within_half_a_unit(value: float, kind: str) -> None:
    x = np.full(1, value, np.float32)
    y = rounded(x, kind)
    bits = 23 - reference.MANTISSA_BITS_DROPPED[kind]
    assert rounded(y, kind) == y
    assert rounded(-x, kind) == -y
    assert abs(float(y[0]) - float(x[0])) <= max(abs(float(x[0])), 2.0**-126) * 2.0 ** -(bits + 1)


def test_products_have_the_error_of_their_precision() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(64, 256)), rng.normal(size=(256, 64))
    errors = {}
    for precision in spec.PRECISION:
        t = trainer(tiny("llama"), arithmetic="emulated", precision=precision)
        y = t.product(a.astype(np.float32), b.astype(np.float32))
        errors[precision] = distance(y, a.astype(np.float32).astype(float) @ b.astype(np.float32))
    exact = trainer(tiny("llama"), precision="bf16").product(a, b)  # float64, whatever the axis says
    assert distance(exact, a @ b) < 1e-15
    assert errors["fp32"] < 2e-6
    assert 1e-4 < errors["tf32"] < 1e-3
    assert 1e-3 < errors["bf16"] < 6e-3
    assert errors["bf16-pure"] == errors["bf16"]


# Greatest error of the loss over 5 steps, and of a parameter's gradient (as the method measures it).
EXPECTED = {"fp32": (1e-6, 1e-5), "tf32": (1e-4, 1e-2), "bf16": (2e-3, 6e-2), "bf16-pure": (3e-3, 6e-2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", list(EXPECTED))
def test_emulated_differs_from_float64_by_round_off(family: str, precision: str) -> None:
    loss_limit, gradient_limit = EXPECTED[precision]
    model, axes = tiny(family, d_model=32), {"precision": precision, "dropout": 0.1, "accumulation": 2}
    exact = trainer(model, **axes)
    forced = []
    gradients = exact.loss_and_gradients(0)[1]
    losses = []
    for i in range(5):
        exact.step(i)
        losses.append(exact.loss())
        forced.append(exact.routing()[0] if family == "moe" else 0)
    routing = np.stack(forced) if family == "moe" else None
    whole = math.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    for order in ("natural", "permuted"):
        t = trainer(model, arithmetic="emulated", order=order, routing=routing, **axes)
        worst = 0.0
        for name, g in t.loss_and_gradients(0)[1].items():
            assert g.dtype == np.float32
            g = t.order.undo(t.parameters[name], g).astype(float)
            error = np.linalg.norm(g - gradients[name])
            worst = max(worst, error / max(np.linalg.norm(gradients[name]), 1e-6 * whole))
        assert gradient_limit / 1000 < worst < gradient_limit
        assert train(t, 5) == pytest.approx(losses, rel=loss_limit)
        assert t.dtypes() == {kind: [spec.PRECISION[precision][kind]] for kind in spec.TENSOR_CLASSES}


def test_bf16_tensors_hold_bf16_values() -> None:
    t = trainer(tiny("llama"), arithmetic="emulated", precision="bf16-pure")
    t.step(0)
    for tensors in (t.stored, t.used, t.moments1, t.moments2):
        for name, x in tensors.items():
            np.testing.assert_array_equal(x, rounded(x, "bfloat16"), err_msg=name)
    mixed = trainer(tiny("llama"), arithmetic="emulated", precision="bf16")
    mixed.step(0)
    name = "h.0.attn.qkv.weight"
    assert not np.array_equal(mixed.stored[name], rounded(mixed.stored[name], "bfloat16"))
    np.testing.assert_array_equal(mixed.used[name], rounded(mixed.stored[name], "bfloat16"))


def test_float64_is_float64_throughout() -> None:
    t = trainer(tiny("moe"), precision="bf16-pure")
    t.step(0)
    assert t.dtypes() == {kind: ["float64"] for kind in spec.TENSOR_CLASSES}
    assert all(x.dtype == np.float64 for _, x in (*t.weights(), *t.first_moments()))


# ---------------------------------------------------------------------------------------------- interface
def test_stack_is_a_literal_and_the_interface_is_whole() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    literal = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "STACK")
    stack = ast.literal_eval(literal)
    assert stack["role"] == "reference"
    for variant in stack["variants"].values():
        assert all(value in stack["options"][option] for option, value in variant.items())
    t = trainer(tiny("gpt2"))
    assert math.isnan(t.loss())
    t.step(0)
    t.wait()
    assert t.loss() == pytest.approx(math.log(128), rel=0.02)
    assert t.routing() is None
    assert all(isinstance(v, str) for v in t.manifest().values())
    assert [n for n, _ in t.weights()] == [p.name for p in spec.parameters(t.model)]
    assert [x.shape for _, x in t.first_moments()] == [p.shape for p in spec.parameters(t.model)]


def test_initial_weights_are_the_shared_bits() -> None:
    for order in ("natural", "permuted"):
        weights = dict(trainer(tiny("moe"), order=order).weights())
        for p in spec.parameters(tiny("moe")):
            np.testing.assert_array_equal(weights[p.name], spec.initial(p, 0))


def test_training_learns() -> None:
    model = dataclasses.replace(spec.MODELS["llama-tiny"], layers=2)
    t = trainer(model, arithmetic="emulated", batch=2, sequence=32)
    t.inputs, t.targets = t.inputs[:1], t.targets[:1]  # one batch, again and again
    losses = train(t, 20)
    assert losses[-1] < losses[0] - 1


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda:0'; valid: cpu"):
        reference.Trainer(
            model=tiny("gpt2"), axes={}, options={}, device="cuda:0", batches=np.zeros((1, 1, 9), np.int32),
            seed=0, threads=1, gate=True, routing=None,
        )  # fmt: skip
