"""torch-eager's training step through `torch.compile`: the same modules, Inductor's kernels.

Forward and backward are compiled as one loss function (AOTAutograd splits it); the optimizer is torch's
fused kernel, or compiled too. Everything else, the step's text included, is `torch_eager`'s.
"""

from __future__ import annotations

from typing import Any

import torch

from stacks.train import spec, torch_eager

STACK = {
    "role": "stack",
    "framework": "torch",
    "summary": "PyTorch compiled: torch.compile over torch-eager's step",
    "requires": ["torch"],
    "needs": ["c++ compiler"],
    "devices": ["cpu", "cuda"],
    "install": "pip install torch",
    "axes": {"attention": {"cpu": ["best", "math", "flash"], "cuda": ["best", "math", "cudnn", "flash"]}},
    "variables": {
        "TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor",
        "TRITON_CACHE_DIR": "{cache}/triton",
        "CUDA_CACHE_PATH": "{cache}/cuda",
    },
    "options": {
        "mode": ["default", "max-autotune-no-cudagraphs", "reduce-overhead"],
        "optimizer": ["fused", "foreach", "compiled"],
        "clip": ["apart", "folded", "blocked"],
    },
    "reordered": {"clip": "blocked"},
    "variants": {
        "default": {"mode": "default", "optimizer": "fused", "clip": "apart"},
        "tuned": {"mode": "max-autotune-no-cudagraphs", "optimizer": "compiled", "clip": "apart"},
    },
}


class Trainer(torch_eager.Trainer):
    def prepare(self) -> None:
        mode = self.options["mode"]
        compiled = torch.compile(self.network, mode=mode, fullgraph=True, dynamic=False)
        self.compiled = compiled

        def loss_and_gradient(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(inputs, targets)
            (loss / self.axes["accumulation"]).backward()
            return loss.detach()

        self.loss_and_gradient = loss_and_gradient
        if self.options["optimizer"] == "compiled":
            self.optimizer.step = torch.compile(self.optimizer.step, mode=mode, dynamic=False)

    def use_fused(self) -> bool:
        return self.options["optimizer"] == "fused" or (
            self.table["weights"] == "bfloat16" and self.options["optimizer"] == "foreach"
        )

    def make_optimizer(self) -> Any:
        optimizer = super().make_optimizer()
        if self.options["optimizer"] == "compiled":  # a number would be compiled in: the rate is a tensor
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device=self.device)
                group["foreach"] = True
                group["capturable"] = True
        return optimizer

    def manifest(self) -> dict[str, str]:
        facts = super().manifest()
        graphs = "CUDA graphs" if self.options["mode"] == "reduce-overhead" else "none"
        if self.device.type != "cuda":
            graphs = "none: a CPU has none"
        counters = torch._dynamo.utils.counters
        facts.update(
            compile=f"torch.compile(mode={self.options['mode']!r}, fullgraph=True, dynamic=False), Inductor",
            graphs=graphs,
            graph_breaks=str(sum(counters["graph_break"].values())),
            recompilations=str(max(0, counters["stats"].get("unique_graphs", 1) - 1)),
        )
        if self.options["optimizer"] == "compiled":
            facts["optimizer"] = (
                "torch.compile over torch.optim.AdamW(foreach).step, clip_grad_norm_(foreach)"
            )
        return facts


__all__ = ["STACK", "Trainer", "spec"]
