"""Choosing a backend: per call, per block, by environment; what cannot run says why, and nothing falls back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from op_cases import FORM, VARIANT, VARIANTS, call

import bt_kernels
from bt_kernels import BackendUnavailable
from bt_kernels._dispatch import BACKENDS, Kernel, choose
from bt_kernels._library import OPS


def run_merge(backend: str | None = None) -> torch.Tensor:
    visible = FORM["tube70"].build()
    return bt_kernels.gather_merge(**VARIANT["gather_merge"].draw(visible), visible=visible, backend=backend)


def runs() -> bool:
    """Whether an op on the host runs under the backend now in force; "cuda" cannot."""
    try:
        run_merge()
    except BackendUnavailable:
        return False
    return True


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("BT_KERNELS_BACKEND", raising=False)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_a_forced_backend_runs_or_lists_every_reason(variant, backend):
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter runs Triton kernels on the host")
    visible = FORM["padded"].build()
    inputs = variant.draw(visible)
    written = {kernel.backend for kernel in OPS[variant.op].kernels}
    try:
        out = variant.run(inputs, visible, backend)
    except BackendUnavailable as error:
        message = str(error)
    else:
        assert backend == "cpu" and "cpu" in written  # CUDA and Triton cannot run on host tensors
        torch.testing.assert_close(out, call(variant, inputs, visible, "reference"), rtol=0, atol=1e-12)
        return
    assert variant.op in message and repr(backend) in message
    for name in BACKENDS:
        assert f"{name}: " in message
    if backend not in written:
        assert f"{backend}: not written for this op" in message
    assert "reference: could run" in message


def test_reasons_are_not_empty():
    with pytest.raises(BackendUnavailable) as error:
        run_merge("cuda")
    listed = str(error.value).split("(", 1)[1].rstrip(")")
    reasons = dict(part.split(": ", 1) for part in listed.split("; ") if part.split(":")[0] in BACKENDS)
    assert set(reasons) == set(BACKENDS) and all(reasons.values())
    assert "cpu" in reasons["cuda"]  # where the tensors are, or that the build is for the CPU


def test_an_unavailable_backend_never_falls_back_in_backward():
    visible = FORM["tube70"].build()
    inputs = VARIANT["temporal_attention"].draw(visible)
    out = bt_kernels.temporal_attention(inputs["qkv"].requires_grad_(), visible)
    with bt_kernels.backend("cuda"), pytest.raises(BackendUnavailable):
        out.sum().backward()


@pytest.mark.parametrize("name", ["", "CPU", "reference ", "metal", 3])
def test_unknown_backend_in_a_call(name):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        run_merge(name)
    if isinstance(name, str):
        message = str(error.value)
        assert repr(name) in message and all(known in message for known in BACKENDS)


@pytest.mark.parametrize("name", ["CPU", "metal", 3])
def test_unknown_backend_in_a_block(name):
    with pytest.raises(ValueError) as error, bt_kernels.backend(name):
        pass
    assert repr(name) in str(error.value) and all(known in str(error.value) for known in BACKENDS)
    assert runs()  # nothing stays behind


def test_a_block_forces_its_backend():
    assert runs()
    with bt_kernels.backend("cuda"):
        assert not runs()
    assert runs()
    with bt_kernels.backend("reference"):
        forced = run_merge()
    torch.testing.assert_close(forced, run_merge("reference"), rtol=0, atol=0)


def test_a_kernel_that_is_not_the_default_is_not_asked_whether_it_can_run():
    """Asking loads a library of several megabytes."""
    asked = []

    def kernel(backend, default=None):
        return Kernel(backend, print, print, lambda *args: asked.append(backend), lambda *args: default)

    kernels = (kernel("cuda", "never measured"), kernel("cpu"), kernel("reference"))
    assert choose("op", kernels, None, ()).backend == "cpu"
    assert asked == ["cpu"]
    assert choose("op", kernels, "cuda", ()).backend == "cuda"


def test_the_innermost_block_wins():
    with bt_kernels.backend("cuda"):
        with bt_kernels.backend("reference"):
            assert runs()
            with bt_kernels.backend("cuda"):
                assert not runs()
            assert runs()
        assert not runs()
        with bt_kernels.backend(None):  # the automatic choice again
            assert runs()
        assert not runs()
    assert runs()


def test_the_call_goes_before_the_block():
    with bt_kernels.backend("cuda"):
        run_merge("reference")
    with bt_kernels.backend("reference"), pytest.raises(BackendUnavailable):
        run_merge("cuda")


def test_a_block_holds_for_the_backward_of_what_ran_inside(monkeypatch):
    ran = []
    for kernel in OPS["gather_merge"].kernels:

        def backward(*args, kernel=kernel, original=kernel.backward):
            ran.append(kernel.backend)
            return original(*args)

        monkeypatch.setitem(kernel.__dict__, "backward", backward)
    visible = bt_kernels.VisibleTokens.all(1, 2, 2)
    branch = torch.randn(1, 5, 4, requires_grad=True)
    with bt_kernels.backend("reference"):
        out = bt_kernels.gather_merge(torch.randn(1, 2, 3, 4), branch, None, visible)
    out.sum().backward()
    assert ran == ["reference"]


def test_an_error_leaves_the_block():
    with pytest.raises(KeyError), bt_kernels.backend("cuda"):
        raise KeyError("inside")
    assert runs()


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("BT_KERNELS_BACKEND", "cuda")
    assert not runs()
    run_merge("reference")
    with bt_kernels.backend("reference"):
        assert runs()
    assert not runs()
    monkeypatch.setenv("BT_KERNELS_BACKEND", "reference")
    assert runs()
    monkeypatch.setenv("BT_KERNELS_BACKEND", "")
    assert runs()
    monkeypatch.setenv("BT_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        run_merge()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_report_prints_every_op_and_backend_with_its_reason():
    done = python("-m", "bt_kernels")
    assert done.returncode == 0, done.stderr
    assert torch.__version__.split("+")[0] in done.stdout
    for op in OPS.values():
        section = done.stdout.split(f"\n{op.name} ", 1)[1].split("\n\n")[0]
        lines = {line.split()[0]: line.split(None, 1)[1] for line in section.splitlines()[1:] if line.startswith("  ")}
        assert set(BACKENDS) <= set(lines), f"{op.name} lists {sorted(lines)}"
        assert lines["reference"].startswith("runs")
        written = {kernel.backend for kernel in op.kernels}
        for backend in BACKENDS:
            assert lines[backend].startswith("runs") or lines[backend].startswith("no: ")
            assert len(lines[backend].removeprefix("no: ")) > 3
            if backend not in written:
                assert lines[backend] == "no: not written for this op"
            if backend == "cuda" and not torch.cuda.is_available():
                assert lines[backend].startswith("no: ")


def test_the_report_tells_of_a_forced_backend():
    done = python("-m", "bt_kernels", BT_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "reference" in next(line for line in done.stdout.splitlines() if line.startswith("forced backend"))


def test_the_ops_import_without_the_adapter_or_triton():
    """bt_kernels knows nothing of CLIP: importing it loads neither the model layer nor optional packages."""
    code = (
        "import sys, bt_kernels; "
        "print([m for m in ('bt_adapter', 'triton', 'transformers', 'xformers', 'flash_attn') if m in sys.modules])"
    )
    bare = python("-c", "import sys, torch; print('triton' in sys.modules)")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    allowed = "['triton']" if bare.stdout.strip() == "True" else "[]"
    assert done.stdout.strip() == allowed
