"""Test inputs and minimum work of gather_embed."""

from bt_kernels._cases import INDEX_BYTES, Shape, Variant, Work


def _inputs(visible, heads, width, draw):
    d = heads * width
    return {
        "backbone": draw(visible.batch, visible.frames, 1 + visible.patches, d),
        "cls_token": draw(d),
        "pos": draw(1 + visible.patches, d),
        "time": draw(visible.frames + 2, d),
    }


def _work(s: Shape) -> tuple[Work, Work]:
    index = s.batch * s.tokens * INDEX_BYTES
    tables = s.table(1 + 1 + min(s.patches, s.batch * s.groups) + s.frames)
    forward = s.bytes(s.tokens + s.frames) + tables + s.bytes(1 + s.tokens) + index
    backward = s.bytes(1 + s.tokens) + s.table(1 + s.frames) + index  # of CLS and time only
    return Work(forward), Work(backward)


VARIANTS = (
    Variant("gather_embed", "", _inputs, ("backbone", "cls_token", "pos", "time"), ("cls_token", "time"), _work),
)
