"""Every stack trains every model family under every axis and option that a CPU can do.

Run as a program (`python -m tests.stacks.train.test_stacks STACK OUT.npz`) this file holds one framework,
makes all steps of one stack and writes what happened; as a test module it holds none, starts that program
once for each stack and judges what it wrote against the NumPy reference and `spec`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import plan as planning
from bench import registry
from stacks.train import reference, spec

STACKS = {name: stack for name, stack in registry.stacks("train").items() if stack.role == "stack"}
PYTHON = [name for name, stack in STACKS.items() if stack.file.suffix == ".py"]
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"d_ff": 64},
    "llama": {"kv_heads": 2, "d_ff": 48, "rope_theta": 100.0, "tied": False},
    "moe": {"kv_heads": 1, "d_ff": 48, "rope_theta": 100.0, "experts": 4, "top_k": 2},
}
AXES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "bf16-pure": {"precision": "bf16-pure"},
    "dropout": {"dropout": 0.1},
    "accumulation": {"accumulation": 2},
    "chunked": {"loss": "chunked"},
    "remat": {"remat": "block"},
    "all": {"dropout": 0.1, "accumulation": 2, "loss": "chunked", "remat": "block", "precision": "bf16"},
}
MANIFEST = {"matmul_precision", "attention_kernel", "graphs", "donation", "optimizer", "remat", "compile",
            "generator", "allocator", "threads", "options"}  # fmt: skip
STEPS = 3
SAMPLE = 65536  # elements of one dropout mask
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "bf16-pure": 2e-3}  # of the first loss, against float64
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "bf16-pure": 3e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One trainer: `gate` means shared dropout masks, so that the loss can be compared."""

    name: str
    family: str
    layers: int = 2
    axes: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    gate: bool = True

    @property
    def model(self) -> spec.Model:
        return spec.Model(
            name=self.family, family=self.family, layers=self.layers, d_model=32, heads=4, vocab=200,
            sequence=8, batch=4, **FAMILIES[self.family],
        )  # fmt: skip

    @property
    def full_axes(self) -> dict[str, Any]:
        return spec.resolve_axes(self.model, self.axes, "cpu")


def points(stack: registry.Stack) -> dict[str, Point]:
    """What is tried of a stack: every axis and option on GPT-2, what the families treat differently on the
    others. Compiling takes 3 s a point with XLA and 10 s with a C++ compiler: few points there."""
    default = dict(stack.variants["default"])
    depth = {f: 2 if f == "gpt2" and not stack.needs else 1 for f in FAMILIES}
    rows = [Point(name=f"{f}-default", family=f, layers=depth[f], options=default) for f in FAMILIES]
    if stack.needs:
        if "compiled" in stack.options.get("optimizer", []):
            options = default | {"optimizer": "compiled"}
            rows.append(Point(name="optimizer-compiled", family="gpt2", layers=1, options=options))
        return {p.name: p for p in rows}
    for family in FAMILIES:
        chosen = AXES if family == "gpt2" else {"all": AXES["all"]}
        rows += [
            Point(name=f"{family}-{k}", family=family, layers=2 if k == "all" else 1, axes=v, options=default)
            for k, v in chosen.items()
        ]
        rows.append(Point(name=f"{family}-layers-0", family=family, layers=0, options=default))
    for remat in ("none", "block"):
        axes = {"dropout": 0.5, "remat": remat}
        rows.append(Point(name=f"own-dropout-{remat}", family="gpt2", axes=axes, options=default, gate=False))
    for kind in sorted({*stack.axes.get("attention", {}).get("cpu", [])} - {"best"}):
        axes = {"attention": kind}
        name = f"llama-attention-{kind}"
        rows.append(Point(name=name, family="llama", layers=1, axes=axes, options=default))
    for option, values in stack.options.items():
        for value in [v for v in values if v != default[option]]:
            options, name = default | {option: value}, f"{option}-{value}"
            flags = option == "xla"  # which a CPU does not know: that they do no harm is soon seen
            rows.append(Point(name=name, family="gpt2", layers=0 if flags else 2, options=options))
            if not flags:
                rows.append(Point(name=f"{name}-all", family="moe", axes=AXES["all"], options=options))
    return {p.name: p for p in rows}


def batches_of(point: Point) -> np.ndarray:
    axes = point.full_axes
    shape = (STEPS, axes["batch"], axes["sequence"] + 1)
    return np.random.default_rng(1).integers(0, point.model.vocab, shape, dtype=np.int32)


