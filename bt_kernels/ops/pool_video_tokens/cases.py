"""Test inputs and minimum work of pool_video_tokens."""

from bt_kernels._cases import Shape, Variant, Work


def _inputs(visible, heads, width, draw):
    d = heads * width
    return {
        "backbone": draw(visible.batch, visible.frames, 1 + visible.patches, d),
        "branch": draw(visible.batch, 1 + visible.tokens, d),
    }


def _work(s: Shape) -> tuple[Work, Work]:
    out, branch = s.bytes(1 + s.patches), s.bytes(1 + s.tokens)
    forward = s.bytes(s.frames * (1 + s.patches)) + branch + out
    return Work(forward), Work(s.bytes(1 + s.groups) + branch)


VARIANTS = (Variant("pool_video_tokens", "", _inputs, ("backbone", "branch"), ("branch",), _work),)
