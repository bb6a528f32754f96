"""Test inputs and minimum work of bias_gelu, on the hidden rows of an MLP: F = 4·D."""

from bt_kernels._cases import Shape, Variant, Work

_EXPANSION = 4


def _inputs(visible, heads, width, draw):
    hidden = _EXPANSION * heads * width
    return {"x": draw(visible.batch, 1 + visible.tokens, hidden), "bias": draw(hidden)}


def _inputs_without_bias(visible, heads, width, draw):
    return {**_inputs(visible, heads, width, draw), "bias": None}


def _work(s: Shape) -> tuple[Work, Work]:
    rows, bias = _EXPANSION * s.bytes(1 + s.tokens), _EXPANSION * s.table(1)
    return Work(2 * rows + bias), Work(3 * rows + 2 * bias)


def _work_without_bias(s: Shape) -> tuple[Work, Work]:
    rows = _EXPANSION * s.bytes(1 + s.tokens)
    return Work(2 * rows), Work(3 * rows)


def _variant(suffix: str, act: str) -> Variant:
    return Variant(
        "bias_gelu", suffix, _inputs, ("x", "bias"), ("x", "bias"), _work, options={"act": act}, takes_visible=False
    )


VARIANTS = (
    _variant("", "quick_gelu"),
    _variant("-erf", "gelu"),
    _variant("-tanh", "gelu_pytorch_tanh"),
    Variant(
        "bias_gelu", "-no-bias", _inputs_without_bias, ("x",), ("x",), _work_without_bias,
        options={"act": "quick_gelu"}, takes_visible=False,
    ),
)  # fmt: skip
