"""The training step in JAX: pure functions under one `jax.jit`, buffers donated, layers scanned or unrolled.

Read from top to bottom: layers, model, optimizer, `train_step`; `Trainer` holds the state and calls it.
Parameters are a flat dictionary by canonical name; with `layers = "scan"` those of the blocks are stacked
under their key (`attn.qkv.weight`) with the layer in front. Only a worker imports this file: the harness
reads the literal `STACK` without running anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from stacks.train import spec

STACK = {
    "role": "stack",
    "framework": "jax",
    "summary": "JAX: one jitted step, donated buffers, XLA's fusion",
    "requires": ["jax", "jaxlib"],
    "requires_cuda": ["jax-cuda13-plugin"],
    "devices": ["cpu", "cuda"],
    "install": "pip install jax (a CUDA device: pip install 'jax[cuda13]')",
    "axes": {"attention": {"cpu": ["best", "math"], "cuda": ["best", "math", "cudnn"]}},
    "variables": {
        "JAX_PLATFORMS": "{platform}",
        "JAX_COMPILATION_CACHE_DIR": "{cache}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "CUDA_CACHE_PATH": "{cache}/cuda",
    },
    "options": {"layers": ["scan", "unroll"], "xla": ["default", "latency-hiding", "no-triton-gemm"]},
    "variants": {
        "default": {"layers": "unroll", "xla": "default"},
        "tuned": {"layers": "unroll", "xla": "latency-hiding"},
    },
}

COMPILER_OPTIONS = {  # passed to this compilation only; the GPU flags are unknown to XLA's CPU compiler
    "default": {},
    "latency-hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "no-triton-gemm": {"xla_gpu_enable_triton_gemm": False},
}
Params = dict[str, Any]


# ---------------------------------------------------------------------------------------------- layers
def linear(x: Any, p: Params, name: str) -> Any:
    """x @ W.T + b, W as (out, in)."""
    y = jnp.einsum("...i,oi->...o", x, p[f"{name}.weight"])
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def norm(x: Any, p: Params, name: str, eps: float) -> Any:
    """LayerNorm where there is a bias, RMSNorm where there is none; statistics in fp32, one rounding."""
    y, weight = x.astype(jnp.float32), p[f"{name}.weight"].astype(jnp.float32)
    if f"{name}.bias" in p:
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
        y = y * weight + p[f"{name}.bias"].astype(jnp.float32)
    else:
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps) * weight
    return y.astype(x.dtype)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """RoPE by halves, in fp32: x is [b, t, heads, head_dim], cos and sin are [t, head_dim / 2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(x: Any, p: Params, model: spec.Model, rope: Any, kind: str) -> Any:
    b, t, d = x.shape
    h, kv, hd = model.heads, model.kv_heads, model.head_dim
    q, k, v = jnp.split(linear(x, p, "attn.qkv"), [h * hd, (h + kv) * hd], axis=-1)
    q, k, v = q.reshape(b, t, h, hd), k.reshape(b, t, kv, hd), v.reshape(b, t, kv, hd)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    if kind == "cudnn":
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    else:
        y = math_attention(q, k, v)
    return linear(y.reshape(b, t, d), p, "attn.proj")


def math_attention(q: Any, k: Any, v: Any) -> Any:
    """Causal attention written out, softmax in fp32: q [b, t, h, hd], k and v [b, t, kv, hd]."""
    b, t, h, hd = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], hd)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * hd**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    weight = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weight, v).reshape(b, t, h, hd)


def feed_forward(x: Any, p: Params, model: spec.Model, forced: Any) -> tuple[Any, Any]:
    if model.family == "gpt2":
        return linear(jax.nn.gelu(linear(x, p, "mlp.fc"), approximate=True), p, "mlp.proj"), ()
    if model.family == "llama":
        gate, up = jnp.split(linear(x, p, "mlp.gate_up"), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, p, "mlp.down"), ()
    return experts(x, p, model, forced)


