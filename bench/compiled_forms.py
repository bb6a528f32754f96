"""Kernels that Triton compiles while the lengths of videos change, counted without a GPU.

    python bench/compiled_forms.py                the sequences of calls, and the limit of each
    python bench/compiled_forms.py --list         every compiled kernel, too

Launches are recorded on meta tensors. Triton's own code then makes the key under which it would look a kernel up:
types, constants, and which integers are 1 or multiples of 16. A launch whose key is new is compiled, which takes a
second or more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from bt_kernels import VisibleTokens, _triton
from bt_kernels._cases import flat_arguments, passes, variants
from bt_kernels._library import OPS

HEADS, WIDTH, PATCHES = 16, 64, 256  # ViT-L/14
# The ops of a masked training step, with stochastic depth in all layers but the first, and those of a chat.
STEP = ("gather_embed", "gather_merge", "temporal_attention", "spatial_attention", "spatial_attention-weighted",
        "alignment_loss")  # fmt: skip
CHAT = ("gather_embed", "gather_merge", "temporal_attention", "spatial_attention", "pool_video_tokens")
PRODUCTS = ("linear_add", "mlp")


@dataclass(frozen=True)
class Form:
    """What Triton compiles for a launch."""

    name: str
    key: str
    signature: dict
    constants: dict
    attributes: dict


@cache
def _binder(kernel, architecture: int) -> tuple:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # the interpreter's function, made from the same source and options
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    return kernel, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def form(launch: _triton.Launch, architecture: int) -> Form:
    """Return the form of a launch on ``architecture`` (90 for sm_90), as Triton's JIT makes it at the launch."""
    from triton.runtime.jit import compute_cache_key

    kernel, backend, bind = _binder(launch.kernel, architecture)
    given = launch.constants(architecture) | launch.options(architecture)
    bound, specialisation, options = bind(*launch.args, **given)
    key = kernel.__name__ + compute_cache_key({}, specialisation, options)
    _, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialisation, options)
    return Form(kernel.__name__, key, signature, constants, attributes)


def launches(
    name: str,
    visible: VisibleTokens,
    dtype: torch.dtype,
    training: bool = True,
    heads: int = HEADS,
    width: int = WIDTH,
    every_gradient: bool = False,
) -> list[_triton.Launch]:
    """Record an op's launches in a forward and, in training, a backward; none if the kernel cannot run the call.

    Args:
        name: name of a variant of an op (``bt_kernels._cases``).
        visible: the tokens.
        dtype: of all inputs but the weights of frames, which are float32.
        training: also run the backward, with the gradients that training needs.
        heads, width: H and E.
        every_gradient: also run the backward with all gradients.
    """
    variant = next(each for each in variants() if each.name == name)

    def draw(*size):
        return torch.empty(*size, dtype=dtype, device="meta")

    inputs = variant.inputs(visible, heads, width, draw)
    inputs |= {name: inputs[name].float() for name in variant.float32}
    op = OPS[variant.op]
    kernel = next(each for each in op.kernels if each.backend == "triton")
    arguments = flat_arguments(variant, inputs, visible.to("meta"), wanted=training)
    with _triton.recorded() as found:
        if kernel.why_not(*arguments):  # too long a sequence
            return []
        for names in (variant.learning, variant.differentiable)[: 1 + every_gradient]:
            forward, backward = passes(kernel, op, arguments, tuple(name in names for name in op.differentiable))
            forward()
            if training:
                backward()
    return found


def compiled(
    names: Iterable[str], forms: Iterable[VisibleTokens], dtype, training: bool, architecture=90
) -> list[Form]:
    """Return the distinct forms of the ops ``names`` over all ``forms`` of visible tokens."""
    forms = list(forms)
    each = (
        form(launch, architecture)
        for name in names
        for visible in forms
        for launch in launches(name, visible, dtype, training)
    )
    return list({one.key: one for one in each}.values())


def sequences() -> Iterator[tuple[str, int, list[Form]]]:
    """Yield name, limit and compiled forms of each sequence of calls."""
    frames = [VisibleTokens.tube(16, PATCHES, frames, 0.7) for frames in range(4, 17)]
    yield "a training step at T = 4 … 16", 20, compiled(STEP, frames, torch.bfloat16, True)
    ratios = [VisibleTokens.tube(16, PATCHES, 8, ratio / 10) for ratio in range(1, 10)]
    yield "a training step at ratios 0.1 … 0.9", 18, compiled(STEP, ratios, torch.bfloat16, True)
    lengths = [VisibleTokens.all(1, PATCHES, frames) for frames in range(1, 65)]
    yield "a chat at T = 1 … 64", 14, compiled(CHAT, lengths, torch.float16, False)
    yield "products of a step at T = 1 … 64", 4, compiled(PRODUCTS, lengths, torch.bfloat16, True)
    yield "a chat's tuning at T = 1 … 64", 24, compiled(CHAT, lengths, torch.bfloat16, True)


@dataclass(frozen=True)
class Count:
    """The number of kernels compiled in a sequence of calls, and its limit."""

    sequence: str
    kernels: int
    limit: int

    @property
    def broken(self) -> bool:
        """Whether the limit is exceeded."""
        return self.kernels > self.limit


def print_sequences(every: bool = False) -> list[Count]:
    """Print and return the count of each sequence of calls; with ``every`` print its kernels too."""
    counts = []
    for name, limit, found in sequences():
        counts.append(Count(name, len(found), limit))
        print(f"{name:<40}{len(found):>4} kernels compiled, limit {limit}{'   <--' * (len(found) > limit)}", flush=True)
        for one in sorted(found, key=lambda one: one.key) if every else ():
            constants = {name: one.constants.get((place,)) for place, name in enumerate(one.signature)}
            shown = ", ".join(f"{k}={v}" for k, v in constants.items() if one.signature[k] == "constexpr")
            print(f"    {one.name:<20}{shown}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every compiled kernel")
    options = parser.parse_args()
    if _triton.interpreting():
        sys.exit("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    return int(any(count.broken for count in print_sequences(options.list)))


if __name__ == "__main__":
    sys.exit(main())
