"""The training work, framework-free: shapes, parameters, initial bits, FLOPs, precision and the fixed step.

Every stack of `stacks/train` builds what stands here; `reference.py` builds it in float64. Nothing in this
file imports a framework, and numpy is imported only where arrays are made, so that planning stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

VOCAB_MULTIPLE = 128


# ---------------------------------------------------------------------------------------------- shapes
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Shape of one model. `sequence` and `batch` are defaults of the axes of the same names."""

    name: str
    family: str  # gpt2 | llama | moe
    layers: int
    d_model: int
    heads: int
    vocab: int
    sequence: int
    batch: int
    kv_heads: int = 0  # 0: as many as heads
    d_ff: int = 0  # 0: 4 x d_model
    rope_theta: float = 0.0
    tied: bool = True
    experts: int = 0
    top_k: int = 0
    cpu: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)  # axis defaults on a CPU

    def __post_init__(self) -> None:
        for key in ("layers", "d_model", "heads", "vocab", "sequence", "batch"):
            value = getattr(self, key)
            if type(value) is not int or value < (key != "layers"):
                raise ValueError(f"model {self.name}: {key} = {value!r}; valid: a positive whole number")
        if unknown := sorted(set(self.cpu) - {"batch", "sequence"}):
            raise ValueError(f"model {self.name}: cpu.{unknown[0]}; valid: batch, sequence")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "d_ff", self.d_ff or 4 * self.d_model)
        if self.family not in ("gpt2", "llama", "moe"):
            raise ValueError(f"model {self.name}: family {self.family!r} is none of gpt2, llama, moe")
        if self.d_model % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"model {self.name}: {self.heads} heads must divide d_model {self.d_model}, "
                f"and {self.kv_heads} kv_heads must divide the heads"
            )
        if self.family == "moe" and not 0 < self.top_k <= self.experts:
            raise ValueError(f"model {self.name}: top_k {self.top_k} must lie in 1..experts {self.experts}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def qkv_rows(self) -> int:
        """Output rows of the fused projection: queries, then keys, then values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def norm_eps(self) -> float:
        return 1e-5


def load_models(path: Path) -> dict[str, Model]:
    """Models of one `models.toml`. Raises ValueError naming file, model and key."""
    table = tomllib.loads(path.read_text())
    fields = {f.name for f in dataclasses.fields(Model)} - {"name"}
    models = {}
    for name, row in table.items():
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}: {name} = {row!r} is no table; valid: {sorted(fields)}")
        unknown = sorted(set(row) - fields)
        if unknown:
            place = f"{path.name}: model {name}"
            raise ValueError(f"{place}: unknown key {unknown[0]!r}; valid: {sorted(fields)}")
        try:
            models[name] = Model(name=name, **row)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path.name}: model {name}: {error}") from None
    return models


MODELS = load_models(Path(__file__).with_name("models.toml"))


# ------------------------------------------------------------------------------------------ parameters
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One tensor. Matrices are (out, in): y = x @ W.T; experts are stacked in front: (experts, out, in)."""

    name: str  # canonical path, e.g. "h.3.attn.qkv.weight"
    shape: tuple[int, ...]
    init: str  # uniform | zeros | ones
    std: float = 0.0
    decay: bool = False  # weight decay: matrices (and embeddings) only
    layer: int | None = None
    parts: tuple[tuple[str, int, int], ...] = ()  # named row ranges, compared apart by the parity gate
    zero_gradient: tuple[str, ...] = ()  # parts whose gradient is zero by symmetry

    @property
    def key(self) -> str:
        """Name within its layer (`attn.qkv.weight`), by which stacks that scan over layers group."""
        return self.name if self.layer is None else self.name.split(".", 2)[2]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=256)
