"""The training step in NumPy with hand-written backward passes: what every other stack is checked against.

Read from top to bottom: arithmetic (where results are rounded), operations (each a forward function that
returns its output and what its backward function needs), layers, model, optimizer, `Trainer`. Activations
are matrices [tokens, features]; a weight is (out, in): y = x @ W.T. With `arithmetic = "float64"` nothing
is rounded; with `"emulated"` a row of `spec.PRECISION` is imitated in float32 arrays whose values are
rounded to bf16 (or, at the inputs of products, to TF32) wherever the table says so. `order = "permuted"`
sums the same terms in another order: what then differs is round-off.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from stacks.train import spec

STACK = {
    "role": "reference",
    "summary": "NumPy with hand-written backward passes, in float64 or rounded as the precision table says",
    "devices": ["cpu"],
    "requires": ["numpy"],
    "options": {"arithmetic": ["float64", "emulated"], "order": ["natural", "permuted"]},
    "variants": {"default": {"arithmetic": "float64", "order": "natural"}},
}

Array = np.ndarray
MANTISSA_BITS_DROPPED = {"bfloat16": 16, "tf32": 13}  # of float32's 23
BLOCK = 1 << 15  # elements of an optimizer update at a time: they stay in the cache


# -------------------------------------------------------------------------------------------- arithmetic
def round_mantissa(x: Array, drop: int) -> Array:
    """Rounds float32 `x` in place, to nearest with ties to even, clearing the last `drop` bits.

    Infinities and quiet NaNs stay what they are; values beyond the largest become infinite, as in hardware.
    """
    bits = x.view(np.uint32)
    carry = bits >> np.uint32(drop)
    carry &= np.uint32(1)
    carry += np.uint32((1 << (drop - 1)) - 1)
    bits += carry
    bits &= np.uint32((0xFFFFFFFF << drop) & 0xFFFFFFFF)
    return x


class Arithmetic:
    """Rounds results as a row of the precision table says. `seen` holds the dtypes used, by class."""

    def __init__(self, table: Mapping[str, str] | None) -> None:
        everywhere_float64 = {**dict.fromkeys(spec.TENSOR_CLASSES, "float64"), "matmul": "ieee"}
        self.table = dict(table or everywhere_float64)
        self.dtype = np.float32 if table else np.float64
        self.seen: dict[str, set[str]] = {name: set() for name in spec.TENSOR_CLASSES}

    def round(self, x: Array, kind: str) -> Array:
        """Result of class `kind`. In place: `x` is a fresh array that nobody else reads."""
        self.seen[kind].add(self.table[kind])
        drop = MANTISSA_BITS_DROPPED.get(self.table[kind])
        return round_mantissa(x, drop) if drop else x

    def cast(self, x: Array, kind: str) -> Array:
        """As `round`, but leaves `x` alone; `x` itself where nothing is to be rounded."""
        return self.round(x.copy() if self.table[kind] == "bfloat16" else x, kind)

    def activation(self, x: Array) -> Array:
        return self.round(x, "residual")

    def matmul(self, a: Array, b: Array) -> Array:
        """Product accumulated in the array's dtype; its inputs are rounded under TF32, its result is not."""
        if self.table["matmul"] == "tf32":
            drop = MANTISSA_BITS_DROPPED["tf32"]
            a, b = round_mantissa(a.copy(), drop), round_mantissa(b.copy(), drop)
        return a @ b


@dataclasses.dataclass
class Pass:
    """Forward and backward of one micro-batch: the weights that are read and the gradients that result."""

    a: Arithmetic
    model: spec.Model
    sequence: int
    weights: dict[str, Array]
    rope: tuple[Array, ...] | None  # cosines and sines, [sequence, 1, head_dim / 2]
    mask: Callable[[str], Array | None]  # dropout site -> factor of every element, None without dropout
    forced: Array | None  # [layers, tokens, top_k]: experts, or -1 where the router chooses
    gradients: dict[str, Array] = dataclasses.field(default_factory=dict)
    ids: list[Array] = dataclasses.field(default_factory=list)  # of each MoE layer
    margins: list[Array] = dataclasses.field(default_factory=list)

    @cached_property
    def causal(self) -> Array:
        """Added to the scores: minus infinity where the key comes after the query."""
        return np.triu(np.full((self.sequence, self.sequence), -np.inf, self.a.dtype), 1)

    def add_gradient(self, name: str, gradient: Array) -> None:
        gradient = self.a.round(gradient, "gradients")
        if name in self.gradients:  # a tied embedding gets two
            gradient = self.a.round(gradient + self.gradients[name], "gradients")
        self.gradients[name] = gradient


