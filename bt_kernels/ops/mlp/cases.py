"""Test inputs and minimum work of mlp, with hidden rows of F = 4·D."""

from bt_kernels._cases import Shape, Variant, Work

_EXPANSION = 4
_WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def _inputs(visible, heads, width, draw):
    d, hidden = heads * width, _EXPANSION * heads * width
    rows = (visible.batch, 1 + visible.tokens, d)
    return {
        "x": draw(*rows),
        "fc1_weight": draw(hidden, d) / d**0.5,
        "fc1_bias": draw(hidden),
        "fc2_weight": draw(d, hidden) / hidden**0.5,
        "fc2_bias": draw(d),
        "stream": draw(*rows),
        "scale": None,
    }


def _inputs_of_rows(visible, heads, width, draw):
    return {**_inputs(visible, heads, width, draw), "fc1_bias": None, "fc2_bias": None, "stream": None}


def _inputs_with_scale(visible, heads, width, draw):
    inputs = _inputs(visible, heads, width, draw)
    return {**inputs, "x": inputs["x"][:, 1:], "scale": draw(visible.batch, visible.tokens).abs()}


def _work(rows: int, hidden: int, stream: int, s: Shape) -> tuple[Work, Work]:
    """Count the work from the bytes of rows, of hidden rows and of the stream (0: none).

    Between products the hidden rows are written and read: the activated ones and, for backward, the argument of the
    activation; backward reads that, and writes and reads the activation and the gradient of its argument.
    """
    weights = 2 * s.table(_EXPANSION * s.dim) + s.table(1 + _EXPANSION)
    flops = 4 * (rows // s.itemsize) * _EXPANSION * s.dim
    forward = rows + 3 * hidden + (2 * stream or rows) + weights
    return Work(forward, flops), Work(3 * rows + 5 * hidden + 2 * weights, 2 * flops)


def _work_with_stream(s: Shape) -> tuple[Work, Work]:
    rows = s.bytes(1 + s.tokens)
    return _work(rows, _EXPANSION * rows, rows, s)


def _work_of_rows(s: Shape) -> tuple[Work, Work]:
    rows = s.bytes(1 + s.tokens)
    return _work(rows, _EXPANSION * rows, 0, s)


def _work_with_scale(s: Shape) -> tuple[Work, Work]:
    """Count the work where stream and scale are in float32 and the products in 16 bits."""
    rows, scale = s.bytes(s.tokens), s.batch * s.tokens * 4
    forward, backward = _work(rows, _EXPANSION * rows, int(4 / s.itemsize * s.bytes(1 + s.tokens)), s)
    return Work(forward.bytes + scale, forward.flops), Work(backward.bytes + scale, backward.flops)


VARIANTS = (
    Variant(
        "mlp", "", _inputs, ("x", *_WEIGHTS, "stream"), ("x", *_WEIGHTS, "stream"), _work_with_stream,
        options={"act": "quick_gelu"}, takes_visible=False,
    ),
    Variant(
        "mlp", "-no-stream", _inputs_of_rows, ("x", "fc1_weight", "fc2_weight"), ("x", "fc1_weight", "fc2_weight"),
        _work_of_rows, options={"act": "gelu"}, takes_visible=False,
    ),
    Variant(
        "mlp", "-scale", _inputs_with_scale, ("x", *_WEIGHTS, "stream"), ("x", *_WEIGHTS, "stream"), _work_with_scale,
        options={"act": "gelu_pytorch_tanh"}, float32=("stream", "scale"), takes_visible=False,
    ),
)  # fmt: skip