def build(trainer: Any, point: Point, options: dict[str, Any], gate: bool) -> Any:
    return trainer(
        model=point.model, axes=point.full_axes, options=options, device="cpu", batches=batches_of(point),
        seed=0, threads=1, gate=gate, routing=None,
    )  # fmt: skip


# ----------------------------------------------------------------------------- the program: one framework
def tried(trainer: Any, point: Point) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays of a few steps."""
    t = build(trainer, point, dict(point.options), point.gate)
    losses, moments = [], {}
    for i in range(STEPS):
        t.step(i)
        t.wait()
        losses.append(t.loss())
        if i == 0:
            moments = {f"moment/{k}": np.array(v, np.float64) for k, v in t.first_moments()}
    weights = {f"weight/{k}": np.array(v, np.float64) for k, v in t.weights()}
    facts = {"losses": losses, "manifest": t.manifest(), "dtypes": t.dtypes(), "masks": []}
    masks = {}
    if not point.gate:
        sites = spec.dropout_sites(point.model)
        for step, site in [(0, sites[0]), (0, sites[1]), (0, sites[-1]), (1, sites[0])]:
            forward, backward = t.dropout_sample(step, site, SAMPLE)
            masks[f"forward/{step}/{site}"], masks[f"backward/{step}/{site}"] = forward, backward
    return facts, moments | weights | masks


def main(name: str, out: str) -> None:
    from bench.run.worker import load_stack

    stack = STACKS[name]
    module = load_stack(str(stack.file))
    everything: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for point in points(stack).values():
        try:
            everything[point.name], found = tried(module.Trainer, point)
        except Exception:
            everything[point.name], found = {"error": traceback.format_exc()}, {}
        arrays |= {f"{point.name}:{k}": v for k, v in found.items()}
    np.savez(out, facts=np.array(json.dumps(everything)), **arrays)


# ------------------------------------------------------------------------------------------------ the tests
@dataclasses.dataclass(frozen=True)
class Seen:
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def group(self, kind: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(kind): v for k, v in self.arrays.items() if k.startswith(kind)}


def run_stack(name: str, out: Path) -> None:
    """One process, one framework, all points of a stack, into `out`; a process that dies leaves its words."""
    stack = STACKS[name]
    with tempfile.TemporaryDirectory() as directory:
        places = {"cache": f"{directory}/cache", "platform": "cpu"}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(registry.ROOT)}
        env = {**os.environ, **threads, **{k: v.format(**places) for k, v in stack.variables.items()}}
        written = Path(directory) / "out.npz"
        command = [sys.executable, "-m", "tests.stacks.train.test_stacks", name, str(written)]
        done = subprocess.run(command, cwd=registry.ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            lost = {point: {"error": done.stderr[-4000:]} for point in points(stack)}
            np.savez(written, facts=np.array(json.dumps(lost)))
        shutil.copyfile(written, out)


def read(path: Path) -> dict[str, Seen]:
    with np.load(path, allow_pickle=False) as file:
        facts = json.loads(str(file["facts"]))
        seen = {point: Seen(row, {}) for point, row in facts.items()}
        for key in set(file.files) - {"facts"}:
            point, _, array = key.partition(":")
            seen[point].arrays[array] = file[key]
    return seen


RUNS: dict[str, dict[str, Seen]] = {}


@pytest.fixture
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Point, Seen]:
    """A point of a stack, and what happened there: run once, whichever test process comes first."""
    name, _, point = request.param.partition("/")
    stack = STACKS[name]
    missing = [d for d in stack.requires if not planning.installed(d)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    if "c++ compiler" in stack.needs and not planning.compiler():
        pytest.skip("no C++ compiler")
    if name not in RUNS:
        folder = tmp_path_factory.getbasetemp()
        folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        with (folder / f"stack-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            out = folder / f"stack-{name}.npz"
            if not out.exists():
                run_stack(name, out)
        RUNS[name] = read(out)
    found = RUNS[name][point]
    assert "error" not in found.facts, found.facts["error"]
    return points(stack)[point], found


def each(wanted: Any = lambda point: True) -> Any:
    """Parametrises a test by every point of every stack; one test process a stack, where xdist can."""
    rows = []
    for name in PYTHON:
        marks = [pytest.mark.xdist_group(f"stack-{name}"), pytest.mark.timeout(900)]
        if STACKS[name].framework == "jax" or STACKS[name].needs:
            marks.append(pytest.mark.slow)
        chosen = [p for p in points(STACKS[name]).values() if wanted(p)]
        rows += [pytest.param(f"{name}/{p.name}", marks=marks, id=f"{name}-{p.name}") for p in chosen]
    return pytest.mark.parametrize("seen", rows, indirect=True)


@cache
def expected(family: str, layers: int, axes: str) -> tuple[float, dict[str, np.ndarray]]:
    """The reference's first loss and first moments, in float64."""
    point = Point(name="", family=family, layers=layers, axes=json.loads(axes))
    options = {"arithmetic": "float64", "order": "natural"}
    t = build(reference.Trainer, point, options, gate=True)
    t.step(0)
    return t.loss(), dict(t.first_moments())