# -------------------------------------------------------------------------------------------- operations
def linear(p: Pass, x: Array, name: str) -> tuple[Array, Array]:
    y = p.a.matmul(x, p.weights[f"{name}.weight"].T)
    if f"{name}.bias" in p.weights:
        y += p.weights[f"{name}.bias"]
    return p.a.activation(y), x


def linear_backward(p: Pass, dy: Array, x: Array, name: str) -> Array:
    p.add_gradient(f"{name}.weight", p.a.matmul(dy.T, x))
    if f"{name}.bias" in p.weights:
        p.add_gradient(f"{name}.bias", dy.sum(0))
    return p.a.activation(p.a.matmul(dy, p.weights[f"{name}.weight"]))


def norm(p: Pass, x: Array, name: str) -> tuple[Array, tuple[Array, Array]]:
    """LayerNorm where the layer has a bias, else RMSNorm."""
    bias = p.weights.get(f"{name}.bias")
    if bias is not None:
        x = x - p.a.round(x.mean(-1, keepdims=True), "norm_statistics")
    variance = np.einsum("nd,nd->n", x, x)[:, None] / x.shape[1]
    scale = p.a.round(1 / np.sqrt(variance + p.model.norm_eps), "norm_statistics")
    normal = x * scale
    y = normal * p.weights[f"{name}.weight"]
    if bias is not None:
        y += bias
    return p.a.activation(y), (normal, scale)


def norm_backward(p: Pass, dy: Array, cache: tuple[Array, Array], name: str) -> Array:
    normal, scale = cache
    p.add_gradient(f"{name}.weight", np.einsum("nd,nd->d", dy, normal))
    dx = dy * p.weights[f"{name}.weight"]
    along = np.einsum("nd,nd->n", dx, normal)[:, None] / dx.shape[1]
    if f"{name}.bias" in p.weights:
        p.add_gradient(f"{name}.bias", dy.sum(0))
        dx -= dx.mean(-1, keepdims=True)
    dx -= normal * along
    dx *= scale
    return p.a.activation(dx)


