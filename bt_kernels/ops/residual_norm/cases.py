"""Test inputs and minimum work of residual_norm."""

from bt_kernels._cases import Shape, Variant, Work

_LEARNING = ("x", "weight", "bias")


def _inputs(visible, heads, width, draw):
    d = heads * width
    return {
        "x": draw(visible.batch, 1 + visible.tokens, d),
        "update": draw(visible.batch, 1 + visible.tokens, d),
        "scale": None,
        "weight": 1 + draw(d) / 4,
        "bias": draw(d),
    }


def _inputs_without_update(visible, heads, width, draw):
    return {**_inputs(visible, heads, width, draw), "update": None}


def _inputs_of_patches(visible, heads, width, draw):
    patches = (visible.batch, visible.tokens)
    update = draw(*patches, heads * width)
    return {**_inputs(visible, heads, width, draw), "update": update, "scale": draw(*patches).abs()}


def _statistics(s: Shape) -> int:
    return 2 * s.batch * (1 + s.tokens) * 4


def _work(s: Shape) -> tuple[Work, Work]:
    """Count the work. The gradient of the update is that of x, which is written once."""
    rows = 4 * s.bytes(1 + s.tokens)  # forward: x, update; sum, normed. Backward: sum and both gradients; that of x.
    return Work(rows + s.table(2) + _statistics(s)), Work(rows + s.table(3) + _statistics(s))


def _work_without_update(s: Shape) -> tuple[Work, Work]:
    rows = s.bytes(1 + s.tokens)
    return Work(2 * rows + s.table(2) + _statistics(s)), Work(3 * rows + s.table(3) + _statistics(s))


def _work_of_patches(s: Shape) -> tuple[Work, Work]:
    """Count the work where stream, scale, weight and bias are in float32, the update and the result in 16 bits."""
    float32 = 4 / s.itemsize
    rows, patches = s.bytes(1 + s.tokens), s.bytes(s.tokens)
    stream, scale = int(float32 * rows), s.batch * s.tokens * 4
    forward = 2 * stream + patches + rows + scale + int(float32 * s.table(2)) + _statistics(s)
    backward = 3 * stream + patches + rows + scale + int(float32 * s.table(3)) + _statistics(s)
    return Work(forward), Work(backward)


VARIANTS = (
    Variant(
        "residual_norm", "", _inputs, ("x", "update", "weight", "bias"), _LEARNING, _work, takes_visible=False,
    ),
    Variant(
        "residual_norm", "-no-update", _inputs_without_update, _LEARNING, _LEARNING, _work_without_update,
        takes_visible=False,
    ),
    Variant(
        "residual_norm", "-patches", _inputs_of_patches, ("x", "update", "weight", "bias"),
        ("x", "update", "weight", "bias"), _work_of_patches, float32=("x", "scale", "weight", "bias"),
        takes_visible=False,
    ),
)  # fmt: skip