def parameters(model: Model) -> tuple[Parameter, ...]:
    """Every parameter in canonical order. `model.sequence` sizes GPT-2's position embedding."""
    d, std = model.d_model, 0.02
    residual_std = std / math.sqrt(2 * max(model.layers, 1))
    rows: list[Parameter] = []

    def add(name: str, shape: tuple[int, ...], init: str = "uniform", std: float = std, **extra: Any) -> None:
        layer = int(name.split(".")[1]) if name.startswith("h.") else None
        scale = {"std": std, "decay": True} if init == "uniform" else {}
        rows.append(Parameter(name=name, shape=shape, init=init, layer=layer, **scale, **extra))

    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    parts = (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv))
    gpt = model.family == "gpt2"

    def norm(name: str) -> None:
        add(f"{name}.weight", (d,), "ones")
        if gpt:
            add(f"{name}.bias", (d,), "zeros")

    def bias(name: str, size: int, **extra: Any) -> None:
        if gpt:
            add(f"{name}.bias", (size,), "zeros", **extra)

    add("wte.weight", (model.padded_vocab, d))
    if gpt:
        add("wpe.weight", (model.sequence, d))
    for i in range(model.layers):
        h = f"h.{i}"
        norm(f"{h}.ln1")
        add(f"{h}.attn.qkv.weight", (model.qkv_rows, d), parts=parts)
        bias(f"{h}.attn.qkv", model.qkv_rows, parts=parts, zero_gradient=("k",))
        add(f"{h}.attn.proj.weight", (d, q), std=residual_std)
        bias(f"{h}.attn.proj", d)
        norm(f"{h}.ln2")
        if gpt:
            add(f"{h}.mlp.fc.weight", (model.d_ff, d))
            bias(f"{h}.mlp.fc", model.d_ff)
            add(f"{h}.mlp.proj.weight", (d, model.d_ff), std=residual_std)
            bias(f"{h}.mlp.proj", d)
        elif model.family == "llama":
            add(f"{h}.mlp.gate_up.weight", (2 * model.d_ff, d))
            add(f"{h}.mlp.down.weight", (d, model.d_ff), std=residual_std)
        else:
            add(f"{h}.moe.router.weight", (model.experts, d))
            add(f"{h}.moe.gate_up.weight", (model.experts, 2 * model.d_ff, d))
            add(f"{h}.moe.down.weight", (model.experts, d, model.d_ff), std=residual_std)
    norm("ln_f")
    if not model.tied:
        add("head.weight", (model.padded_vocab, d))
    return tuple(rows)


@lru_cache(maxsize=256)
def parameter_count(model: Model) -> int:
    return sum(p.size for p in parameters(model))


# -------------------------------------------------------------------------------------- initial values
# One 32-bit integer hash of (path, index), lowbias32 (Wellons 2018); its upper 24 bits become an integer in
# [-2^23, 2^23), exactly representable in fp32; times 2^-23 (exact), times one fp32 constant: one rounding,
# so that every stack makes the same bits on its own device.
HASH_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
HASH_SHIFTS = (16, 15, 16)
INDEX_MULTIPLIER = 0x9E3779B9


def path_seed(path: str, seed: int = 0) -> int:
    """32-bit seed of a tensor path: CRC-32 of `seed:path`."""
    return zlib.crc32(f"{seed}:{path}".encode())


def uniform_scale(std: float) -> float:
    """The fp32 constant of a uniform distribution with standard deviation `std`: sqrt(3) * std."""
    import numpy as np

    return float(np.float32(std * math.sqrt(3.0)))


def hash_bits(path: str, start: int, count: int, seed: int = 0) -> np.ndarray:
    """uint32 [count]: hash of (path, start..start+count)."""
    import numpy as np

    return hash_at(path, np.arange(start, start + count, dtype=np.uint32), seed)


def hash_at(path: str, index: np.ndarray, seed: int = 0) -> np.ndarray:
    """uint32 of the shape of `index` (uint32): hash of (path, index)."""
    import numpy as np

    x = index * np.uint32(INDEX_MULTIPLIER)
    x ^= np.uint32(path_seed(path, seed))
    x ^= x >> np.uint32(HASH_SHIFTS[0])
    x *= np.uint32(HASH_MULTIPLIERS[0])
    x ^= x >> np.uint32(HASH_SHIFTS[1])
    x *= np.uint32(HASH_MULTIPLIERS[1])
    x ^= x >> np.uint32(HASH_SHIFTS[2])
    return x