def softmax(x: Array) -> Array:
    """Over the last axis, in place."""
    x -= x.max(-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(-1, keepdims=True)
    return x


def gelu(x: Array) -> tuple[Array, Array]:
    """GELU by tanh, and its derivative."""
    c = float(np.sqrt(2 / np.pi))
    cube = 0.044715 * c
    square = x * x
    t = np.tanh(x * (c + cube * square))
    half = 0.5 * (1 + t)
    slope = half + 0.5 * x * (1 - t * t) * (c + 3 * cube * square)
    return x * half, slope


def silu(x: Array) -> tuple[Array, Array]:
    """x sigmoid(x), and its derivative."""
    with np.errstate(over="ignore"):  # exp(-x) may become infinite: the sigmoid is then 0
        sigmoid = 1 / (1 + np.exp(-x))
    y = x * sigmoid
    slope = sigmoid * (1 + x - y)
    return y, slope


Nonlinearity = Callable[[Array], tuple[Array, Array]]


def gated(p: Pass, x: Array, function: Nonlinearity) -> tuple[Array, tuple[Array, Array, Array]]:
    """function(gate) * up, where `x` is gate and up side by side."""
    gate, up = np.split(x, 2, axis=1)
    y, slope = function(gate)
    y = p.a.activation(y)
    return p.a.activation(y * up), (up, y, slope)


def gated_backward(p: Pass, dy: Array, cache: tuple[Array, Array, Array]) -> Array:
    up, y, slope = cache
    half = up.shape[1]
    dx = np.empty((len(dy), 2 * half), dy.dtype)
    np.multiply(p.a.activation(dy * up), slope, out=dx[:, :half])
    np.multiply(dy, y, out=dx[:, half:])
    return p.a.activation(dx)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE by halves: x is [batch, sequence, heads, head_dim]. Backwards, `sin` is negative."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def dropout(p: Pass, x: Array, site: str) -> Array:
    """Its own backward pass: the mask of a site is the same both ways."""
    mask = p.mask(site)
    return x if mask is None else p.a.activation(x * mask)


# ------------------------------------------------------------------------------------------------ layers
def split_heads(model: spec.Model, qkv: Array) -> tuple[Array, Array, Array]:
    """Views [batch, kv head, query head of the group, sequence, head_dim] of q, k, v."""
    batch, sequence, _, head_dim = qkv.shape
    kv = model.kv_heads
    parts = np.split(qkv, [model.heads, model.heads + kv], axis=2)
    q, k, v = (
        part.reshape(batch, sequence, kv, -1, head_dim, copy=False).transpose(0, 2, 3, 1, 4) for part in parts
    )
    return q, k, v


def attention(p: Pass, x: Array, name: str) -> tuple[Array, tuple[Array, ...]]:
    """Causal, by explicit probabilities, rounded before they meet the values as in flash kernels."""
    model = p.model
    flat, _ = linear(p, x, f"{name}.qkv")
    qkv = flat.reshape(-1, p.sequence, model.heads + 2 * model.kv_heads, model.head_dim)
    if p.rope:
        qk = qkv[:, :, : model.heads + model.kv_heads]
        qk[...] = p.a.activation(rotate(qk, *p.rope))
    q, k, v = split_heads(model, qkv)
    scores = p.a.matmul(q, k.swapaxes(-1, -2))
    scores *= model.head_dim**-0.5
    scores += p.causal
    probability = p.a.round(softmax(scores), "softmax")
    heads = p.a.activation(p.a.matmul(p.a.cast(probability, "residual"), v))
    joined = heads.transpose(0, 3, 1, 2, 4).reshape(x.shape)
    y, _ = linear(p, joined, f"{name}.proj")
    return y, (x, qkv, probability, joined)


def attention_backward(p: Pass, dy: Array, cache: tuple[Array, ...], name: str) -> Array:
    x, qkv, probability, joined = cache
    model = p.model
    d_joined = linear_backward(p, dy, joined, f"{name}.proj")
    q, k, v = split_heads(model, qkv)
    shape = (len(qkv), p.sequence, model.kv_heads, -1, model.head_dim)
    d_heads = d_joined.reshape(shape).transpose(0, 2, 3, 1, 4)
    heads = joined.reshape(shape).transpose(0, 2, 3, 1, 4)
    d_qkv = np.empty_like(qkv)
    dq, dk, dv = split_heads(model, d_qkv)
    rounded = p.a.cast(probability, "residual")
    dv[...] = p.a.matmul(rounded.swapaxes(-1, -2), d_heads).sum(2, keepdims=True)
    d_scores = p.a.matmul(d_heads, v.swapaxes(-1, -2))
    d_scores -= np.einsum("...d,...d->...", d_heads, heads)[..., None]
    d_scores *= probability
    d_scores *= model.head_dim**-0.5
    d_scores = p.a.activation(d_scores)
    dq[...] = p.a.matmul(d_scores, k)
    dk[...] = p.a.matmul(d_scores.swapaxes(-1, -2), q).sum(2, keepdims=True)
    d_qkv = p.a.activation(d_qkv)
    if p.rope:
        cos, sin = p.rope
        qk = d_qkv[:, :, : model.heads + model.kv_heads]
        qk[...] = p.a.activation(rotate(qk, cos, -sin))
    return linear_backward(p, d_qkv.reshape(len(x), -1), x, f"{name}.qkv")


def gelu_mlp(p: Pass, x: Array, name: str) -> tuple[Array, tuple[Array, ...]]:
    hidden, _ = linear(p, x, f"{name}.fc")
    inner, slope = gelu(hidden)
    inner = p.a.activation(inner)
    y, _ = linear(p, inner, f"{name}.proj")
    return y, (x, inner, slope)


def gelu_mlp_backward(p: Pass, dy: Array, cache: tuple[Array, ...], name: str) -> Array:
    x, inner, slope = cache
    d_inner = linear_backward(p, dy, inner, f"{name}.proj")
    d_inner *= slope
    return linear_backward(p, p.a.activation(d_inner), x, f"{name}.fc")


def swiglu(p: Pass, x: Array, name: str) -> tuple[Array, tuple[Any, ...]]:
    hidden, _ = linear(p, x, f"{name}.gate_up")
    inner, cache = gated(p, hidden, silu)
    y, _ = linear(p, inner, f"{name}.down")
    return y, (x, inner, cache)


def swiglu_backward(p: Pass, dy: Array, cache: tuple[Any, ...], name: str) -> Array:
    x, inner, inner_cache = cache
    d_inner = linear_backward(p, dy, inner, f"{name}.down")
    return linear_backward(p, gated_backward(p, d_inner, inner_cache), x, f"{name}.gate_up")


def route(p: Pass, probability: Array) -> tuple[Array, Array]:
    """Chosen experts [tokens, top_k] by descending probability, and their probabilities.

    Forced experts come first, the router fills the free places. The margin is the probability of the last
    chosen expert minus that of the best one left out: negative where an expert was forced against it.
    """
    preference = probability.copy()
    if p.forced is not None:
        token, place = np.nonzero(p.forced[len(p.ids)] >= 0)
        preference[token, p.forced[len(p.ids)][token, place]] += 2
    ids = np.argsort(-preference, axis=1, kind="stable")[:, : p.model.top_k]
    chosen = np.take_along_axis(probability, ids, axis=1)
    descending = np.argsort(-chosen, axis=1, kind="stable")
    ids, chosen = (np.take_along_axis(y, descending, axis=1) for y in (ids, chosen))
    left_out = probability.copy()
    np.put_along_axis(left_out, ids, 0, axis=1)
    p.ids.append(ids)
    p.margins.append(chosen[:, -1] - left_out.max(1))
    return ids, chosen


def moe(p: Pass, x: Array, name: str) -> tuple[Array, tuple[Any, ...]]:
    """Top-k experts a token, dropless; every expert computes the tokens that chose it, and no others."""
    a, top_k = p.a, p.model.top_k
    logits = a.matmul(x, p.weights[f"{name}.router.weight"].T)
    ids, chosen = route(p, a.round(softmax(logits), "softmax"))
    share = chosen / chosen.sum(1, keepdims=True)
    pairs = np.argsort(ids, axis=None, kind="stable")  # (token, place) pairs, by expert
    groups = np.split(pairs, np.searchsorted(ids.ravel()[pairs], np.arange(1, p.model.experts)))
    y = np.zeros_like(x)
    experts = []
    for expert, group in enumerate(groups):
        tokens = group // top_k
        hidden = a.activation(a.matmul(x[tokens], p.weights[f"{name}.gate_up.weight"][expert].T))
        inner, cache = gated(p, hidden, gelu)
        out = a.activation(a.matmul(inner, p.weights[f"{name}.down.weight"][expert].T))
        y[tokens] += share.ravel()[group, None] * out
        experts.append((tokens, group, inner, cache, out))
    return a.activation(y), (x, ids, share, experts)


def moe_backward(p: Pass, dy: Array, cache: tuple[Any, ...], name: str) -> Array:
    x, ids, share, experts = cache
    a = p.a
    dx = np.zeros_like(x)
    d_share = np.empty_like(share)
    gate_up, down = p.weights[f"{name}.gate_up.weight"], p.weights[f"{name}.down.weight"]
    d_gate_up, d_down = np.empty_like(gate_up), np.empty_like(down)
    for expert, (tokens, group, inner, gate_cache, out) in enumerate(experts):
        d_out = dy[tokens]
        d_share.ravel()[group] = np.einsum("nd,nd->n", d_out, out)
        d_out = a.activation(d_out * share.ravel()[group, None])
        d_down[expert] = a.matmul(d_out.T, inner)
        d_hidden = gated_backward(p, a.activation(a.matmul(d_out, down[expert])), gate_cache)
        d_gate_up[expert] = a.matmul(d_hidden.T, x[tokens])
        dx[tokens] += a.activation(a.matmul(d_hidden, gate_up[expert]))
    p.add_gradient(f"{name}.gate_up.weight", d_gate_up)
    p.add_gradient(f"{name}.down.weight", d_down)
    # A softmax over all experts, renormalised over the chosen ones, is the softmax over the chosen ones.
    d_chosen = share * (d_share - (share * d_share).sum(1, keepdims=True))
    d_logits = np.zeros((len(x), p.model.experts), x.dtype)
    np.put_along_axis(d_logits, ids, d_chosen, axis=1)
    p.add_gradient(f"{name}.router.weight", a.matmul(d_logits.T, x))
    dx += a.matmul(d_logits, p.weights[f"{name}.router.weight"])
    return a.activation(dx)


# ------------------------------------------------------------------------------------------------- model
FEED_FORWARD = {
    "gpt2": ("mlp", gelu_mlp, gelu_mlp_backward),
    "llama": ("mlp", swiglu, swiglu_backward),
    "moe": ("moe", moe, moe_backward),
}


def embed(p: Pass, tokens: Array) -> Array:
    x = p.weights["wte.weight"][tokens.ravel()]
    if "wpe.weight" in p.weights:
        x = x.reshape(*tokens.shape, -1) + p.weights["wpe.weight"][: tokens.shape[1]]
        x = p.a.activation(x.reshape(tokens.size, -1))
    return dropout(p, x, "embedding")


def embed_backward(p: Pass, dx: Array, tokens: Array) -> None:
    dx = dropout(p, dx, "embedding")
    if "wpe.weight" in p.weights:
        d_position = np.zeros_like(p.weights["wpe.weight"])
        d_position[: tokens.shape[1]] = dx.reshape(*tokens.shape, -1).sum(0)
        p.add_gradient("wpe.weight", d_position)
    order = np.argsort(tokens, axis=None, kind="stable")
    ids, starts = np.unique(tokens.ravel()[order], return_index=True)
    d_embedding = np.zeros_like(p.weights["wte.weight"])
    d_embedding[ids] = np.add.reduceat(dx[order], starts, axis=0)
    p.add_gradient("wte.weight", d_embedding)


def head_loss(p: Pass, x: Array, targets: Array, all_tokens: int) -> tuple[float, Array]:
    """Mean cross-entropy of these tokens, and its gradient as a share of `all_tokens` on x."""
    name = "head" if "head.weight" in p.weights else "wte"
    logits = p.a.round(p.a.matmul(x, p.weights[f"{name}.weight"].T), "logits")
    row = np.arange(len(logits))
    target_logit = logits[row, targets]
    top = logits.max(1)
    logits -= top[:, None]
    np.exp(logits, out=logits)
    total = logits.sum(1)
    losses = p.a.round(np.log(total) + top - target_logit, "loss")
    logits *= (1 / (total * all_tokens))[:, None]  # now d loss / d logits
    p.a.round(logits, "softmax")
    logits[row, targets] -= 1 / all_tokens
    return float(losses.mean()), linear_backward(p, p.a.round(logits, "logits"), x, name)


def loss_and_gradients(p: Pass, tokens: Array, targets: Array, all_tokens: int) -> float:
    """Loss of a micro-batch [rows, sequence]; the gradients are left in `p.gradients`."""
    kind, feed_forward, feed_forward_backward = FEED_FORWARD[p.model.family]
    x = embed(p, tokens)
    caches = []
    for i in range(p.model.layers):
        h = f"h.{i}"
        y, norm1 = norm(p, x, f"{h}.ln1")
        y, attended = attention(p, y, f"{h}.attn")
        x = p.a.activation(x + dropout(p, y, f"{h}.attn"))
        y, norm2 = norm(p, x, f"{h}.ln2")
        y, fed = feed_forward(p, y, f"{h}.{kind}")
        x = p.a.activation(x + dropout(p, y, f"{h}.mlp"))
        caches.append((norm1, attended, norm2, fed))
    y, norm_f = norm(p, x, "ln_f")
    loss, dy = head_loss(p, y, targets.ravel(), all_tokens)
    dx = norm_backward(p, dy, norm_f, "ln_f")
    for i in reversed(range(p.model.layers)):
        h = f"h.{i}"
        norm1, attended, norm2, fed = caches.pop()
        dy = feed_forward_backward(p, dropout(p, dx, f"{h}.mlp"), fed, f"{h}.{kind}")
        dx = p.a.activation(dx + norm_backward(p, dy, norm2, f"{h}.ln2"))
        dy = attention_backward(p, dropout(p, dx, f"{h}.attn"), attended, f"{h}.attn")
        dx = p.a.activation(dx + norm_backward(p, dy, norm1, f"{h}.ln1"))
    embed_backward(p, dx, tokens)
    return loss


# --------------------------------------------------------------------------------------------- optimizer
LEARNING_RATES = spec.lr_table()


LANES = 16  # partial sums of a vectorised kernel that runs along a tensor


def clip_factor(gradients: Mapping[str, Array], o: spec.Optimizer, *, running: bool) -> float:
    """min(1, clip / (norm + eps)). Squares are summed pairwise, or, in the other order, as kernels that keep
    a few running sums do (torch's on a CPU): for large tensors the greatest round-off of the step in fp32."""

    def squares(g: Array) -> float:
        flat = np.square(g).reshape(-1)
        if not running or flat.size < 2 * LANES:
            return float(flat.sum())
        whole = flat[: flat.size // LANES * LANES].reshape(-1, LANES)
        return float(np.add.accumulate(whole, axis=0)[-1].sum() + flat[whole.size :].sum())

    norm = float(np.sqrt(sum(squares(g) for g in gradients.values())))
    return min(1.0, o.clip / (norm + o.clip_eps))


def adamw(
    a: Arithmetic, o: spec.Optimizer, t: int, factor: float, decay: float,
    weight: Array, moment1: Array, moment2: Array, gradient: Array,
) -> None:  # fmt: skip
    """Step t (from 1) in place. The update is made of unrounded moments; what is stored is rounded."""
    rate = float(LEARNING_RATES[min(t, o.horizon) - 1])
    tensors = [x.reshape(-1) for x in (weight, moment1, moment2, gradient)]
    for start in range(0, weight.size, BLOCK):
        w, m, v, g = (x[start : start + BLOCK] for x in tensors)
        g = g * factor
        m *= o.beta1
        m += g * (1 - o.beta1)
        v *= o.beta2
        g *= g
        g *= 1 - o.beta2
        v += g
        denominator = np.sqrt(v / (1 - o.beta2**t))
        denominator += o.eps
        update = m * (rate / (1 - o.beta1**t))
        update /= denominator
        w *= 1 - rate * decay
        w -= update
        for x, kind in ((w, "weights"), (m, "moments"), (v, "moments")):
            a.round(x, kind)


# ------------------------------------------------------------------------------------ order of summation
# What the axes of a parameter are, by which a permutation finds them: v vocabulary, d width, p positions,
# q query heads x head_dim, h rows of qkv, f feed-forward, g gate and up, e experts.
AXES_OF = {
    "wte.weight": "vd", "head.weight": "vd", "wpe.weight": "pd", "ln_f.weight": "d", "ln_f.bias": "d",
    "ln1.weight": "d", "ln1.bias": "d", "ln2.weight": "d", "ln2.bias": "d",
    "attn.qkv.weight": "hd", "attn.qkv.bias": "h", "attn.proj.weight": "dq", "attn.proj.bias": "d",
    "mlp.fc.weight": "fd", "mlp.fc.bias": "f", "mlp.proj.weight": "df", "mlp.proj.bias": "d",
    "mlp.gate_up.weight": "gd", "mlp.down.weight": "df",
    "moe.router.weight": "ed", "moe.gate_up.weight": "egd", "moe.down.weight": "edf",
}  # fmt: skip


class Order:
    """A fixed order of every axis that is summed over: natural, or pseudo-random."""

    def __init__(self, model: spec.Model, batch: int, *, permuted: bool) -> None:
        def shuffled(axis: str, size: int) -> Array:
            if not permuted:
                return np.arange(size)
            return np.argsort(spec.hash_bits(f"order:{axis}", 0, size), kind="stable")

        def repeated(inner: Array, times: int) -> Array:
            return (np.arange(times)[:, None] * len(inner) + inner).ravel()

        self.permuted = permuted
        self.rows = shuffled("rows", batch)
        self.half = shuffled("half", model.head_dim // 2)  # RoPE turns elements i and i + half together
        inside = shuffled("head", model.head_dim) if model.family == "gpt2" else repeated(self.half, 2)
        feed_forward = shuffled("feed-forward", model.d_ff)
        self.axes = {
            "v": shuffled("vocabulary", model.padded_vocab), "d": shuffled("width", model.d_model),
            "p": np.arange(model.sequence), "e": np.arange(model.experts),
            "q": repeated(inside, model.heads), "h": repeated(inside, model.heads + 2 * model.kv_heads),
            "f": feed_forward, "g": repeated(feed_forward, 2),
        }  # fmt: skip
        self.place = {axis: np.argsort(order) for axis, order in self.axes.items()}

    def _take(self, orders: Mapping[str, Array], p: spec.Parameter, values: Array) -> Array:
        if not self.permuted:
            return values
        return np.ascontiguousarray(values[np.ix_(*(orders[axis] for axis in AXES_OF[p.key]))])

    def apply(self, p: spec.Parameter, values: Array) -> Array:
        return self._take(self.axes, p, values)

    def undo(self, p: spec.Parameter, values: Array) -> Array:
        return self._take(self.place, p, values)


# ----------------------------------------------------------------------------------------------- trainer
class Trainer:
    """One model in training. Steps count from the trainer's birth; `index` only chooses the batch."""

    def __init__(
        self, *, model: spec.Model, axes: dict[str, Any], options: dict[str, Any], device: str,
        batches: np.ndarray, seed: int, threads: int, gate: bool, routing: np.ndarray | None,
    ) -> None:  # fmt: skip
        if device != "cpu":
            raise ValueError(f"reference: device {device!r}; valid: cpu")
        self.model, self.axes, self.options, self.forced = model, axes, options, routing
        emulated = options["arithmetic"] == "emulated"
        self.a = Arithmetic(spec.PRECISION[axes["precision"]] if emulated else None)
        self.order = Order(model, axes["batch"], permuted=options["order"] == "permuted")
        ids = self.order.place["v"][batches[:, self.order.rows]]
        self.inputs, self.targets = ids[:, :, :-1], ids[:, :, 1:]
        self.rope: tuple[Array, ...] | None = None
        if model.family != "gpt2":
            tables = spec.rope_tables(model, axes["sequence"])
            self.rope = tuple(x[:, None, self.order.half].astype(self.a.dtype) for x in tables)
        self.parameters = {p.name: p for p in spec.parameters(model)}
        self.stored, self.moments1, self.moments2 = {}, {}, {}
        for name, p in self.parameters.items():
            values = self.order.apply(p, spec.initial(p, seed)).astype(self.a.dtype)
            self.stored[name] = self.a.round(values, "weights")
            self.moments1[name], self.moments2[name] = np.zeros_like(values), np.zeros_like(values)
        self.count = 0
        self.last_loss = float("nan")
        self.last_routing: tuple[Array, Array] | None = None
        self.cast_weights()

    def cast_weights(self) -> None:
        self.used = {name: self.a.cast(w, "weights_used") for name, w in self.stored.items()}

    # ------------------------------------------------------------------------------------ the step
    def step(self, index: int) -> None:
        self.last_loss, gradients = self.loss_and_gradients(index)
        self.count += 1
        factor = clip_factor(gradients, spec.OPTIMIZER, running=self.options["order"] == "permuted")
        for name, p in self.parameters.items():
            adamw(
                self.a, spec.OPTIMIZER, self.count, factor, spec.OPTIMIZER.decay if p.decay else 0.0,
                self.stored[name], self.moments1[name], self.moments2[name], gradients[name],
            )  # fmt: skip
        self.cast_weights()

    def loss_and_gradients(self, index: int) -> tuple[float, dict[str, Array]]:
        """Means over the micro-batches of a batch, at the weights as they are."""
        inputs, targets = self.inputs[index % len(self.inputs)], self.targets[index % len(self.targets)]
        total: dict[str, Array] = {}
        losses, passes = [], []
        for rows in np.split(np.arange(len(inputs)), self.axes["accumulation"]):
            p = Pass(
                self.a, self.model, inputs.shape[1], self.used, self.rope, self.masks(rows),
                self.forced_ids(rows),
            )  # fmt: skip
            losses.append(loss_and_gradients(p, inputs[rows], targets[rows], inputs.size))
            for name, gradient in p.gradients.items():
                summed = gradient + total[name] if name in total else gradient
                total[name] = self.a.round(summed, "accumulation")
            passes.append((p.ids, p.margins))
        if self.model.experts and self.model.layers:
            ids, margins = (np.concatenate(parts, axis=1) for parts in zip(*passes, strict=True))
            self.last_routing = self.natural_tokens(ids).astype(np.int32), self.natural_tokens(margins)
        return float(np.mean(losses)), total

    def masks(self, rows: Array) -> Callable[[str], Array | None]:
        """Site -> factor of every element of a micro-batch: 0, or 1 / (1 - rate) where it is kept.

        Bits belong to the flat index over the whole [batch, sequence, d_model] in natural order.
        """
        rate, size = self.axes["dropout"], self.axes["sequence"] * self.model.d_model
        scale = np.array([0, np.float32(1 / (1 - rate))], self.a.dtype)
        made: dict[str, Array] = {}

        def mask(site: str) -> Array | None:
            if rate == 0:
                return None
            if site not in made:
                path = spec.dropout_path(self.count, site)
                bits = np.stack([spec.hash_bits(path, int(r) * size, size) for r in self.order.rows[rows]])
                kept = bits.reshape(-1, self.model.d_model) >= np.uint32(spec.dropout_threshold(rate))
                made[site] = scale[kept[:, self.order.axes["d"]].astype(np.intp)]
            return made[site]

        return mask

    def forced_ids(self, rows: Array) -> Array | None:
        if self.forced is None or self.count >= len(self.forced):
            return None
        layers, _, top_k = self.forced[self.count].shape
        by_row = self.forced[self.count].reshape(layers, self.axes["batch"], -1, top_k)
        return by_row[:, self.order.rows[rows]].reshape(layers, -1, top_k)

    def natural_tokens(self, x: Array) -> Array:
        """[layers, tokens, …] in the natural order of batch rows."""
        by_row = x.reshape(len(x), self.axes["batch"], -1, *x.shape[2:])
        return by_row[:, np.argsort(self.order.rows)].reshape(x.shape)

    def wait(self) -> None:
        """NumPy leaves nothing enqueued."""

    # ------------------------------------------------------------------------------ what the gate reads
    def loss(self) -> float:
        return self.last_loss

    def first_moments(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, p in self.parameters.items():
            yield name, self.order.undo(p, self.moments1[name])

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, p in self.parameters.items():
            yield name, self.order.undo(p, self.stored[name])

    def routing(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Experts used [layers, tokens, top_k] and the router's margin (see `route`), of the last step."""
        return self.last_routing

    def manifest(self) -> dict[str, str]:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {
            "numpy": np.__version__,
            "blas": f"{blas['name']} {blas['version']}",
            "blas threads": os.environ.get("OPENBLAS_NUM_THREADS") or "the library's default",
            "arithmetic": self.options["arithmetic"],
            "order of summation": self.options["order"],
            "attention": "explicit probabilities",
            "dropout generator": "lowbias32 hash, shared by all stacks under the gate",
            "experts": "one product for each expert over the tokens that chose it",
        }

    def dtypes(self) -> dict[str, list[str]]:
        """As used so far. Emulated bfloat16 is float32 whose values bfloat16 can hold."""
        return {kind: sorted(names) for kind, names in self.a.seen.items()}

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (
            self.a.cast(x.astype(self.a.dtype), kind) for x, kind in ((a, "residual"), (b, "weights_used"))
        )
        return self.a.activation(self.a.matmul(a, b))
