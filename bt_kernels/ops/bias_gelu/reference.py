"""Definition of bias_gelu in plain PyTorch. Legend: F width of a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUICK = 1.702
"""Factor of quick-GELU, x·sigmoid(1.702·x)."""
APPROXIMATE = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""torch's name of the approximation, for each activation that is a GELU."""
ACTIVATIONS = ("quick_gelu", *APPROXIMATE)


def forward(x, bias, act) -> Tensor:
    total = _total(x, bias)
    if act == "quick_gelu":
        activated = total * torch.sigmoid(QUICK * total)
    else:
        activated = F.gelu(total, approximate=APPROXIMATE[act])
    return activated.to(x.dtype).contiguous()


def backward(grad, x, bias, act, needs) -> tuple[Tensor | None, Tensor | None]:
    total = _total(x, bias)
    grad = grad.to(total.dtype)
    if act == "quick_gelu":
        share = torch.sigmoid(QUICK * total)
        grad = grad * share * (1 + QUICK * total * (1 - share))
    else:
        grad = torch.ops.aten.gelu_backward(grad, total, approximate=APPROXIMATE[act])
    grad_bias = None
    if needs[1] and bias is not None:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
    return grad.to(x.dtype).contiguous() if needs[0] else None, grad_bias


def _total(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x + bias`` in float32 or wider."""
    total = x.to(torch.promote_types(x.dtype, torch.float32))
    return total if bias is None else total + bias.to(total.dtype)