def initial(parameter: Parameter, seed: int = 0) -> np.ndarray:
    """float32 array of `parameter.shape`."""
    import numpy as np

    return initial_at(parameter, np.arange(parameter.size), seed).reshape(parameter.shape)


def initial_at(parameter: Parameter, index: np.ndarray, seed: int = 0) -> np.ndarray:
    """float32 values at flat indices: large tensors need not be made whole to look at some elements."""
    import numpy as np

    if parameter.init != "uniform":
        return np.full(len(index), 1.0 if parameter.init == "ones" else 0.0, np.float32)
    bits = hash_at(parameter.name, index.astype(np.uint32), seed)
    signed = (bits >> np.uint32(8)).astype(np.int32) - np.int32(1 << 23)
    values = signed.astype(np.float32) * np.float32(2.0**-23)
    return values * np.float32(uniform_scale(parameter.std))


def dropout_path(step: int, site: str) -> str:
    """Path whose hash gives the gate's dropout mask: element kept where bits >= rate * 2^32."""
    return f"dropout:{step}:{site}"


def dropout_sites(model: Model) -> tuple[str, ...]:
    """Places of dropout, in order: the embedding sum, then each residual branch before it is added."""
    sites = ["embedding"]
    for i in range(model.layers):
        sites += [f"h.{i}.attn", f"h.{i}.mlp"]
    return tuple(sites)


def dropout_threshold(rate: float) -> int:
    """Bits below it are dropped; kept elements are scaled by fp32(1 / (1 - rate))."""
    return round(rate * 2**32)


@lru_cache(maxsize=64)
def sample_indices(name: str, size: int, count: int = 4096, whole: int = 65536) -> np.ndarray:
    """Flat indices (int64, ascending, unique) at which the gate compares a tensor of `size` elements."""
    import numpy as np

    if size <= whole:
        return np.arange(size)
    bits = hash_bits(f"sample:{name}", 0, count).astype(np.uint64)
    return np.unique((bits * np.uint64(size)) >> np.uint64(32)).astype(np.int64)