def experts(x: Any, p: Params, model: spec.Model, forced: Any) -> tuple[Any, Any]:
    """Top-k of all experts, as a masked dense product: every expert sees every token (no grouped product
    exists on every device). Returns the output and, for the gate, chosen experts and the router's margin."""
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    logits = x.astype(jnp.float32) @ p["moe.router.weight"].astype(jnp.float32).T
    probability = jax.nn.softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(probability, model.top_k + (forced is not None))
    seen = ()
    if forced is not None:
        ids = jnp.where(forced >= 0, forced, ids[:, : model.top_k])
        seen = (ids, top[:, -2] - top[:, -1])
    weight = jnp.take_along_axis(probability, ids, axis=1)
    weight = weight / weight.sum(axis=1, keepdims=True)
    combine = (jax.nn.one_hot(ids, model.experts) * weight[..., None]).sum(axis=1)  # [tokens, experts]
    gate, up = jnp.split(jnp.einsum("nd,efd->enf", x, p["moe.gate_up.weight"]), 2, axis=-1)
    hidden = jax.nn.gelu(gate, approximate=True) * up
    out = jnp.einsum("enf,edf->end", hidden, p["moe.down.weight"])
    y = jnp.einsum("end,ne->nd", out.astype(jnp.float32), combine).astype(x.dtype)
    return y.reshape(shape), seen


# ---------------------------------------------------------------------------------------------- dropout
def hash_bits(path_seed: Any, start: Any, count: int) -> Any:
    """uint32 [count]: the bits of `spec.hash_bits`; `path_seed` and `start` may be traced."""
    x = (jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(start)) * jnp.uint32(spec.INDEX_MULTIPLIER)
    x = x ^ jnp.uint32(path_seed)
    x = x ^ (x >> spec.HASH_SHIFTS[0])
    x = x * jnp.uint32(spec.HASH_MULTIPLIERS[0])
    x = x ^ (x >> spec.HASH_SHIFTS[1])
    x = x * jnp.uint32(spec.HASH_MULTIPLIERS[1])
    return x ^ (x >> spec.HASH_SHIFTS[2])


def dropout(x: Any, rate: float, source: Any) -> Any:
    """`source` is a key of this stack's own generator, or, under the gate, (path seed, start index)."""
    if rate == 0.0:
        return x
    if isinstance(source, tuple):
        keep = hash_bits(*source, x.size).reshape(x.shape) >= jnp.uint32(spec.dropout_threshold(rate))
    else:
        keep = jax.random.bernoulli(source, 1 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(np.float32(1 / (1 - rate)), x.dtype), 0)


# ------------------------------------------------------------------------------------------------ model
def block(
    x: Any, p: Params, drop: Any, forced: Any, *, model: spec.Model, axes: dict[str, Any], rope: Any
) -> tuple[Any, Any]:
    """`drop`: sources of the two dropouts of this block."""
    kind = "cudnn" if axes["attention"] == "cudnn" else "math"
    if axes["attention"] == "best" and jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16:
        kind = "cudnn"
    rate = axes["dropout"]
    x = x + dropout(attention(norm(x, p, "ln1", model.norm_eps), p, model, rope, kind), rate, drop[0])
    y, seen = feed_forward(norm(x, p, "ln2", model.norm_eps), p, model, forced)
    return checkpoint_name(x + dropout(y, rate, drop[1]), "residual"), seen


