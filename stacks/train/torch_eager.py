"""The training step in eager PyTorch: modules, autograd, SDPA, `torch.optim.AdamW`.

Read from top to bottom: layers, model, then `Trainer`, whose `step` is the whole training step. Module
names are the canonical parameter names of `spec.parameters`. Only a worker imports this file: the harness
reads the literal `STACK` without running anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from stacks.train import spec

STACK = {
    "role": "stack",
    "framework": "torch",
    "summary": "PyTorch eager: SDPA, AdamW fused or foreach",
    "requires": ["torch"],
    "devices": ["cpu", "cuda"],
    "install": "pip install torch",
    "axes": {"attention": {"cpu": ["best", "math", "flash"], "cuda": ["best", "math", "cudnn", "flash"]}},
    "variables": {
        "TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor",
        "TRITON_CACHE_DIR": "{cache}/triton",
        "CUDA_CACHE_PATH": "{cache}/cuda",
    },
    "options": {"optimizer": ["fused", "foreach"], "clip": ["apart", "folded", "blocked"]},
    "reordered": {"clip": "blocked"},
    "variants": {
        "default": {"optimizer": "fused", "clip": "apart"},
        "tuned": {"optimizer": "fused", "clip": "folded"},
    },
}

ATTENTION_BACKENDS = {
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


class Dropout(nn.Module):
    """On residual branches and the embedding; under the gate the mask all stacks share."""

    def __init__(self, site: str, rate: float, state: Any) -> None:
        super().__init__()
        self.site, self.rate, self.state = site, rate, state

    def forward(self, x: Any) -> Any:
        if self.rate == 0.0:
            return x
        if not self.state.on:
            return F.dropout(x, self.rate)
        keep = self.state.masks[self.site].view(x.shape)
        return torch.where(keep, x * float(np.float32(1 / (1 - self.rate))), 0.0)


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Any) -> Any:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Any) -> Any:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # torch would keep bf16 statistics there
            return F.layer_norm(
                x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
            ).to(x.dtype)
        return super().forward(x)


def norm(model: spec.Model) -> Any:
    if model.family == "gpt2":
        return LayerNorm(model.d_model, eps=model.norm_eps)
    return RMSNorm(model.d_model, model.norm_eps)


class Attention(nn.Module):
    def __init__(self, model: spec.Model, kind: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.kind = kind
        bias = model.family == "gpt2"
        self.qkv = nn.Linear(model.d_model, model.qkv_rows, bias=bias)
        self.proj = nn.Linear(model.d_model, model.d_model, bias=bias)

    def forward(self, x: Any, rope: Any) -> Any:
        b, t, d = x.shape
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        split = self.qkv(x).split([n * self.head_dim for n in sizes], dim=2)
        q, k, v = (y.view(b, t, n, self.head_dim).transpose(1, 2) for y, n in zip(split, sizes, strict=True))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        gqa = self.heads != self.kv_heads
        if self.kind == "best":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            with sdpa_kernel(ATTENTION_BACKENDS[self.kind]):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """RoPE by halves, in fp32: x is [b, heads, t, head_dim], cos and sin are [t, head_dim / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class GeluMLP(nn.Module):
    def __init__(self, model: spec.Model) -> None:
        super().__init__()
        self.fc = nn.Linear(model.d_model, model.d_ff)
        self.proj = nn.Linear(model.d_ff, model.d_model)

    def forward(self, x: Any) -> Any:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class SwigluMLP(nn.Module):
    def __init__(self, model: spec.Model) -> None:
        super().__init__()
        self.gate_up = nn.Linear(model.d_model, 2 * model.d_ff, bias=False)
        self.down = nn.Linear(model.d_ff, model.d_model, bias=False)

    def forward(self, x: Any) -> Any:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """Top-k of all experts. Every expert sees every token and unchosen results are masked: the same
    masked dense product as in the other stacks, since no grouped product exists on every device."""

    def __init__(self, model: spec.Model, layer: int, state: Any) -> None:
        super().__init__()
        e, d, ff = model.experts, model.d_model, model.d_ff
        self.top_k, self.layer, self.state = model.top_k, layer, state
        self.router = nn.Linear(d, e, bias=False)
        self.gate_up = Stacked(e, 2 * ff, d)
        self.down = Stacked(e, d, ff)

    def forward(self, x: Any) -> Any:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        probability = F.linear(x.float(), self.router.weight.float()).softmax(dim=-1)
        ids = self.choose(probability)
        weight = probability.gather(1, ids)
        weight = weight / weight.sum(dim=1, keepdim=True)
        combine = torch.zeros_like(probability).scatter(1, ids, weight)  # [tokens, experts]
        gate, up = torch.einsum("nd,efd->enf", x, self.gate_up.weight).chunk(2, dim=-1)
        hidden = F.gelu(gate, approximate="tanh") * up
        out = torch.einsum("enf,edf->end", hidden, self.down.weight)
        return torch.einsum("end,ne->nd", out.float(), combine).to(x.dtype).view(shape)

    def choose(self, probability: Any) -> Any:
        if not self.state.on:
            return probability.topk(self.top_k, dim=-1).indices
        top, ids = probability.topk(self.top_k + 1, dim=-1)
        ids, forced = ids[:, : self.top_k], self.state.forced[self.layer]
        ids = torch.where(forced >= 0, forced, ids)
        self.state.chosen[self.layer].copy_(ids)
        self.state.margin[self.layer].copy_((top[:, -2] - top[:, -1]).detach())
        return ids


class Stacked(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Block(nn.Module):
    def __init__(self, model: spec.Model, axes: dict[str, Any], layer: int, state: Any) -> None:
        super().__init__()
        self.ln1, self.attn = norm(model), Attention(model, axes["attention"])
        self.ln2 = norm(model)
        if model.family == "moe":
            self.moe = Experts(model, layer, state)
        else:
            self.mlp = GeluMLP(model) if model.family == "gpt2" else SwigluMLP(model)
        self.drop_attn = Dropout(f"h.{layer}.attn", axes["dropout"], state)
        self.drop_mlp = Dropout(f"h.{layer}.mlp", axes["dropout"], state)

    def forward(self, x: Any, rope: Any) -> Any:
        feed_forward = self.moe if hasattr(self, "moe") else self.mlp
        x = x + self.drop_attn(self.attn(self.ln1(x), rope))
        return x + self.drop_mlp(feed_forward(self.ln2(x)))


class Transformer(nn.Module):
    def __init__(self, model: spec.Model, axes: dict[str, Any], state: Any) -> None:
        super().__init__()
        self.model, self.axes = model, axes
        self.wte = nn.Embedding(model.padded_vocab, model.d_model)
        if model.family == "gpt2":
            self.wpe = nn.Embedding(model.sequence, model.d_model)
        self.drop = Dropout("embedding", axes["dropout"], state)
        self.h = nn.ModuleList(Block(model, axes, i, state) for i in range(model.layers))
        self.ln_f = norm(model)
        self.head = nn.Linear(model.d_model, model.padded_vocab, bias=False)
        if model.tied:
            self.head.weight = self.wte.weight
        if model.family != "gpt2":
            tables = spec.rope_tables(model, axes["sequence"])
            for name, table in zip(("cos", "sin"), tables, strict=True):
                self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(self, tokens: Any, targets: Any) -> Any:
        x = self.wte(tokens)
        rope = None
        if self.model.family == "gpt2":
            x = x + self.wpe.weight[: tokens.shape[1]]
        else:
            rope = (self.cos, self.sin)
        x = self.drop(x)
        for block in self.h:
            if self.axes["remat"] == "block":
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.loss(self.ln_f(x).flatten(0, 1), targets.flatten())

    def loss(self, x: Any, targets: Any) -> Any:
        """Mean cross-entropy in fp32. Chunked: logits of one chunk at a time, made again backwards."""
        if self.axes["loss"] == "full":
            return F.cross_entropy(self.head(x).float(), targets)
        total = 0.0
        chunks = spec.LOSS_CHUNKS
        for rows, ids in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            total = total + checkpoint(self.chunk_loss, rows, ids, use_reentrant=False)
        return total / targets.numel()

    def chunk_loss(self, x: Any, targets: Any) -> Any:
        return F.cross_entropy(self.head(x).float(), targets, reduction="sum")


def hash_bits(path: str, start: int, count: int, seed: int, device: Any) -> torch.Tensor:
    """int64 [count] on `device`: the bits of `spec.hash_bits` (torch lacks arithmetic on uint32)."""
    mask = 0xFFFFFFFF
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = (x * spec.INDEX_MULTIPLIER & mask) ^ spec.path_seed(path, seed)
    x = x ^ (x >> spec.HASH_SHIFTS[0])
    x = x * spec.HASH_MULTIPLIERS[0] & mask
    x = x ^ (x >> spec.HASH_SHIFTS[1])
    x = x * spec.HASH_MULTIPLIERS[1] & mask
    return x ^ (x >> spec.HASH_SHIFTS[2])


def initial(parameter: spec.Parameter, seed: int, device: Any) -> torch.Tensor:
    """fp32, bit for bit `spec.initial`, made on `device`."""
    if parameter.init != "uniform":
        return torch.full(parameter.shape, 1.0 if parameter.init == "ones" else 0.0, device=device)
    bits = hash_bits(parameter.name, 0, parameter.size, seed, device)
    values = ((bits >> 8) - (1 << 23)).to(torch.float32) * 2.0**-23
    return (values * spec.uniform_scale(parameter.std)).view(parameter.shape)


class Gate:
    """What the parity run shares with the layers, as tensors whose contents change from step to step:
    dropout masks from the shared hash, forced experts (-1: free), and the experts chosen."""

    def __init__(
        self, on: bool, model: spec.Model, axes: dict[str, Any], routing: np.ndarray | None, device: Any
    ) -> None:
        self.on, self.routing, self.rate = on, routing, axes["dropout"]
        self.rows = spec.tokens_per_step(axes) // axes["accumulation"]
        self.width, self.device = model.d_model, device
        self.masks: dict[str, torch.Tensor] = {}
        if on and self.rate:
            empty = torch.ones(self.rows * self.width, dtype=torch.bool, device=device)
            self.masks = {site: empty.clone() for site in spec.dropout_sites(model)}
        if on and model.family == "moe":
            shape = (model.layers, self.rows)
            self.forced = torch.full((*shape, model.top_k), -1, device=device)
            self.chosen, self.margin = self.forced.clone(), torch.zeros(shape, device=device)
        self.record: list[tuple[torch.Tensor, torch.Tensor]] = []

    def load(self, step: int, micro: int) -> None:
        if micro == 0:
            self.record = []
        for site, mask in self.masks.items():
            path, start = spec.dropout_path(step, site), micro * mask.numel()
            bits = hash_bits(path, start, mask.numel(), 0, self.device)
            mask.copy_(bits >= spec.dropout_threshold(self.rate))
        if self.routing is not None and step < len(self.routing):
            rows = self.routing[step, :, micro * self.rows : (micro + 1) * self.rows]
            self.forced.copy_(torch.from_numpy(np.ascontiguousarray(rows)))

    def keep(self) -> None:
        if hasattr(self, "chosen"):
            self.record.append((self.chosen.clone(), self.margin.clone()))


def scaled_matmul_precision(matmul: str) -> None:
    """Sets what fp32 products use, on every backend that listens."""
    torch.set_float32_matmul_precision("high" if matmul == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = matmul == "tf32"


class Trainer:
    """One model in training. `step` enqueues a whole step without waiting for the device."""

    def __init__(
        self, *, model: spec.Model, axes: dict[str, Any], options: dict[str, Any], device: str,
        batches: np.ndarray, seed: int, threads: int, gate: bool, routing: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.model, self.axes, self.options, self.device = model, axes, options, torch.device(device)
        self.table = spec.PRECISION[axes["precision"]]
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        scaled_matmul_precision(self.table["matmul"])
        self.gate = Gate(gate, model, axes, routing, self.device)
        micro = axes["accumulation"]
        data = torch.from_numpy(batches.astype(np.int64)).to(self.device)
        self.inputs = data[:, :, :-1].unflatten(1, (micro, -1)).contiguous()  # [n, micro, rows, sequence]
        self.targets = data[:, :, 1:].unflatten(1, (micro, -1)).contiguous()
        self.build(seed)
        self.rates = torch.from_numpy(spec.lr_table()).to(self.device)
        self.count = 0
        self.loss_value = torch.zeros((), device=self.device)
        self.prepare()

    def build(self, seed: int) -> None:
        """Model in the dtype that products read; masters in the stored dtype where the two differ."""
        stored, used = getattr(torch, self.table["weights"]), getattr(torch, self.table["weights_used"])
        with torch.device("meta"):
            self.network = Transformer(self.model, self.axes, self.gate)
        self.network.to(used).to_empty(device=self.device)
        if self.model.tied:
            self.network.head.weight = self.network.wte.weight  # moving off the meta device unties
        if self.model.family != "gpt2":
            for name, table in zip(
                ("cos", "sin"), spec.rope_tables(self.model, self.axes["sequence"]), strict=True
            ):
                setattr(self.network, name, torch.from_numpy(table).to(self.device))
        self.parameters = dict(self.network.named_parameters())
        self.masters = {}
        for p in spec.parameters(self.model):
            values = initial(p, seed, self.device).to(stored)
            self.parameters[p.name].data.copy_(values)
            same = stored == used
            self.masters[p.name] = self.parameters[p.name] if same else nn.Parameter(values)
        self.split = stored != used  # masters apart from the weights that products read
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Any:
        o = spec.OPTIMIZER
        decayed = {p.name for p in spec.parameters(self.model) if p.decay}
        groups = [
            {"params": [w for n, w in self.masters.items() if n in decayed], "weight_decay": o.decay},
            {"params": [w for n, w in self.masters.items() if n not in decayed], "weight_decay": 0.0},
        ]
        fused = self.use_fused()
        return torch.optim.AdamW(
            groups, lr=torch.zeros((), device=self.device) if fused or self.device.type != "cpu" else 0.0,
            betas=(o.beta1, o.beta2), eps=o.eps, fused=fused, foreach=not fused,
            capturable=not fused and self.device.type != "cpu",
        )  # fmt: skip

    def use_fused(self) -> bool:
        """foreach rounds every operation to the stored dtype: bf16 weights need fused, which does not."""
        return self.options["optimizer"] == "fused" or self.table["weights"] == "bfloat16"

    def prepare(self) -> None:
        """A place for stacks that build on this one."""
        self.loss_and_gradient = self.forward_backward

    def forward_backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.network(inputs, targets)
        (loss / self.axes["accumulation"]).backward()
        return loss.detach()

    # ------------------------------------------------------------------------------------ the step
    def step(self, index: int) -> None:
        inputs, targets = self.inputs[index % len(self.inputs)], self.targets[index % len(self.targets)]
        losses = []
        for micro in range(self.axes["accumulation"]):
            if self.gate.on:
                self.gate.load(self.count, micro)
            losses.append(self.loss_and_gradient(inputs[micro], targets[micro]))
            if self.gate.on:
                self.gate.keep()
            if self.split:
                self.move_gradients(first=micro == 0)
        self.loss_value = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        self.update()

    def move_gradients(self, *, first: bool) -> None:
        """Gradients of the cast weights into (or onto) the fp32 gradients of the masters."""
        source = [w.grad for w in self.parameters.values()]
        target = list(self.masters.values())
        if first and target[0].grad is None:
            for w in target:
                w.grad = torch.empty_like(w)
        gradients = [w.grad for w in target]
        if first:
            torch._foreach_copy_(gradients, source)
        else:
            torch._foreach_add_(gradients, source)
        for w in self.parameters.values():
            w.grad = None

    def update(self) -> None:
        """Clip by the global norm, AdamW at this step's rate, cast the new weights: no host round trip."""
        masters = list(self.masters.values())
        self.clip(masters)
        rate = self.rates[min(self.count, len(self.rates) - 1)]
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = float(rate)  # on a CPU: no device to wait for
        self.optimizer.step()
        if self.split:
            with torch.no_grad():
                torch._foreach_copy_(list(self.parameters.values()), masters)
        else:
            self.optimizer.zero_grad(set_to_none=True)
        self.count += 1

    def clip(self, masters: list[torch.Tensor]) -> None:
        """Apart: one pass scales the gradients. Folded: the fused optimizer divides by 1 / coefficient.
        Blocked: as apart, with squares summed by blocks (on a CPU torch's norm keeps running sums, and errs
        by 5e-5 on 124 M elements: the gate's re-ordered run shows it)."""
        o, gradients, how = spec.OPTIMIZER, [w.grad for w in masters], self.options["clip"]
        if how == "blocked":
            norm = torch.stack([block_norm(g) for g in gradients]).norm()
            torch._foreach_mul_(gradients, (o.clip / (norm + o.clip_eps)).clamp(max=1.0))
        elif how == "folded" and self.use_fused():
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
            self.optimizer.grad_scale = ((norm + o.clip_eps) / o.clip).clamp(min=1.0).float()
            self.optimizer.found_inf = torch.zeros((), device=self.device)
        else:
            torch.nn.utils.clip_grad_norm_(masters, o.clip, foreach=True)

    def wait(self) -> None:
        """All enqueued work of the device: parameters and optimizer state, not the loss alone."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------------------ what the gate reads
    def loss(self) -> float:
        return float(self.loss_value)

    def first_moments(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, weight in self.masters.items():
            yield name, self.optimizer.state[weight]["exp_avg"].float().cpu().numpy()

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, weight in self.masters.items():
            yield name, weight.detach().float().cpu().numpy()

    def routing(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.model.family != "moe":
            return None
        ids, margin = (torch.cat(x, dim=1) for x in zip(*self.gate.record, strict=True))
        return ids.cpu().numpy().astype(np.int32), margin.float().cpu().numpy()

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """One matrix product in the precision in force."""
        dtype = getattr(torch, self.table["weights_used"])
        x, y = (torch.from_numpy(z).to(self.device, dtype) for z in (a, b))
        return (x @ y).float().cpu().numpy()

    def dropout_sample(self, step: int, site: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Output and gradient of this stack's own dropout of `count` ones: its mask, twice."""
        x = torch.ones(count, device=self.device, requires_grad=True)
        y = F.dropout(x, self.axes["dropout"])
        y.sum().backward()
        return y.detach().cpu().numpy(), x.grad.cpu().numpy()

    def dtypes(self) -> dict[str, list[str]]:
        """The dtype of each class of tensor in a real step, from the operations dispatched in it."""
        census = Census()
        hooks = [block.register_forward_hook(census.saw("residual")) for block in self.network.h]
        hooks.append(self.network.head.register_forward_hook(census.saw("logits")))
        hooks += [w.register_hook(census.saw_gradient) for w in self.parameters.values() if w.requires_grad]
        with census:
            eager = self.forward_backward(self.inputs[0, 0], self.targets[0, 0])
        for hook in hooks:
            hook.remove()
        census.add("loss", eager.dtype)
        for name, weight in self.masters.items():
            census.add("weights", weight.dtype)
            census.add("weights_used", self.parameters[name].dtype)
            census.add("accumulation", weight.grad.dtype)
            census.add("moments", self.optimizer.state[weight]["exp_avg"].dtype)
            census.add("moments", self.optimizer.state[weight]["exp_avg_sq"].dtype)
        for w in self.parameters.values():
            w.grad = None
        return {k: sorted(v) for k, v in census.seen.items()}

    def manifest(self) -> dict[str, str]:
        fused = self.use_fused()
        return {
            "matmul_precision": torch.get_float32_matmul_precision(),
            "attention_kernel": self.attention_kernel(),
            "graphs": "none: every operation is launched by the host",
            "donation": "in place: parameters and moments are updated where they lie",
            "optimizer": f"torch.optim.AdamW({'fused' if fused else 'foreach'}), "
            f"clipping {self.options['clip']}",
            "remat": self.axes["remat"],
            "compile": "none",
            "generator": "philox" if self.device.type == "cuda" else "mt19937",
            "allocator": allocator(self.device),
            "threads": f"{torch.get_num_threads()} intra-op, {torch.get_num_interop_threads()} inter-op",
            "options": ", ".join(f"{k}={v}" for k, v in sorted(self.options.items())),
            "weight_cast": "once a step, foreach copy" if self.split else "never",
            "experts": "masked dense product" if self.model.family == "moe" else "none",
        }

    def attention_kernel(self) -> str:
        """Name of the attention operations that a real step dispatches."""
        census = Census()
        with census:
            self.forward_backward(self.inputs[0, 0], self.targets[0, 0])
        for w in self.parameters.values():
            w.grad = None
        return ", ".join(sorted(census.attention)) or "matmul, softmax, matmul (math)"

    def memory(self) -> dict[str, int | None]:
        """Bytes of torch's caching allocator; null on a CPU, which keeps no such account."""
        if self.device.type != "cuda":
            return {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }


def block_norm(x: torch.Tensor, block: int = 1 << 14) -> torch.Tensor:
    """Euclidean norm in fp32 as the norm of the norms of blocks."""
    flat = x.reshape(-1).float()
    whole = flat[: len(flat) // block * block]
    norms = torch.linalg.vector_norm(whole.view(-1, block), dim=1)
    return torch.cat([norms, flat[len(whole) :]]).norm()


def allocator(device: Any) -> str:
    return "torch caching allocator" if device.type == "cuda" else "malloc (torch CPU allocator)"


class Census(torch.utils._python_dispatch.TorchDispatchMode):
    """Looks at every dispatched operation and notes dtypes of statistics, softmax and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}
        self.attention: set[str] = set()

    def add(self, name: str, dtype: torch.dtype) -> None:
        self.seen.setdefault(name, set()).add(str(dtype).removeprefix("torch."))

    def saw(self, name: str) -> Any:
        return lambda module, inputs, output: self.add(name, output.dtype)

    def saw_gradient(self, gradient: torch.Tensor) -> None:
        self.add("gradients", gradient.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("native_layer_norm", "_fused_rms_norm"):
            for statistic in out[1:]:
                self.add("norm_statistics", statistic.dtype)
        elif name in ("rsqrt", "mean"):
            self.add("norm_statistics", out.dtype)
        elif name in ("_log_softmax", "nll_loss_forward"):
            value = out if isinstance(out, torch.Tensor) else out[0]
            self.add("softmax" if name == "_log_softmax" else "loss", value.dtype)
        elif name in ("_softmax", "_safe_softmax"):
            self.add("softmax", out.dtype)
        elif "scaled_dot_product" in name:
            self.attention.add(name.removeprefix("_"))
            if not name.endswith("backward") and not isinstance(out, torch.Tensor):
                self.add("softmax", out[1].dtype)  # log-sum-exp of the rows
        return out