@each(lambda point: point.gate)
def test_the_first_step_is_the_references(seen: tuple[Point, Seen]) -> None:
    point, found = seen
    loss, moments = expected(point.family, point.layers, json.dumps(point.axes, sort_keys=True))
    precision = point.full_axes["precision"]
    assert np.isfinite(found.facts["losses"]).all()
    assert found.facts["losses"][0] == pytest.approx(loss, rel=TOLERANCE[precision])
    mine, whole = found.group("moment/"), np.sqrt(sum(np.sum(m**2) for m in moments.values()))
    error = np.sqrt(sum(np.sum((mine[k] - m) ** 2) for k, m in moments.items())) / whole
    assert error < GRADIENT_TOLERANCE[precision]


@each()
def test_tensors_have_their_canonical_names_and_shapes(seen: tuple[Point, Seen]) -> None:
    point, found = seen
    shapes = {p.name: p.shape for p in spec.parameters(point.model)}
    assert {k: v.shape for k, v in found.group("moment/").items()} == shapes
    assert {k: v.shape for k, v in found.group("weight/").items()} == shapes


@each()
def test_the_manifest_has_every_fact(seen: tuple[Point, Seen]) -> None:
    point, found = seen
    manifest = found.facts["manifest"]
    assert set(manifest) >= MANIFEST
    assert all(isinstance(v, str) and v for v in manifest.values())
    assert manifest["options"] == ", ".join(f"{k}={v}" for k, v in sorted(point.options.items()))
    assert manifest["remat"] == point.full_axes["remat"]
    assert ("compiled" in point.name) <= ("compile" in manifest["optimizer"])


@each(lambda point: point.layers)
def test_dtypes_are_the_precision_tables(seen: tuple[Point, Seen]) -> None:
    point, found = seen
    table = spec.PRECISION[point.full_axes["precision"]]
    assert found.facts["dtypes"] == {kind: [table[kind]] for kind in spec.TENSOR_CLASSES}


@each(lambda point: not point.gate)
def test_own_dropout_drops_its_share_alike_in_both_directions(seen: tuple[Point, Seen]) -> None:
    point, found = seen
    rate = point.axes["dropout"]
    forward, backward = found.group("forward/"), found.group("backward/")
    assert len(forward) == 4
    centred = []
    for key, mask in forward.items():
        np.testing.assert_array_equal(mask, backward[key])
        kept = mask != 0
        np.testing.assert_allclose(mask[kept], 1 / (1 - rate), rtol=1e-6)
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / SAMPLE)
        centred.append(kept - (1 - rate))
    sigma = rate * (1 - rate) / np.sqrt(SAMPLE)
    for i, a in enumerate(centred):
        assert all(abs((a * b).mean()) < 5 * sigma for b in centred[:i]), "masks of two sites or steps"


@each(lambda point: point.name == "own-dropout-block")
def test_recomputed_blocks_drop_the_same_elements(
    seen: tuple[Point, Seen], request: pytest.FixtureRequest
) -> None:
    """From the same seed, with and without recomputation, gradients agree: the backward pass saw the mask."""
    _, found = seen
    name = request.node.callspec.params["seen"].partition("/")[0]
    everything = RUNS[name]
    plain, without = everything["own-dropout-none"], everything["gpt2-default"]
    assert found.facts["losses"][0] == pytest.approx(plain.facts["losses"][0], rel=1e-5)
    assert found.facts["losses"][0] != pytest.approx(without.facts["losses"][0], rel=1e-4)
    for key, moment in plain.group("moment/").items():
        np.testing.assert_allclose(found.group("moment/")[key], moment, rtol=1e-3, atol=1e-7)


def test_every_stack_in_python_is_tried() -> None:
    assert {"jax-xla", "torch-eager", "torch-compile"} <= set(PYTHON)
    for name in PYTHON:
        assert {p.family for p in points(STACKS[name]).values()} == set(FAMILIES)


if __name__ == "__main__":
    main(*sys.argv[1:])
