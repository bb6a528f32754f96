"""Ridge regression in closed form, for the small world's probes and the start of its projector."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(x: Tensor, y: Tensor, strength: float | Tensor) -> Tensor:
    """Weights [width, targets] of least squares with ``strength`` n |w|²; x [n, width], y [n, targets]."""
    return torch.linalg.solve(x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
