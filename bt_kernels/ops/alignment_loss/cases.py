"""Test inputs and minimum work of alignment_loss."""

from bt_kernels._cases import INDEX_BYTES, Shape, Variant, Work

_HEAD = ("branch", "head_weight", "head_bias", "head_norm_weight", "head_norm_bias")
_SMALL_SHARED = 6


def _inputs(visible, heads, width, draw, biased=False):
    d = heads * width
    shared = _SMALL_SHARED if d < 512 else 768
    return {
        "branch": draw(visible.batch, 1 + visible.tokens, d),
        "target": draw(visible.batch, visible.frames, 1 + visible.patches, d),
        "head_weight": draw(shared, d) / d**0.5,
        "head_bias": draw(shared),
        "head_norm_weight": 1 + draw(shared) / 4,
        "head_norm_bias": draw(shared),
        "target_norm_weight": 1 + draw(d) / 4,
        "target_norm_bias": draw(d),
        "target_projection": draw(shared, d) / d**0.5,
        "target_projection_bias": draw(shared) if biased else None,
    }


def _biased_inputs(visible, heads, width, draw):
    return _inputs(visible, heads, width, draw, biased=True)


def _work(s: Shape) -> tuple[Work, Work]:
    """Count the work. The forward computes the gradients, with all products; the backward only scales them."""
    product = 2 * s.batch * s.tokens * s.dim * s.shared
    rows, weight = s.bytes(s.tokens), s.shared * s.dim * s.itemsize
    index = s.batch * s.tokens * INDEX_BYTES
    return Work(2 * rows + 2 * weight + index + rows + weight, 4 * product), Work(2 * (rows + weight))


VARIANTS = (
    Variant("alignment_loss", "", _inputs, _HEAD, _HEAD, _work),
    Variant("alignment_loss", "-biased", _biased_inputs, _HEAD, _HEAD, _work),
)
