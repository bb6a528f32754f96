"""Test inputs and minimum work of spatial_attention."""

from bt_kernels._cases import Shape, Variant, Work


def _inputs(visible, heads, width, draw):
    return {"qkv": draw(visible.batch, 1 + visible.tokens, 3, heads, width), "frame_weight": None}


def _weighted_inputs(visible, heads, width, draw):
    return {**_inputs(visible, heads, width, draw), "frame_weight": draw(visible.batch, visible.steps).abs()}


def _work(s: Shape) -> tuple[Work, Work]:
    product = 2 * s.batch * s.frames * (1 + s.groups) ** 2 * s.dim
    lse = s.batch * s.frames * s.heads * (1 + s.groups) * 4
    cls = s.batch * s.frames * s.dim * 4
    rows = s.bytes(1 + s.tokens)
    return Work(4 * rows + lse + cls, 2 * product), Work(7 * rows + lse + cls, 5 * product)


VARIANTS = (
    Variant("spatial_attention", "", _inputs, ("qkv",), ("qkv",), _work),
    Variant("spatial_attention", "-weighted", _weighted_inputs, ("qkv",), ("qkv",), _work, float32=("frame_weight",)),
)
