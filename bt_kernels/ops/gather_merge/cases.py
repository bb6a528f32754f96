"""Test inputs and minimum work of gather_merge."""

from bt_kernels._cases import INDEX_BYTES, Shape, Variant, Work


def _inputs(visible, heads, width, draw, gated=True):
    d = heads * width
    return {
        "backbone": draw(visible.batch, visible.frames, 1 + visible.patches, d),
        "branch": draw(visible.batch, 1 + visible.tokens, d),
        "gate": draw(d).sigmoid() if gated else None,
    }


def _sum_inputs(visible, heads, width, draw):
    return _inputs(visible, heads, width, draw, gated=False)


def _work(s: Shape) -> tuple[Work, Work]:
    index = s.batch * s.tokens * INDEX_BYTES
    rows, tower = s.bytes(1 + s.tokens), s.bytes(s.tokens + s.frames)
    forward = tower + 2 * rows + s.table(1) + index
    backward = 2 * rows + tower + rows + s.table(2) + index  # gradient, branch and tower in; branch and gate out
    return Work(forward), Work(backward)


def _sum_work(s: Shape) -> tuple[Work, Work]:
    forward, _ = _work(s)
    return Work(forward.bytes - s.table(1)), Work(2 * s.bytes(1 + s.tokens))


VARIANTS = (
    Variant("gather_merge", "", _inputs, ("backbone", "branch", "gate"), ("branch", "gate"), _work),
    Variant("gather_merge", "-sum", _sum_inputs, ("backbone", "branch"), ("branch",), _sum_work),
)
