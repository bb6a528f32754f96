"""What a GPU alone can show: a second device, addresses beyond 32 bits, the same bits every time, autocast there."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, RUNS, VARIANTS, call, grads
from test_conformance import check, exact_shape, prepared, upstream_like

import bt_kernels
from bt_kernels import VisibleTokens

pytestmark = pytest.mark.gpu
BY_RUN = pytest.mark.parametrize("variant, backend, device", [run for run in RUNS if run.values[2] == "cuda"])


@pytest.mark.parametrize("form", ["heads64", "padded"])
@BY_RUN
def test_on_the_second_device(variant, backend, device, form):
    """While the first one is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    on_device(variant, backend, form, "cuda:1")


def on_device(variant, backend: str, form: str, device: str) -> None:
    visible = FORM[form].build()
    inputs = prepared(variant.draw(visible, 2, 64), torch.bfloat16, device, variant)
    upstream = upstream_like(exact_shape(variant, inputs, visible)).to(torch.bfloat16)
    check(variant, inputs, visible.to(device), backend, upstream)


@BY_RUN
def test_the_same_bits_every_time(variant, backend, device):
    if variant.op in ("alignment_loss", "linear_add", "mlp"):
        pytest.skip("some of its products are cuBLAS's, which promises that under a setting of its own alone")
    torch.use_deterministic_algorithms(True)
    try:
        same_bits(variant, backend, device)
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(variant, backend: str, device: str) -> None:
    visible = VisibleTokens.tube(4, 96, 8, 0.5)
    inputs = prepared(variant.draw(visible, 2, 64), torch.bfloat16, device, variant)
    upstream = upstream_like(exact_shape(variant, inputs, visible)).to(device, torch.bfloat16)
    runs = []
    for _ in range(3):
        out = call(variant, inputs, visible.to(device), backend)
        runs.append([out, *grads(out, inputs, variant.differentiable, upstream).values()])
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_autocast(variant, dtype):
    under_autocast(variant, dtype, "cuda")


def under_autocast(variant, dtype: torch.dtype, device: str) -> None:
    visible = FORM["padded"].build()
    inputs = prepared(variant.draw(visible), torch.float32, device, variant)
    with torch.autocast(device, dtype):
        out = call(variant, inputs, visible.to(device), None)
    is_lower = "attention" in variant.op or variant.name == "mlp-no-stream"
    assert out.dtype == (dtype if is_lower else torch.float32)
    for gradient in grads(out, inputs, variant.differentiable, torch.ones_like(out)).values():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_than_a_million_sequences_beyond_32_bits(backend):
    """11.5 million rows, 2.2 billion elements of qkv: the last sequences are what they are alone."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    last_sequences(backend, "cuda", 1_440_000)


def last_sequences(backend: str, device: str, patches: int) -> None:
    frames, few = 8, 4096
    qkv = torch.randn(1, patches * frames, 3, 1, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    tail = qkv.detach()[:, -few:].clone().requires_grad_()
    visible = VisibleTokens.all(1, patches, frames, device=device)
    alone = VisibleTokens.all(1, few // frames, frames, device=device)
    results = []
    for x, tokens in ((qkv, visible), (tail, alone)):
        out = bt_kernels.temporal_attention(x, tokens, backend=backend)
        out.sum().backward()
        results.append((out[:, -few:], x.grad[:, -few:]))
    torch.testing.assert_close(*results)