def rope_tables(model: Model, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin: float32 [sequence, head_dim / 2], computed in float64. Halves are rotated (not pairs)."""
    import numpy as np

    half = model.head_dim // 2
    frequency = model.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(sequence, dtype=np.float64)[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


# ---------------------------------------------------------------------------------------------- the step
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """AdamW, decoupled decay, clipping by the global norm; alike in every stack and precision.

    g <- g * min(1, clip / (norm(g) + 1e-6));  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;
    p <- p (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),  t = 1, 2, ...
    The rate of step t (from 1) is `lr_table()[min(t, HORIZON) - 1]`, read on the device.
    """

    peak_lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0
    clip_eps: float = 1e-6
    warmup: int = 10
    horizon: int = 1000
    floor: float = 0.1  # of peak_lr, reached at the horizon and kept


OPTIMIZER = Optimizer()


def lr_table(opt: Optimizer = OPTIMIZER) -> np.ndarray:
    """float32 [horizon]: linear warm-up, then cosine to the floor; computed in float64."""
    import numpy as np

    t = np.arange(1, opt.horizon + 1, dtype=np.float64)
    cosine = 0.5 * (1 + np.cos(np.pi * (t - opt.warmup) / (opt.horizon - opt.warmup)))
    after = opt.floor + (1 - opt.floor) * cosine
    return (opt.peak_lr * np.where(t <= opt.warmup, t / opt.warmup, after)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- precision
# A dtype for each class of tensor. `matmul` is the arithmetic of a product of fp32 inputs ("ieee" | "tf32");
# `weights_used` is what matrix products read, cast from `weights` once a step where the two differ;
# `gradients` is what the backward pass leaves on a weight; `accumulation` is where micro-batches and the
# optimizer's input add up. Softmax and loss include the statistics inside attention.
TENSOR_CLASSES = (
    "weights", "weights_used", "residual", "norm_statistics", "logits", "softmax", "loss",
    "gradients", "accumulation", "moments",
)  # fmt: skip

_FP32 = {**dict.fromkeys(TENSOR_CLASSES, "float32"), "matmul": "ieee"}
PRECISION: dict[str, dict[str, str]] = {
    "fp32": _FP32,
    "tf32": {**_FP32, "matmul": "tf32"},
    "bf16": {**_FP32, "weights_used": "bfloat16", "residual": "bfloat16", "logits": "bfloat16",
             "gradients": "bfloat16"},
    "bf16-pure": {**_FP32, "weights": "bfloat16", "weights_used": "bfloat16", "residual": "bfloat16",
                  "logits": "bfloat16", "gradients": "bfloat16", "accumulation": "bfloat16",
                  "moments": "bfloat16"},
}  # fmt: skip
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8, "int32": 4}


# -------------------------------------------------------------------------------------------------- axes
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """An axis of a workload: its default, and either its valid values or the least number."""

    default: Any
    values: tuple[str, ...] = ()
    kind: type = str
    at_least: float = 0
    below: float = math.inf
    help: str = ""


AXES: dict[str, Axis] = {
    "batch": Axis(default=None, kind=int, at_least=1, help="rows a step, over all micro-batches"),
    "sequence": Axis(default=None, kind=int, at_least=2, help="tokens a row"),
    "precision": Axis(default="fp32", values=tuple(PRECISION), help="a row of the precision table"),
    "attention": Axis(default="best", values=("best", "math", "cudnn", "flash"),
                      help="best: the stack's best kernel on the device, named in the manifest"),
    "loss": Axis(default="full", values=("full", "chunked"), help="cross-entropy over all rows or 8 chunks"),
    "accumulation": Axis(default=1, kind=int, at_least=1, help="micro-batches a step"),
    "dropout": Axis(default=0.0, kind=float, below=1.0, help="on the embedding and the residual branches"),
    "remat": Axis(default="none", values=("none", "block"), help="recompute each block in the backward pass"),
    "sync": Axis(default="value", values=("value", "every-step"), help="wait once a value, or every step"),
}  # fmt: skip
LOSS_CHUNKS = 8


def resolve_axes(model: Model, axes: Mapping[str, Any], device_kind: str) -> dict[str, Any]:
    """All axes in canonical order, defaults filled in for the device kind (`cpu` or `cuda`).

    Raises ValueError that names the axis, the value and what is valid.
    """
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise ValueError(f"unknown axis {unknown[0]!r}; valid axes: {', '.join(AXES)}")
    defaults = {"batch": model.batch, "sequence": model.sequence}
    if device_kind == "cpu":
        defaults.update(model.cpu)
    full = {}
    for name, axis in AXES.items():
        value = axes.get(name, defaults.get(name, axis.default))
        full[name] = axis_value(name, axis, value)
    if full["batch"] % full["accumulation"]:
        raise ValueError(f"batch {full['batch']} is not a multiple of accumulation {full['accumulation']}")
    rows = full["batch"] * full["sequence"] // full["accumulation"]
    if full["loss"] == "chunked" and rows % LOSS_CHUNKS:
        raise ValueError(f"loss = 'chunked': {rows} tokens a micro-batch do not divide into {LOSS_CHUNKS}")
    if full["sequence"] > model.sequence and model.family == "gpt2":
        raise ValueError(f"sequence {full['sequence']} exceeds {model.name}'s {model.sequence} positions")
    return full


def axis_value(name: str, axis: Axis, value: Any) -> Any:
    if axis.values:
        if value not in axis.values:
            raise ValueError(f"axis {name} = {value!r}; valid values: {', '.join(axis.values)}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (axis.kind is int and value % 1 != 0):
        raise ValueError(f"axis {name} = {value!r}; valid: a number of type {axis.kind.__name__}")
    if not axis.at_least <= value < axis.below:
        upper = "" if axis.below == math.inf else f" and below {axis.below:g}"
        raise ValueError(f"axis {name} = {value!r}; valid: at least {axis.at_least:g}{upper}")
    return axis.kind(value)


# -------------------------------------------------------------------------------------- FLOPs and memory
@lru_cache(maxsize=256)
def matmul_parameters(model: Model, *, executed: bool = False) -> int:
    """N: parameters used in forward matrix products. A tied embedding counts once (as the head), position
    and untied input embeddings not at all; of experts the chosen ones (all of them if `executed`, as in a
    dense masked product); the vocabulary as padded."""
    total = model.padded_vocab * model.d_model
    for p in parameters(model):
        if p.layer is None or len(p.shape) < 2:
            continue
        share = 1.0 if executed or len(p.shape) < 3 else model.top_k / model.experts
        total += round(p.size * share)
    return total


def flops_per_token(model: Model, sequence: int, *, causal: bool = True, executed: bool = False) -> int:
    """6 N + 6 L d T (causal) or 6 N + 12 L d T (the non-causal convention), forward and backward.

    Chowdhery et al. 2022 (PaLM), appendix B, gives 6 N + 12 L H Q T; a causal mask leaves half of it.
    """
    attention = (6 if causal else 12) * model.layers * model.heads * model.head_dim * sequence
    return 6 * matmul_parameters(model, executed=executed) + attention


def tokens_per_step(axes: Mapping[str, Any]) -> int:
    return int(axes["batch"]) * int(axes["sequence"])


def memory_lower_bound_bytes(model: Model, axes: Mapping[str, Any]) -> int:
    """Weights (stored, and cast where they differ), gradients, moments and one copy of the logits."""
    table = PRECISION[axes["precision"]]
    n = parameter_count(model)
    weights = BYTES[table["weights"]]
    if table["weights_used"] != table["weights"]:
        weights += BYTES[table["weights_used"]]
    rows = tokens_per_step(axes) // int(axes["accumulation"])
    if axes["loss"] == "chunked":
        rows //= LOSS_CHUNKS
    logits = rows * model.padded_vocab * BYTES[table["logits"]]
    return n * (weights + BYTES[table["gradients"]] + 2 * BYTES[table["moments"]]) + logits


def memory_predicted_bytes(model: Model, axes: Mapping[str, Any]) -> int:
    """Lower bound plus saved activations: per token and layer 18 d + 4 d_ff elements of the residual's
    dtype (two norms, qkv, attention output, projections, the feed-forward's input, inner and output), or
    2 d where blocks are recomputed, and two further copies of the logits in fp32. A rough figure: the plan
    prints its past error beside it."""
    size = BYTES[PRECISION[axes["precision"]]["residual"]]
    rows = tokens_per_step(axes) // int(axes["accumulation"])
    experts = model.experts or 1
    per_layer = 2 * model.d_model
    if axes["remat"] == "none":
        per_layer = 18 * model.d_model + 4 * model.d_ff * experts
        if axes["attention"] == "math":
            per_layer += 2 * model.heads * int(axes["sequence"])
    logit_rows = rows // LOSS_CHUNKS if axes["loss"] == "chunked" else rows
    activations = rows * model.layers * per_layer * size + 2 * 4 * logit_rows * model.padded_vocab
    return memory_lower_bound_bytes(model, axes) + activations


def small(model: Model, axes: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The same family at a shape that float64 NumPy can train: 2 layers, heads of at most 32, width 128."""
    kv = max(1, 4 * model.kv_heads // model.heads)
    shape = dataclasses.replace(
        model, name=f"{model.name}-small", layers=min(2, model.layers), d_model=128, heads=4,
        kv_heads=kv, d_ff=min(512, model.d_ff), vocab=min(model.vocab, 2048), sequence=64, batch=4,
    )  # fmt: skip
    accumulation = min(int(axes["accumulation"]), 2)
    return shape, {**axes, "batch": 4, "sequence": 64, "accumulation": accumulation}


def from_job(fields: Mapping[str, Any]) -> Model:
    """The Model of a job file."""
    return Model(**{f.name: fields[f.name] for f in dataclasses.fields(Model) if f.name in fields})


def names(models: Sequence[Model] | None = None) -> list[str]:
    return [f"train/{m.name}" for m in (models or MODELS.values())]
