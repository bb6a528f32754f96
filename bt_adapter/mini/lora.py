"""Low-rank adapters on the language model's attention, and frozen products in bfloat16 while training on a CPU.

LoRA (arXiv 2106.09685): y = x·Wᵀ + scale · (x·Aᵀ)·Bᵀ with A [r, in] random and B [out, r] zero at the start. After
training, the product is merged into W and the model is an ordinary one again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 2.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class _HalfProduct(torch.autograd.Function):
    """x·Wᵀ with a frozen bfloat16 W and float32 in and out, both ways. Nothing but W is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.bfloat16(), weight).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (grad.bfloat16() @ weight).float(), None


class TunedLinear(nn.Module):
    """A frozen linear layer [out, in] without bias, with an adapter of the given rank (0: none).

    half: multiply by a bfloat16 copy of the weight (twice to three times as fast on CPUs with AVX512-BF16).
    """

    def __init__(self, base: nn.Linear, rank: int = 0, half: bool = False) -> None:
        super().__init__()
        if base.bias is not None:
            raise ValueError("base has a bias; expected a layer without")
        self.base: nn.Linear = base
        self.low: bool = half
        self.weight_half: Tensor
        if half:
            self.register_buffer("weight_half", base.weight.detach().bfloat16(), persistent=False)
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
            self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = _HalfProduct.apply(x, self.weight_half) if self.low else self.base(x)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + F.linear(F.linear(x, self.lora_a), self.lora_b * SCALE)
        return y


def add_adapters(model: nn.Module, rank: int, half: bool = False, targets: Iterable[str] = TARGETS) -> None:
    """Put TunedLinear in the place of bias-free linear layers: those in targets get adapters, all may go half."""
    targets = tuple(targets)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, TunedLinear) and child.bias is None:
                own_rank = rank if child_name in targets else 0
                if own_rank or half:
                    setattr(module, child_name, TunedLinear(child, own_rank, half))


def remove_adapters(model: nn.Module) -> None:
    """Put the frozen layers back, adapters dropped."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TunedLinear):
                setattr(module, name, child.base)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{"layers.0.self_attn.q_proj.lora_a": tensor, ...} of every adapter."""
    return {
        f"{name}.{part}": getattr(module, part).detach()
        for name, module in model.named_modules()
        if isinstance(module, TunedLinear) and module.lora_a is not None
        for part in ("lora_a", "lora_b")
    }


def load_adapters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a saved adapter state into the model's adapters. ValueError where the names differ."""
    own = adapter_state(model)
    if own.keys() != state.keys():
        raise ValueError(f"adapters do not match: {sorted(own.keys() ^ state.keys())[:4]} are on one side only")
    for name, value in own.items():
        value.copy_(state[name])


@torch.no_grad()
def merge_adapters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Add every adapter's product to the plain linear layer it was trained on: W += scale · B·A."""
    for name in sorted({key.rpartition(".")[0] for key in state}):
        weight = model.get_parameter(f"{name}.weight")
        product = state[f"{name}.lora_b"].float() @ state[f"{name}.lora_a"].float()
        weight.add_((SCALE * product).to(weight.device, weight.dtype))
