"""The specification: published shapes, counted FLOPs, shared bits, and errors that name what is valid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import plan as planning
from bench import registry
from stacks.train import spec

# Parameters as the checkpoints' authors count them: a tied head once, the vocabulary without padding.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
}


# ------------------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    model = spec.MODELS[name]
    padding = (model.padded_vocab - model.vocab) * model.d_model * (1 if model.tied else 2)
    assert spec.parameter_count(model) - padding == PUBLISHED[name]


def test_moe_1b_has_about_one_billion_parameters() -> None:
    assert spec.parameter_count(spec.MODELS["moe-1b"]) == pytest.approx(1.02e9, rel=0.01)


@pytest.mark.parametrize("model", spec.MODELS.values(), ids=spec.MODELS)
def test_the_vocabulary_is_padded_and_no_name_comes_twice(model: spec.Model) -> None:
    assert model.padded_vocab % spec.VOCAB_MULTIPLE == 0
    assert 0 <= model.padded_vocab - model.vocab < spec.VOCAB_MULTIPLE
    names = [p.name for p in spec.parameters(model)]
    assert len(set(names)) == len(names)
    for p in spec.parameters(model):
        assert p.decay == (len(p.shape) > 1), "decay acts on matrices only"
        assert p.name == (p.key if p.layer is None else f"h.{p.layer}.{p.key}")
        if p.parts:
            assert [a for _, a, _ in p.parts] == [0, *(b for _, _, b in p.parts[:-1])]
            assert p.parts[-1][2] == p.shape[0]


def test_models_toml_errors_name_file_model_and_key(tmp_path: Path) -> None:
    row = 'family = "gpt2"\nlayers = 1\nd_model = 32\nheads = 4\nvocab = 8\nsequence = 8\nbatch = 1\n'
    path = tmp_path / "models.toml"
    for text, words in {
        f"[m]\n{row}width = 3": ["models.toml", "m", "'width'", "d_model"],
        "[m]\nlayers = 1": ["models.toml", "m", "family"],
        f"[m]\n{row}".replace("gpt2", "gpt9"): ["m", "'gpt9'", "llama"],
        f"[m]\n{row}".replace("heads = 4", "heads = 5"): ["m", "5 heads", "d_model 32"],
        f"[m]\n{row}".replace("heads = 4", "heads = 0"): ["models.toml", "m", "heads"],
        f"[m]\n{row}".replace("heads = 4", "heads = 'a'"): ["models.toml", "m", "heads"],
        f"[m]\n{row}".replace("gpt2", "moe"): ["m", "top_k"],
        f"[m]\n{row}cpu = {{ precision = 1 }}": ["models.toml", "m", "precision"],
        "m = 3": ["models.toml", "m"],
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=r".") as error:
            spec.load_models(path)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_survives_the_job_file() -> None:
    for model in spec.MODELS.values():
        assert spec.from_job(json.loads(json.dumps(dataclasses.asdict(model)))) == model


# -------------------------------------------------------------------------------------------------- FLOPs
def products(model: spec.Model, rows: int, t: int, *, executed: bool) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product of one forward pass over `rows` sequences of `t` tokens."""
    tokens, d, hd = rows * t, model.d_model, model.d_model // model.heads
    out = []
    for _ in range(model.layers):
        out.append((tokens, d, (model.heads + 2 * model.kv_heads) * hd))
        out += [(t, hd, t), (t, t, hd)] * (rows * model.heads)  # scores, and their product with the values
        out.append((tokens, model.heads * hd, d))
        if model.family == "gpt2":
            out += [(tokens, d, model.d_ff), (tokens, model.d_ff, d)]
        elif model.family == "llama":
            out += [(tokens, d, model.d_ff), (tokens, d, model.d_ff), (tokens, model.d_ff, d)]
        else:
            chosen = model.experts if executed else model.top_k
            out.append((tokens, d, model.experts))
            out += [(tokens, d, 2 * model.d_ff), (tokens, model.d_ff, d)] * chosen
    return [*out, (tokens, d, -(-model.vocab // 128) * 128)]


@pytest.mark.parametrize("model", spec.MODELS.values(), ids=spec.MODELS)
@pytest.mark.parametrize("executed", [False, True])
def test_flops_are_those_of_the_matrix_products(model: spec.Model, executed: bool) -> None:
    rows, t = 2, 32
    forward = sum(2 * m * k * n for m, k, n in products(model, rows, t, executed=executed))
    attention = model.layers * rows * model.heads * 2 * 2 * t * t * (model.d_model // model.heads)
    every = 3 * forward  # the backward pass makes two products of each
    noncausal = rows * t * spec.flops_per_token(model, t, causal=False, executed=executed)
    causal = rows * t * spec.flops_per_token(model, t, executed=executed)
    assert noncausal == every
    assert causal == every - 3 * attention // 2, "a causal mask leaves half of the scores"


# --------------------------------------------------------------------------------------------- shared bits
def lowbias32(path: str, index: int, seed: int) -> int:
    """The hash in Python's integers."""
    x = (index * 0x9E3779B9) % 2**32 ^ zlib.crc32(f"{seed}:{path}".encode())
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@settings(max_examples=200, deadline=None)
@given(
    path=st.text(max_size=40),
    indices=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    seed=st.integers(-(2**40), 2**40),
)
def test_the_hash_is_lowbias32(path: str, indices: list[int], seed: int) -> None:
    got = spec.hash_at(path, np.array(indices, np.uint32), seed)
    assert got.dtype == np.uint32
    assert got.tolist() == [lowbias32(path, i, seed) for i in indices]


def test_hash_bits_are_the_hash_from_a_start() -> None:
    start = 2**24 - 3
    got = spec.hash_bits("a.b", start, 7, 5)
    assert got.tolist() == [lowbias32("a.b", start + i, 5) for i in range(7)]


def test_initial_at_is_initial_looked_up() -> None:
    p = spec.parameters(spec.MODELS["gpt-tiny"])[0]
    index = np.array([0, 5, p.size - 1, 77])
    np.testing.assert_array_equal(spec.initial_at(p, index, 3), spec.initial(p, 3).ravel()[index])


SHAPES = {
    "one": (1,),
    "odd": (3, 5, 7),
    "matrix": (257, 129),
    "experts": (4, 31, 33),
    "exact-fp32-integers-end-here": (4097, 4099),  # 2^24 + 12,291 elements
}


def initial_parameters() -> list[spec.Parameter]:
    rows = [
        spec.Parameter(name=f"h.1.{n}.weight", shape=s, init="uniform", std=0.02) for n, s in SHAPES.items()
    ]
    rows.append(spec.Parameter(name="odd.std", shape=(1000,), init="uniform", std=0.02 / math.sqrt(96)))
    rows.append(spec.Parameter(name="ln.weight", shape=(5,), init="ones"))
    return [*rows, spec.Parameter(name="ln.bias", shape=(5,), init="zeros")]


PROGRAM = """
import hashlib, json, sys
import numpy as np
from stacks.train import spec
from tests.stacks.train.test_spec import initial_parameters
def make(p, seed):
    if sys.argv[1] == "torch_eager":
        from stacks.train import torch_eager
        return torch_eager.initial(p, seed, "cpu").numpy()
    from stacks.train import jax_xla
    return np.asarray(jax_xla.initial(p, seed))
out = {}
for p in initial_parameters():
    for seed in (0, 7)[: 1 + (p.size < 1 << 20)]:
        x = make(p, seed)
        assert x.dtype == np.float32 and x.shape == p.shape
        out[f"{p.name}/{seed}"] = hashlib.sha256(x.tobytes()).hexdigest()
print(json.dumps(out))
"""


@cache
def numpy_digests() -> dict[str, str]:
    return {
        f"{p.name}/{seed}": hashlib.sha256(spec.initial(p, seed).tobytes()).hexdigest()
        for p in initial_parameters()
        for seed in (0, 7)[: 1 + (p.size < 1 << 20)]
    }


@pytest.mark.parametrize(("stack", "distribution"), [("torch_eager", "torch"), ("jax_xla", "jax")])
def test_every_framework_makes_the_same_initial_bits(stack: str, distribution: str) -> None:
    if not planning.installed(distribution):
        pytest.skip(f"{distribution} not installed")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(registry.ROOT)}
    command = [sys.executable, "-c", PROGRAM, stack]
    done = subprocess.run(command, cwd=registry.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == numpy_digests()


def test_initial_values_are_uniform_with_the_stated_deviation() -> None:
    n = 1 << 20
    x = spec.initial(spec.Parameter(name="w", shape=(n,), init="uniform", std=0.02)).astype(np.float64)
    limit = 0.02 * math.sqrt(3)
    assert abs(x.mean()) < 5 * 0.02 / math.sqrt(n)
    assert x.std() == pytest.approx(0.02, rel=5 * 0.45 / math.sqrt(n))  # a uniform's kurtosis is 1.8
    assert -limit * 1.000001 <= x.min() < -0.999 * limit
    assert 0.999 * limit < x.max() <= limit * 1.000001
    counts = np.histogram(x, 256, (-limit, limit))[0]
    chi2 = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_values_do_not_follow_their_neighbours_paths_or_seeds() -> None:
    n = 1 << 18

    def centred(path: str, seed: int = 0) -> np.ndarray:
        return spec.hash_bits(path, 0, n, seed).astype(np.float64) / 2**32 - 0.5

    x = centred("h.0.attn.qkv.weight")
    others = {name: centred(name) for name in ("h.1.attn.qkv.weight", "h.0.attn.proj.weight", "wte.weight")}
    others |= {"another seed": centred("h.0.attn.qkv.weight", 1)}
    others |= {f"lag {lag}": np.roll(x, lag) for lag in (1, 2, 3, 64, 128, 768, 1024, 4096)}
    for name, y in others.items():
        assert abs((x * y).mean() * 12) < 5 / math.sqrt(n), name
    bits = spec.hash_bits("wte.weight", 0, n)
    for bit in range(32):
        share = float((bits >> np.uint32(bit) & np.uint32(1)).mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(n), f"bit {bit}"


# ------------------------------------------------------------------------------------------------ the step
def test_the_learning_rate_rises_linearly_and_falls_by_a_cosine() -> None:
    o, table = spec.OPTIMIZER, spec.lr_table()
    assert table.shape == (o.horizon,)
    assert table.dtype == np.float32
    for t in (1, 5, 10, 11, 500, 1000):
        if t <= o.warmup:
            rate = o.peak_lr * t / o.warmup
        else:
            share = (t - o.warmup) / (o.horizon - o.warmup)
            rate = o.peak_lr * (o.floor + (1 - o.floor) * (1 + math.cos(math.pi * share)) / 2)
        assert table[t - 1] == np.float32(rate), t
    assert table.argmax() == o.warmup - 1
    assert (np.diff(table[o.warmup - 1 :]) <= 0).all()
    assert table[-1] == np.float32(o.peak_lr * o.floor)


def test_every_precision_states_every_class_of_tensor() -> None:
    for name, table in spec.PRECISION.items():
        assert set(table) == {*spec.TENSOR_CLASSES, "matmul"}, name
        assert table["matmul"] in ("ieee", "tf32")
        assert {table[kind] for kind in spec.TENSOR_CLASSES} <= set(spec.BYTES)
        assert {table[kind] for kind in ("norm_statistics", "softmax", "loss")} == {"float32"}
    assert spec.AXES["precision"].values == tuple(spec.PRECISION)


def test_rope_turns_pairs_by_their_angle() -> None:
    model = spec.MODELS["llama-tiny"]
    cos, sin = spec.rope_tables(model, 16)
    assert cos.shape == sin.shape == (16, model.head_dim // 2)
    assert cos.dtype == sin.dtype == np.float32
    half = model.head_dim // 2
    angle = 5 * model.rope_theta ** (-3 / half)
    assert (cos[5, 3], sin[5, 3]) == (np.float32(math.cos(angle)), np.float32(math.sin(angle)))


def test_dropout_sites_and_threshold() -> None:
    model = spec.MODELS["gpt-tiny"]
    assert spec.dropout_sites(model)[:3] == ("embedding", "h.0.attn", "h.0.mlp")
    assert len(spec.dropout_sites(model)) == 1 + 2 * model.layers
    assert spec.dropout_threshold(0.25) == 2**30
    for rate in (0.1, 0.5, 0.9):
        bits = spec.hash_bits(spec.dropout_path(3, "h.0.mlp"), 0, 1 << 18)
        dropped = float((bits < spec.dropout_threshold(rate)).mean())
        assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / (1 << 18))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 2**31), name=st.text(max_size=20))
def test_sample_indices_are_ascending_unique_and_the_same_every_time(size: int, name: str) -> None:
    index = spec.sample_indices(name, size, 64, 1000)
    assert index.dtype == np.int64
    assert len(index) == size if size <= 1000 else 0 < len(index) <= 64
    assert (np.diff(index) > 0).all()
    assert len(index) == 0 or (index[0] >= 0 and index[-1] < size)
    again = spec.sample_indices.__wrapped__(name, size, 64, 1000)
    np.testing.assert_array_equal(index, again)


def test_samples_cover_a_large_tensor_evenly() -> None:
    index = spec.sample_indices("h.0.mlp.fc.weight", 10_000_000)
    assert len(index) > 4080  # of 4,096, few fall on the same element
    counts = np.histogram(index, 16, (0, 10_000_000))[0]
    assert abs(counts / len(index) - 1 / 16).max() < 5 * math.sqrt(15 / 256 / len(index))


# --------------------------------------------------------------------------------------------------- axes
def test_axes_have_all_defaults_of_their_device() -> None:
    model = spec.MODELS["gpt2-124m"]
    on_gpu, on_cpu = (spec.resolve_axes(model, {}, kind) for kind in ("cuda", "cpu"))
    assert list(on_gpu) == list(on_cpu) == list(spec.AXES)
    assert (on_gpu["batch"], on_gpu["sequence"]) == (32, 1024)
    assert (on_cpu["batch"], on_cpu["sequence"]) == (1, 128)
    assert spec.resolve_axes(model, {"batch": 4.0, "dropout": 0}, "cpu") | {"batch": 4, "dropout": 0.0} == (
        spec.resolve_axes(model, {"batch": 4, "dropout": 0.0}, "cpu")
    )
    assert type(spec.resolve_axes(model, {"batch": 4.0}, "cpu")["batch"]) is int


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"bacth": 3}, ["'bacth'", "batch", "sequence"]),
        ({"precision": "fp16"}, ["precision", "'fp16'", "bf16-pure"]),
        ({"precision": ["fp32"]}, ["precision", "['fp32']", "bf16-pure"]),
        ({"attention": True}, ["attention", "True", "best"]),
        ({"loss": 3}, ["loss", "3", "chunked"]),
        ({"batch": 0}, ["batch", "0", "at least 1"]),
        ({"batch": -1}, ["batch", "-1", "at least 1"]),
        ({"batch": 1.5}, ["batch", "1.5", "int"]),
        ({"batch": True}, ["batch", "True", "int"]),
        ({"batch": "x"}, ["batch", "'x'", "int"]),
        ({"batch": {"a": 1}}, ["batch", "{'a': 1}", "int"]),
        ({"batch": math.inf}, ["batch", "inf", "int"]),
        ({"batch": math.nan}, ["batch", "nan", "int"]),
        ({"sequence": 1}, ["sequence", "1", "at least 2"]),
        ({"sequence": 65}, ["sequence 65", "gpt-tiny", "64 positions"]),
        ({"dropout": 1.0}, ["dropout", "1.0", "below 1"]),
        ({"dropout": -0.1}, ["dropout", "-0.1", "at least 0"]),
        ({"dropout": math.nan}, ["dropout", "nan", "below 1"]),
        ({"batch": 8, "accumulation": 3}, ["batch 8", "accumulation 3"]),
        ({"batch": 1, "sequence": 3, "loss": "chunked"}, ["chunked", "3 tokens", "8"]),
    ],
)
def test_a_bad_axis_names_itself_its_value_and_what_is_valid(axes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        spec.resolve_axes(spec.MODELS["gpt-tiny"], axes, "cpu")
    assert all(word in str(error.value) for word in words), str(error.value)


# ------------------------------------------------------------------------------------------ memory, shapes
@pytest.mark.parametrize("model", spec.MODELS.values(), ids=spec.MODELS)
def test_memory_bounds_are_ordered(model: spec.Model) -> None:
    def both(**change: Any) -> tuple[int, int]:
        axes = spec.resolve_axes(model, change, "cuda")
        return spec.memory_lower_bound_bytes(model, axes), spec.memory_predicted_bytes(model, axes)

    low, predicted = both()
    n = spec.parameter_count(model)
    assert n * 16 < low < predicted, "fp32: weight, gradient and two moments are 16 bytes a parameter"
    assert both(loss="chunked")[0] < low
    assert both(remat="block")[1] < predicted
    assert both(precision="bf16-pure")[0] < both(precision="bf16")[0]
    assert both(batch=2 * model.batch)[1] > predicted


@pytest.mark.parametrize("model", spec.MODELS.values(), ids=spec.MODELS)
def test_small_keeps_the_family_and_every_axis_but_the_shape(model: spec.Model) -> None:
    axes = spec.resolve_axes(model, {"dropout": 0.1, "precision": "bf16", "loss": "chunked"}, "cuda")
    shape, small_axes = spec.small(model, axes)
    assert (shape.family, shape.tied, shape.experts, shape.top_k) == (
        model.family, model.tied, model.experts, model.top_k
    )  # fmt: skip
    assert spec.parameter_count(shape) < 5_000_000
    assert shape.head_dim <= 32
    assert (shape.kv_heads < shape.heads) == (model.kv_heads < model.heads)
    same = set(spec.AXES) - {"batch", "sequence", "accumulation"}
    assert {k: small_axes[k] for k in same} == {k: axes[k] for k in same}
    assert spec.resolve_axes(shape, small_axes, "cpu") == small_axes


def test_no_layers_are_a_model_too() -> None:
    model = dataclasses.replace(spec.MODELS["gpt-tiny"], layers=0)
    assert [p.name for p in spec.parameters(model)] == [
        "wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias",
    ]  # fmt: skip
    assert spec.flops_per_token(model, 64) == 6 * model.padded_vocab * model.d_model
    assert spec.dropout_sites(model) == ("embedding",)
