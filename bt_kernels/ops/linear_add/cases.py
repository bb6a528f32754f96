"""Test inputs and minimum work of linear_add, on the rows behind an attention."""

from bt_kernels._cases import Shape, Variant, Work

_ALL = ("x", "weight", "bias", "stream")
_WITH_OFFSET = (*_ALL, "offset")


def _inputs(visible, heads, width, draw):
    d = heads * width
    rows = (visible.batch, 1 + visible.tokens, d)
    return {
        "x": draw(*rows),
        "weight": draw(d, d) / d**0.5,
        "bias": draw(d),
        "stream": draw(*rows),
        "scale": None,
        "offset": None,
    }


def _inputs_of_patches(visible, heads, width, draw):
    d = heads * width
    patches = (visible.batch, visible.tokens)
    return {
        **_inputs(visible, heads, width, draw),
        "x": draw(*patches, d),
        "scale": draw(*patches).abs(),
        "offset": draw(d),
    }


def _flops(s: Shape, rows: int) -> int:
    return 2 * s.batch * rows * s.dim**2


def _work(s: Shape) -> tuple[Work, Work]:
    """Count the work. Backward: x, the gradient; the gradients of x and of the weights. That of the stream is given."""
    rows, weights = s.bytes(1 + s.tokens), s.table(s.dim) + s.table(1)
    flops = _flops(s, 1 + s.tokens)
    return Work(3 * rows + weights, flops), Work(3 * rows + 2 * weights, 2 * flops)


def _work_of_patches(s: Shape) -> tuple[Work, Work]:
    """Count the work where stream and scale are in float32 and the product in 16 bits."""
    stream, patches = int(4 / s.itemsize * s.bytes(1 + s.tokens)), s.bytes(s.tokens)
    weights, scale, flops = s.table(s.dim) + s.table(2), s.batch * s.tokens * 4, _flops(s, s.tokens)
    return (
        Work(2 * stream + patches + weights + scale, flops),
        Work(stream + 2 * patches + 2 * weights + scale, 2 * flops),
    )


VARIANTS = (
    Variant("linear_add", "", _inputs, _ALL, _ALL, _work, takes_visible=False),
    Variant(
        "linear_add", "-patches", _inputs_of_patches, _WITH_OFFSET, _WITH_OFFSET, _work_of_patches,
        float32=("stream", "scale"), takes_visible=False,
    ),
)  # fmt: skip
