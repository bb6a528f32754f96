"""Test inputs and minimum work of quantize_rows, on the rows of a layer's state."""

from bt_kernels._cases import Shape, Variant, Work
from bt_kernels.ops.quantize_rows import OLDEST


def _inputs(visible, heads, width, draw):
    return {"rows": draw(visible.batch * (1 + visible.tokens), heads * width)}


def _work(s: Shape) -> tuple[Work, Work]:
    """Count the work: rows in, their elements in 8 bits and their scales out. There is no backward."""
    rows = s.batch * (1 + s.tokens)
    return Work(s.bytes(1 + s.tokens) + rows * s.dim + rows * 4), Work(0)


VARIANTS = (Variant("quantize_rows", "", _inputs, (), (), _work, takes_visible=False, oldest=OLDEST),)