def forward(
    params: Params, tokens: Any, targets: Any, drop: Any, forced: Any, *,
    model: spec.Model, axes: dict[str, Any], scan: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Mean cross-entropy of one micro-batch, and what the routers chose."""
    x = params["wte.weight"][tokens]
    rope = None
    if model.family == "gpt2":
        x = x + params["wpe.weight"][: tokens.shape[1]]
    else:
        rope = tuple(jnp.asarray(t) for t in spec.rope_tables(model, axes["sequence"]))
    x = dropout(x, axes["dropout"], drop and drop[0])
    run = partial(block, model=model, axes=axes, rope=rope)
    if axes["remat"] == "block":
        run = jax.checkpoint(run)
    if scan:
        stacked = {k: v for k, v in params.items() if k not in OUTSIDE}
        per_layer = (stacked, stack_layers(drop), forced)
        x, seen = jax.lax.scan(lambda x, s: run(x, *s), x, per_layer)
    else:
        seen = []
        for i in range(model.layers):
            prefix = f"h.{i}."
            p = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
            drops = (drop[2 * i + 1], drop[2 * i + 2]) if drop else (None, None)
            x, chosen = run(x, p, drops, None if forced is None else forced[i])
            seen.append(chosen)
        if forced is not None:
            seen = tuple(jnp.stack(s) for s in zip(*seen, strict=True))
    x = norm(x, params, "ln_f", model.norm_eps).reshape(-1, model.d_model)
    head = params["wte.weight" if model.tied else "head.weight"]
    return cross_entropy(x, head, targets.reshape(-1), chunked=axes["loss"] == "chunked"), seen


OUTSIDE = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "head.weight")


def stack_layers(drop: Any) -> Any:
    """Sources of all blocks, layer in front, from the flat list embedding, attn 0, mlp 0, attn 1, …"""
    if not drop:
        return (None, None)
    pair = [drop[1::2], drop[2::2]]
    return tuple(jax.tree.map(lambda *s: jnp.stack([jnp.asarray(v) for v in s]), *rows) for rows in pair)


def cross_entropy(x: Any, head: Any, targets: Any, *, chunked: bool) -> Any:
    """Mean over rows, in fp32. Chunked: logits of one chunk at a time, made again backwards."""

    def total(rows: Any, ids: Any) -> Any:
        logits = checkpoint_name(jnp.einsum("ni,vi->nv", rows, head), "logits").astype(jnp.float32)
        target = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - target).sum()

    if not chunked:
        return total(x, targets) / len(targets)
    n = spec.LOSS_CHUNKS
    chunks = (x.reshape(n, -1, x.shape[-1]), targets.reshape(n, -1))
    one = jax.checkpoint(total)
    return jax.lax.scan(lambda s, c: (s + one(*c), None), jnp.float32(0), chunks)[0] / len(targets)


# --------------------------------------------------------------------------------------------- the step
def adamw(params: Params, m: Params, v: Params, grads: Params, count: Any, rates: Any) -> Any:
    """Clip by the global norm, then AdamW in fp32; moments and weights are rounded to their dtypes once."""
    o = spec.OPTIMIZER
    norm = jnp.sqrt(sum(jnp.square(g.astype(jnp.float32)).sum() for g in grads.values()))
    scale = jnp.minimum(1.0, o.clip / (norm + o.clip_eps))
    t = (count + 1).astype(jnp.float32)
    rate = rates[jnp.minimum(count, o.horizon - 1)]
    bias1, bias2 = 1 - o.beta1**t, 1 - o.beta2**t

    def update(name: str) -> tuple[Any, Any, Any]:
        p, g = params[name].astype(jnp.float32), grads[name]
        g = (g.astype(jnp.float32) * scale).astype(g.dtype).astype(jnp.float32)
        new_m = o.beta1 * m[name].astype(jnp.float32) + (1 - o.beta1) * g
        new_v = o.beta2 * v[name].astype(jnp.float32) + (1 - o.beta2) * g * g
        decay = o.decay if name.endswith("weight") and not is_norm(name) else 0.0
        step = (new_m / bias1) / (jnp.sqrt(new_v / bias2) + o.eps)
        new_p = p * (1 - rate * decay) - rate * step
        return new_p.astype(params[name].dtype), new_m.astype(m[name].dtype), new_v.astype(v[name].dtype)

    out = {name: update(name) for name in params}
    return tuple({name: row[i] for name, row in out.items()} for i in range(3))


def is_norm(name: str) -> bool:
    return name.split(".")[-2] in ("ln1", "ln2", "ln_f")


def train_step(
    state: Any, inputs: Any, targets: Any, forced: Any, step_seeds: Any, rates: Any, *,
    model: spec.Model, axes: dict[str, Any], table: dict[str, str], scan: bool, gate: bool,
) -> Any:  # fmt: skip
    """One step over all micro-batches: state -> (state, loss, what the routers chose)."""
    params, m, v, count, key = state
    used = jnp.dtype(table["weights_used"])
    cast = {k: checkpoint_name(w.astype(used), "weights_used") for k, w in params.items()}
    micro = axes["accumulation"]
    loss_and_grad = jax.value_and_grad(partial(forward, model=model, axes=axes, scan=scan), has_aux=True)
    key, use = jax.random.split(key) if axes["dropout"] and not gate else (key, key)
    losses, seen, grads = [], [], None
    for i in range(micro):
        drop = dropout_sources(use, i, step_seeds, inputs, model, axes, gate)
        rows = None if forced is None else forced[:, i]
        (loss, chosen), g = loss_and_grad(cast, inputs[i], targets[i], drop, rows)
        g = {k: checkpoint_name(x, "gradients").astype(table["accumulation"]) for k, x in g.items()}
        grads = g if grads is None else {k: grads[k] + x for k, x in g.items()}
        grads = {k: checkpoint_name(x, "accumulation") for k, x in grads.items()}
        losses.append(loss)
        seen.append(chosen)
    if micro > 1:
        grads = {k: x / micro for k, x in grads.items()}
    params, m, v = adamw(params, m, v, grads, count, rates)
    loss = checkpoint_name(jnp.stack(losses).mean(), "loss")
    return (params, m, v, count + 1, key), loss, seen


def dropout_sources(
    key: Any, micro: int, step_seeds: Any, inputs: Any, model: spec.Model, axes: dict[str, Any], gate: bool
) -> Any:
    """A source for each site: a key of its own, or (path seed, start index) of the shared hash."""
    if not axes["dropout"]:
        return None
    sites = len(spec.dropout_sites(model))
    if gate:
        start = micro * inputs[0].size * model.d_model
        return [(step_seeds[i], jnp.uint32(start)) for i in range(sites)]
    keys = jax.random.split(jax.random.fold_in(key, micro), sites)
    return [keys[i] for i in range(sites)]


def initial(parameter: spec.Parameter, seed: int) -> Any:
    """fp32, bit for bit `spec.initial`, made on the device."""
    if parameter.init != "uniform":
        return jnp.full(parameter.shape, 1.0 if parameter.init == "ones" else 0.0, jnp.float32)
    bits = hash_bits(spec.path_seed(parameter.name, seed), 0, parameter.size)
    values = ((bits >> 8).astype(jnp.int32) - (1 << 23)).astype(jnp.float32) * jnp.float32(2.0**-23)
    return (values * jnp.float32(spec.uniform_scale(parameter.std))).reshape(parameter.shape)


class Trainer:
    """Holds the state and calls the jitted step; `step` returns as soon as the work is enqueued."""

    def __init__(
        self, *, model: spec.Model, axes: dict[str, Any], options: dict[str, Any], device: str,
        batches: np.ndarray, seed: int, threads: int, gate: bool, routing: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.model, self.axes, self.options = model, axes, options
        self.table = spec.PRECISION[axes["precision"]]
        self.scan, self.gated = options["layers"] == "scan" and model.layers > 0, gate
        precision = {"ieee": "highest", "tf32": "tensorfloat32"}[self.table["matmul"]]
        jax.config.update("jax_default_matmul_precision", precision)
        micro = axes["accumulation"]
        rows = batches.reshape(len(batches), micro, -1, batches.shape[-1])
        self.inputs = [jnp.asarray(r[..., :-1]) for r in rows]  # [micro, rows, sequence]
        self.targets = [jnp.asarray(r[..., 1:]) for r in rows]
        self.forced = self.forced_routing(routing) if gate and model.family == "moe" else None
        self.state = self.initial_state(seed)
        self.rates = jnp.asarray(spec.lr_table())
        self.seeds = [jnp.zeros(0, jnp.uint32)]
        if gate and axes["dropout"]:
            sites = spec.dropout_sites(model)
            self.seeds = [
                jnp.asarray([spec.path_seed(spec.dropout_path(s, x)) for x in sites], jnp.uint32)
                for s in range(len(batches))
            ]
        known = COMPILER_OPTIONS[options["xla"]] if jax.default_backend() == "gpu" else {}
        self.train_step = partial(
            train_step, model=model, axes=axes, table=self.table, scan=self.scan, gate=gate
        )
        self.jitted = jax.jit(self.train_step, donate_argnums=0, compiler_options=known or None)
        self.count, self.seen = 0, []

    def initial_state(self, seed: int) -> Any:
        stored, moments = (jnp.dtype(self.table[k]) for k in ("weights", "moments"))
        params = {p.name: initial(p, seed).astype(stored) for p in spec.parameters(self.model)}
        if self.scan:
            params = self.stack(params)
        m, v = ({k: jnp.zeros(w.shape, moments) for k, w in params.items()} for _ in range(2))
        return params, m, v, jnp.int32(0), jax.random.key(seed)

    def stack(self, params: Params) -> Params:
        out: Params = {}
        for p in spec.parameters(self.model):
            if p.layer is None:
                out[p.name] = params[p.name]
            elif p.layer == 0:
                names = [f"h.{i}.{p.key}" for i in range(self.model.layers)]
                out[p.key] = jnp.stack([params[n] for n in names])
        return out

    def forced_routing(self, routing: np.ndarray | None) -> list[Any]:
        """[layers, micro, tokens, top_k] for each step of the gate; -1 where the router is free."""
        steps = 1 if routing is None else len(routing)
        micro = self.axes["accumulation"]
        shape = (self.model.layers, micro, spec.tokens_per_step(self.axes) // micro, self.model.top_k)
        free = np.full((steps, *shape), -1, np.int32)
        return [jnp.asarray(r) for r in (free if routing is None else routing.reshape(free.shape))]

    # ------------------------------------------------------------------------------------ the step
    def step(self, index: int) -> None:
        self.state, self.loss_value, self.seen = self.jitted(*self.arguments(index))
        self.count += 1

    def arguments(self, index: int) -> tuple[Any, ...]:
        n = len(self.inputs)
        forced = None if self.forced is None else self.forced[min(self.count, len(self.forced) - 1)]
        seeds = self.seeds[min(self.count, len(self.seeds) - 1)]
        return self.state, self.inputs[index % n], self.targets[index % n], forced, seeds, self.rates

    def wait(self) -> None:
        """All outputs: parameters, moments, counter, loss."""
        jax.block_until_ready((self.state, self.loss_value))

    # ------------------------------------------------------------------------------ what the gate reads
    def loss(self) -> float:
        return float(self.loss_value)

    def canonical(self, tree: Params) -> Iterator[tuple[str, np.ndarray]]:
        for p in spec.parameters(self.model):
            value = tree[p.key][p.layer] if self.scan and p.layer is not None else tree[p.name]
            yield p.name, np.asarray(value.astype(jnp.float32))

    def first_moments(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.canonical(self.state[1])

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.canonical(self.state[0])

    def routing(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.model.family != "moe" or not self.gated:
            return None
        ids, margin = ([np.asarray(seen[i]) for seen in self.seen] for i in range(2))
        return np.concatenate(ids, axis=1).astype(np.int32), np.concatenate(margin, axis=1)

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """One matrix product in the precision in force."""
        dtype = jnp.dtype(self.table["weights_used"])
        return np.asarray((jnp.asarray(a, dtype) @ jnp.asarray(b, dtype)).astype(jnp.float32))

    def dropout_sample(self, step: int, site: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Output and gradient of this stack's own dropout of `count` ones: its mask, twice."""
        key = jax.random.key(0)
        for _ in range(step + 1):
            key, use = jax.random.split(key)
        sites = spec.dropout_sites(self.model)
        source = jax.random.split(jax.random.fold_in(use, 0), len(sites))[sites.index(site)]
        rate, x = self.axes["dropout"], jnp.ones(count)
        return np.asarray(dropout(x, rate, source)), np.asarray(
            jax.grad(lambda x: dropout(x, rate, source).sum())(x)
        )

    def dtypes(self) -> dict[str, list[str]]:
        """The dtype of each class of tensor, from the jaxpr of the very function that is jitted."""
        seen: dict[str, set[str]] = {}
        census(jax.make_jaxpr(self.train_step)(*self.arguments(0)).jaxpr, seen)
        params, m, v = self.state[:3]
        for name in params:
            seen.setdefault("weights", set()).add(str(params[name].dtype))
            seen.setdefault("moments", set()).update((str(m[name].dtype), str(v[name].dtype)))
        return {k: sorted(v) for k, v in seen.items()}

    def manifest(self) -> dict[str, str]:
        gpu = jax.default_backend() == "gpu"
        flags = COMPILER_OPTIONS[self.options["xla"]] if gpu else {}
        best = self.axes["attention"] == "best" and gpu and self.table["residual"] == "bfloat16"
        cudnn = best or self.axes["attention"] == "cudnn"
        return {
            "matmul_precision": str(jax.config.jax_default_matmul_precision),
            "attention_kernel": "cudnn flash" if cudnn else "matmul, softmax, matmul (XLA)",
            "graphs": "XLA command buffers (XLA's default)" if gpu else "none: a CPU has none",
            "donation": "donate_argnums=0: parameters, moments, counter and key",
            "optimizer": "AdamW in the jitted step, fused by XLA",
            "remat": self.axes["remat"],
            "compile": f"jax.jit of the whole step, layers {'scanned' if self.scan else 'unrolled'}",
            "generator": f"{jax.config.jax_default_prng_impl} (explicit keys)",
            "allocator": "XLA BFC, preallocating" if gpu else "malloc (XLA CPU allocator)",
            "threads": "XLA's pools, sized by the CPUs the process is bound to",
            "options": ", ".join(f"{k}={v}" for k, v in sorted(self.options.items())),
            "xla_options": ", ".join(f"{k}={v}" for k, v in flags.items()) or "none",
            "weight_cast": "once a step, in the graph"
            if self.table["weights"] != self.table["weights_used"]
            else "never",
            "experts": "masked dense product" if self.model.family == "moe" else "none",
        }

    def memory(self) -> dict[str, int | None]:
        """Bytes of XLA's allocator; null where the backend keeps no such account (CPU)."""
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "peak_allocated_bytes": stats.get("peak_bytes_in_use"),
            "peak_reserved_bytes": stats.get("peak_pool_bytes"),
        }


def census(jaxpr: Any, seen: dict[str, set[str]]) -> None:
    """Notes dtypes by name (`checkpoint_name`) and by primitive, through every nested jaxpr."""
    for eqn in jaxpr.eqns:
        dtype = (
            str(eqn.outvars[0].aval.dtype) if eqn.outvars and hasattr(eqn.outvars[0].aval, "dtype") else ""
        )
        name = eqn.primitive.name
        if name == "name":
            seen.setdefault(eqn.params["name"], set()).add(dtype)
        elif name == "rsqrt":
            seen.setdefault("norm_statistics", set()).add(dtype)
        elif name == "exp":
            seen.setdefault("softmax", set()).add(dtype)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    census(inner, seen)
