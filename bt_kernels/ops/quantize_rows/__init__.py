"""The op quantize_rows: it quantises rows to float8 with a scale for each."""

import torch
from torch import Tensor

from bt_kernels import _triton
from bt_kernels._checks import check_tensor
from bt_kernels._dispatch import Kernel, forced_backend
from bt_kernels._library import define_op
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.quantize_rows import reference

_LARGEST_WIDTH = 65536  # of a row that a program holds in registers
OLDEST = 89
"""The oldest architecture that converts to float8, sm_89."""


def _why_not_triton(rows: Tensor, *_) -> str | None:
    if rows.shape[-1] > _LARGEST_WIDTH:
        return f"rows are wider than {_LARGEST_WIDTH} elements"
    if rows.device.type == "cuda" and _triton.architecture(rows.device) < OLDEST:
        return f"float8 needs compute capability 8.9 or newer, {rows.device} is older"
    return _triton.why_not_without_float64(rows)


_OP = define_op(
    "quantize_rows",
    "Tensor rows",
    differentiable=(),
    kernels=(
        triton_kernel(f"{__name__}.triton", why_not=_why_not_triton),
        Kernel("reference", reference.forward),
    ),
    fake=lambda rows: (
        rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn),
        rows.new_empty(len(rows), 1, dtype=torch.float32),
    ),
    autocast="none",
    results=("values", "scale"),
    takes_visible=False,
)


def quantize_rows(rows: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantise rows to float8 (e4m3), each by a scale of its own, in one pass.

    Equivalent to::

        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) * (1 / 448)
        values = (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    448 is the largest number of float8 e4m3, so that ``values * scale`` is near ``rows``: the error is at most a 16th
    of an element, or a 1024th of the scale where that is more. A row of zeros stays one. In a row with a NaN all is
    NaN; in one with an infinity the infinities become NaN and the rest 0. The results have no gradient. A compiler
    (``torch.compile``) traces this definition, which it fuses with what makes the rows, unless ``backend`` is given.
    Source: scaled 8-bit floating point, arXiv 2209.05433, with the scale of a row taken from its largest element.

    Args:
        rows: ``[n, I]``, any strides.
        backend: "reference" or "triton"; None chooses automatically.

    Returns:
        ``values [n, I]`` in ``torch.float8_e4m3fn`` and ``scale [n, 1]`` in float32, as products of float8 take them.

    Raises:
        ValueError, TypeError: a shape or dtype does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_tensor("rows", rows, "[n, I]", (None, None))
    if rows.shape[1] == 0:
        raise ValueError(f"rows must have at least one column [n, I], but its shape is {list(rows.shape)}")
    rows = rows.detach()
    if torch.compiler.is_compiling() and forced_backend(backend) is None:
        return reference.forward(rows)
    return _OP(rows, backend)
