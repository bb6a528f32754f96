"""Test inputs and minimum work of temporal_attention."""

from bt_kernels._cases import Shape, Variant, Work


def _inputs(visible, heads, width, draw):
    return {"qkv": draw(visible.batch, visible.tokens, 3, heads, width)}


def _work(s: Shape) -> tuple[Work, Work]:
    product = 2 * s.batch * s.tokens * s.frames * s.dim
    return Work(4 * s.bytes(s.tokens), 2 * product), Work(7 * s.bytes(s.tokens), 5 * product)


VARIANTS = (Variant("temporal_attention", "", _inputs, ("qkv",), ("qkv",), _work),)
