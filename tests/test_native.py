"""The compiled gather_merge against plain torch in float64, and the CUDA library as far as a machine without a GPU can
take it: compiled, linked, free of spills, loaded.

Legend: B videos, T frames, P patches, D width, N visible rows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import resources
import torch

from bt_kernels import __main__ as report
from bt_kernels import _native, _self_check
from bt_kernels._cases import variants
from bt_kernels._library import OPS

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

built = pytest.mark.skipif(_native.why_not_cpu() is not None, reason=f"no native part: {_native.why_not_cpu()}")
devices = [
    pytest.param("cpu", marks=built),
    pytest.param("cuda", marks=[built, pytest.mark.gpu]),
]


def plain_merge(backbone, branch, gate, index, frame_counts=None):
    """The formula of the merge, token by token of the definition, differentiable."""
    batch, frames = backbone.shape[:2]
    real = (
        torch.ones(batch, frames, dtype=torch.bool)
        if frame_counts is None
        else (torch.arange(frames) < frame_counts[:, None])
    )
    weight = real.to(backbone.dtype) / real.sum(1, keepdim=True).clamp(min=1)
    cls = torch.einsum("bt,btd->bd", weight, backbone[:, :, 0])
    by_place = backbone[:, :, 1:].transpose(1, 2).flatten(1, 2)  # [B, P*T, D], place = p*T + t
    m = torch.cat([cls[:, None], by_place.take_along_dim(index.clamp(min=0)[..., None], 1)], 1)
    out = branch + m if gate is None else (1 - gate) * branch + gate * m
    kept = torch.cat([torch.ones(batch, 1, dtype=torch.bool), index >= 0], 1)
    return torch.where(kept[..., None], out, 0.0)


def make_inputs(dtype, batch=2, frames=3, patches=5, width=40, tokens=7, padding=2, gate=True):
    """Random inputs, exact in ``dtype``; each video's last ``padding`` rows are padding."""
    draw = torch.Generator().manual_seed(batch + 10 * frames + 100 * width)

    def random(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    places = [torch.randperm(patches * frames, generator=draw)[:tokens].sort().values for _ in range(batch)]
    index = torch.stack(places) if batch else torch.zeros(0, tokens, dtype=torch.int64)
    index[:, tokens - padding :] = -1
    weight = torch.rand(width, generator=draw, dtype=torch.float64).to(dtype) if gate else None
    return random(batch, frames, 1 + patches, width), random(batch, 1 + tokens, width), weight, index


def run_both(inputs, frame_counts=None, device="cpu", needs=(True, True, True)):
    """(native results, float64 results): out, grad_backbone, grad_branch, grad_gate; None where not asked for."""
    backbone, branch, gate, index = inputs
    grad = torch.randn(branch.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(branch.dtype)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in (backbone, branch, gate)]
    want = plain_merge(*exact, index, frame_counts)
    want.backward(grad.double())

    ops = _native.cuda_ops() if device == "cuda" else _native.cpu_ops()
    there = [None if x is None else x.to(device) for x in (*inputs, frame_counts)]
    out = ops.gather_merge(*there)
    needs = (needs[0], needs[1], needs[2] and gate is not None)
    grads = ops.gather_merge_backward(grad.to(device), *there, *needs)
    got = [out, *(g if need else None for g, need in zip(grads, needs, strict=True))]
    return got, [want, *(None if x is None else x.grad for x in exact)]


def assert_close(got, want, dtype, terms=1):
    """Within rounding: a value is rounded once to its dtype (half a unit, eps / 2), and sums of ``terms`` products in
    float32 (float64 for float64) add at most eps_sum a term; 8 covers the few operations of the formula."""
    eps = torch.finfo(dtype).eps
    eps_sum = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=eps, atol=8 * eps_sum * scale * terms)


def check(got, want, dtype):
    assert got[0].dtype == dtype
    for name, value, exact in zip(("out", "grad_backbone", "grad_branch", "grad_gate"), got, want, strict=True):
        if value is not None:
            assert value.shape == exact.shape, name
            assert_close(value, exact, dtype, terms=64 if name == "grad_gate" else 1)


@pytest.mark.parametrize("device", devices)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "sum"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(frames=1, tokens=3, padding=0),
        dict(batch=1, tokens=1, padding=0),
        dict(tokens=4, padding=4),
        dict(width=13),
        dict(width=200, frames=5, patches=40, tokens=150, padding=3),
        dict(tokens=0, padding=0),
        dict(batch=0),
    ],
    ids=lambda shape: "-".join(f"{key}{value}" for key, value in shape.items()) or "default",
)
def test_matches_plain_torch(shape, gate, dtype, device):
    inputs = make_inputs(dtype, gate=gate, **shape)
    check(*run_both(inputs, device=device), dtype)


@pytest.mark.parametrize("device", devices)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cls_mean_counts_real_frames_only(dtype, device):
    inputs = make_inputs(dtype, batch=3, frames=4)
    inputs[0][0, 2:, 0] = float("nan")  # padding frames are never read
    inputs[0][1, 1:, 0] = float("inf")
    counts = torch.tensor([2, 1, 4])
    got, _ = run_both(inputs, counts, device)
    cleaned = (torch.nan_to_num(inputs[0], posinf=0.0), *inputs[1:])
    _, want = run_both(cleaned, counts, device)
    check(got, want, dtype)


@pytest.mark.parametrize("device", devices)
def test_strided_inputs(device):
    backbone, branch, gate, index = make_inputs(torch.float32)
    wide = torch.stack([backbone, backbone + 1], 2)[:, :, 0]  # frames apart by two frames' size
    by_frame = backbone.transpose(0, 1).contiguous().transpose(0, 1)
    last = torch.stack([backbone, backbone + 1], -1)[..., 0]  # elements not adjacent
    rows = torch.stack([branch, branch + 1], 1)[:, 0]
    columns = index.t().contiguous().t()
    for view in (wide, by_frame, last):
        assert not view.is_contiguous()
        check(*run_both((view, rows, torch.stack([gate, gate], 1)[:, 0], columns), device=device), torch.float32)


@pytest.mark.parametrize("device", devices)
def test_offset_rows_not_on_16_bytes(device):
    backbone, branch, gate, index = make_inputs(torch.bfloat16, width=48)
    shifted = torch.cat([backbone[..., :1], backbone], -1)[..., 1:]
    check(*run_both((shifted, branch, gate, index), device=device), torch.bfloat16)


@pytest.mark.parametrize("device", devices)
def test_expanded_gradient(device):
    inputs = make_inputs(torch.float32)
    ops = _native.cuda_ops() if device == "cuda" else _native.cpu_ops()
    there = [x.to(device) for x in inputs]
    one = torch.ones(1, 1, 1, device=device).expand(inputs[1].shape)
    got = ops.gather_merge_backward(one, *there, None, True, True, True)
    want = ops.gather_merge_backward(one.contiguous(), *there, None, True, True, True)
    for value, exact in zip(got, want, strict=True):
        assert torch.equal(value, exact)


@pytest.mark.parametrize("device", devices)
@pytest.mark.parametrize(
    "needs", [(False, True, True), (False, True, False), (False, False, True), (True, False, False)]
)
def test_only_what_is_asked_for(needs, device):
    inputs = make_inputs(torch.float32)
    check(*run_both(inputs, device=device, needs=needs), torch.float32)
    backbone, branch, gate, index = (x.to(device) for x in inputs)
    ops = _native.cuda_ops() if device == "cuda" else _native.cpu_ops()
    grads = ops.gather_merge_backward(branch, backbone, branch, gate, index, None, *needs)
    assert [g.numel() > 0 for g in grads] == list(needs)


@pytest.mark.parametrize("device", devices)
def test_gate_gradient_is_the_same_whatever_the_threads(device):
    inputs = [x.to(device) for x in make_inputs(torch.float32, patches=200, tokens=500, width=96)]
    ops = _native.cuda_ops() if device == "cuda" else _native.cpu_ops()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.gather_merge_backward(inputs[1], *inputs, None, False, False, True)[2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@built
def test_float16_conversions_are_exact():
    """Every float16 goes in and out unchanged, and sums round as torch's do: subnormals, overflow, not-a-number."""
    every = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    other = every[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    none = torch.zeros(1, 0, dtype=torch.int64)
    for branch in (torch.zeros_like(every), other):
        got = _native.cpu_ops().gather_merge(every[None, None, None], branch[None, None], None, none, None).flatten()
        torch.testing.assert_close(got, every + branch, rtol=0, atol=0, equal_nan=True)


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backbone=torch.zeros(3, 6, 40)), "backbone has 3 dimensions, expected 4"),
        (dict(branch=torch.zeros(2, 7, 40)), r"branch has shape \[2, 7, 40\], expected \[2, 8, 40\]"),
        (dict(branch=torch.zeros(2, 8, 40, dtype=torch.float64)), "branch has dtype Double"),
        (dict(gate=torch.zeros(39)), r"gate must have shape \[40\]"),
        (dict(gate=torch.zeros(40, dtype=torch.bfloat16)), "gate has dtype BFloat16"),
        (dict(index=torch.zeros(2, 7, dtype=torch.int32)), "index has dtype Int, expected int64"),
        (dict(index=torch.zeros(3, 7, dtype=torch.int64)), "index has batch 3, expected 2"),
        (dict(index=torch.full((2, 7), 15)), "index holds 15, expected -1 or a value below P[*]T = 15"),
        (dict(index=torch.full((2, 7), -2)), "index holds -2"),
        (dict(frame_counts=torch.tensor([3, 4])), "frame_counts holds 4, expected 0 to T = 3"),
        (dict(frame_counts=torch.tensor([3])), r"frame_counts must have shape \[2\]"),
        (dict(backbone=torch.zeros(2, 3, 6, 40, dtype=torch.int32), branch=torch.zeros(2, 8, 40, dtype=torch.int32),
              gate=None), "expected float32, float64, bfloat16 or float16, got Int"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    names = ("backbone", "branch", "gate", "index", "frame_counts")
    arguments = dict(zip(names, (*make_inputs(torch.float32), None), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        _native.cpu_ops().gather_merge(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        grad = torch.zeros_like(arguments["branch"])
        _native.cpu_ops().gather_merge_backward(grad, *arguments.values(), True, True, True)


@built
def test_bad_gradient_is_named():
    with pytest.raises(RuntimeError, match=r"grad must have shape \[2, 8, 40\]"):
        _native.cpu_ops().gather_merge_backward(
            torch.zeros(2, 8, 39), *make_inputs(torch.float32), None, True, True, True
        )


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def test_switched_off_says_so():
    code = "from bt_kernels import _native as n; print(n.cpu_ops(), n.why_not_cpu(), n.cuda_ops(), n.build_info())"
    out = run_python(code, BT_NATIVE="0")
    assert out.split("\n")[0] == "None switched off by BT_NATIVE=0 in the environment None {}"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_reason_without_cuda_is_kept():
    assert _native.cuda_ops() is None
    assert re.search("not built|without CUDA|could not be loaded|switched off", _native.why_not_cuda())


def test_another_cuda_than_torchs_is_a_reason():
    assert _native._why_other_cuda("NVIDIA 13.0.88", "13.2") is None
    assert _native._why_other_cuda("", "13.0") is None
    reason = _native._why_other_cuda("NVIDIA 13.0.88", "12.8")
    assert reason.startswith("built with CUDA 13.0.88, but torch") and "CUDA 12.8" in reason


@built
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_the_reason_names_another_cuda_before_a_missing_device(monkeypatch):
    monkeypatch.setattr(_native, "_load_cuda", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "9.2")
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_compiler": "NVIDIA 13.0.88"})
    assert "but torch" in _native.why_not_cuda() and "CUDA 9.2" in _native.why_not_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert _native.why_not_cuda() == "torch sees no CUDA device"


@built
def test_a_library_that_does_not_load_is_reported(tmp_path, monkeypatch):
    (tmp_path / _native._CUDA_LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    _native._load_cuda.cache_clear()
    try:
        assert "libbt_kernels_cuda.so could not be loaded under torch" in _native.why_not_cuda()
    finally:
        _native._load_cuda.cache_clear()


@built
def test_build_facts():
    facts = _native.build_info()
    assert facts["torch"] and facts["compiler"] and "-O3" in facts["flags"]
    assert bool(facts["cuda_archs"]) != bool(facts["why_no_cuda"])
    if "BT_NATIVE_ARCH" not in os.environ:
        assert "-march" not in facts["flags"], "a wheel must run on other processors than the builder's"


@built
def test_check_command_compares_every_op(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # its interpreter would take most of the time
    assert report.main(["--check"]) == 0
    printed = capsys.readouterr().out
    for variant in variants():
        if all(kernel.backend != "cpu" for kernel in OPS[variant.op].kernels):
            continue
        assert re.search(rf"^  {re.escape(variant.name)} +cpu +\d\.\de-\d\d$", printed, re.M), variant.name
    assert re.search(r"^\d+ checks, 0 wrong$", printed, re.M)


@built
@pytest.mark.parametrize("shift", [1e-2, float("nan")])
def test_check_command_finds_wrong_numbers(capsys, monkeypatch, shift):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    right = _self_check._values_and_gradients

    def shifted(variant, inputs, visible, backend, *rest):
        values = right(variant, inputs, visible, backend, *rest)
        return [values[0], *(value + shift for value in values[1:])] if backend == "cpu" else values

    monkeypatch.setattr(_self_check, "_values_and_gradients", shifted)
    assert report.main(["--check"]) == 1
    assert "cpu" in capsys.readouterr().out.split("WRONG")[0]


def test_check_command_fails_where_nothing_can_be_checked(capsys, monkeypatch):
    monkeypatch.setattr(report, "check", lambda device: iter([]))
    assert report.main(["--check"]) == 1
    assert "no compiled backend runs here" in capsys.readouterr().out


def library_symbols(path):
    """Names that a library asks of others, as the dynamic linker sees them."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) was not found")
@pytest.mark.parametrize("name", [_native._CPU_LIBRARY, _native._CUDA_LIBRARY])
def test_libraries_ask_nothing_of_python_or_of_torchs_own_cxx(name):
    """One wheel serves every Python and every later torch: no symbol of CPython, pybind11, at:: or c10::."""
    path = ROOT / "bt_kernels" / name
    if not path.exists():
        pytest.skip(f"{name}: {_native.why_not_cuda()}")
    asked = library_symbols(path)
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in asked), "nm lists what it asks of libtorch"
    wrong = re.compile(r"_?Py[A-Z_]|pybind|_ZNK?(2at|3c10)")
    assert not [symbol for symbol in asked if wrong.match(symbol)]
    # Paths of the sources are relative; those of torch's headers may lie in a .venv below.
    assert f"{ROOT}/csrc".encode() not in path.read_bytes(), "it names the folder it was built in"


@pytest.fixture(scope="module")
def internals():
    """C++ functions inside the kernels, by pybind11."""
    return pytest.importorskip(
        "bt_kernels._internals", reason="bt_kernels._internals is built by an editable install where pybind11 is"
    )


def test_every_half_is_read_exactly(internals):
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(internals.half_to_float(bits), bits.view(np.float16).astype(np.float32))


def test_floats_are_rounded_to_half_as_numpy_does(internals):
    """At every value of float16, half-way between neighbours, and one float32 to either side of both."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    top = np.float32(65520)  # rounds up to infinity
    places = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2, [top, np.float32(np.inf)]]).astype(np.float32)
    values = np.concatenate([places, np.nextafter(places, np.float32(0)), np.nextafter(places, np.float32(np.inf))])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(internals.float_to_half(values), expected.view(np.uint16))
    assert np.isnan(internals.float_to_half(np.float32([np.nan])).view(np.float16)).all()


@built
def compiled_library(folder: Path) -> Path:
    """The CUDA library for every default target, compiled now: minutes."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent))
    if NVCC is None or cmake is None:
        pytest.skip("no nvcc, or no cmake beside Python")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (
        [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DBT_CUDA=1"],
        [cmake, "--build", folder, "--target", "bt_kernels_cuda"],
    ):
        done = subprocess.run(command, env=os.environ | {"PATH": path, "CUDACXX": NVCC}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / _native._CUDA_LIBRARY


def kernels_in(library: Path) -> list[tuple[str, str, int, int]]:
    """Of each kernel for each target in a library: name, target, registers, bytes of stack and local memory."""
    tool = shutil.which("cuobjdump") or (resources.tool("cuobjdump") if find_spec("triton") else None)
    if tool is None:
        pytest.skip("no cuobjdump, of CUDA or of Triton")
    listed = subprocess.run([tool, "-res-usage", str(library)], capture_output=True, text=True, check=True).stdout
    found, target, name = [], "", ""
    for line in listed.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found.append((name, target, int(match[1]), int(match[2]) + int(match[3])))
    return found


@pytest.mark.slow
def test_a_build_for_another_cuda_than_torchs_is_refused(tmp_path):
    """A package with the files of torch that CMake reads stands for a torch of an older CUDA."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if NVCC is None or cmake is None:
        pytest.skip("no nvcc or no cmake")
    (tmp_path / "torch" / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (tmp_path / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
    (tmp_path / "torch" / "__init__.py").touch()
    version = "__version__ = '2.11.0+cu92'\ncuda: Optional[str] = '9.2'\n"
    (tmp_path / "torch" / "version.py").write_text(version)
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}", "-DBT_CUDA=1"],
        env=os.environ | {"CUDACXX": NVCC, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(r"nvcc is of CUDA \d+\.[\d.]+, but torch 2\.11\.0\+cu92 of CUDA\s+9\.2", done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("library", ["installed", pytest.param("compiled", marks=pytest.mark.full)])
def test_cuda_library_is_free_of_spills_and_loads(library, tmp_path):
    """For every target: the same kernel may fit one and spill on another."""
    path = compiled_library(tmp_path) if library == "compiled" else ROOT / "bt_kernels" / _native._CUDA_LIBRARY
    if not path.exists():
        pytest.skip(f"{path.name}: {_native.why_not_cuda()}")
    kernels = kernels_in(path)
    targets = [target for _, target, _, _ in kernels]
    wanted = "80 90 100" if library == "compiled" else _native.build_info()["cuda_archs"]
    assert {f"sm_{number}" for number in re.findall(r"\d+[a-z]?", wanted)} == set(targets)
    assert len({targets.count(target) for target in targets}) == 1, "every target has the same kernels"
    names = " ".join(name for name, _, _, _ in kernels)
    for kernel in ("merge_forward", "embed_forward", "pool_forward", "temporal_forward", "temporal_backward"):
        assert kernel in names
    for name, target, registers, spilled in kernels:
        # Of the 65,536 registers of a multiprocessor: three blocks of 256 threads, or of attention's 128.
        limit = 168 if "temporal_" in name else 80
        assert registers <= limit, f"{name} takes {registers} registers on {target}"
        assert not spilled, f"{name} keeps {spilled} bytes in local memory on {target}"
    loaded = run_python(
        "import torch\n"
        "from bt_kernels import _native\n"
        "assert _native.why_not_cpu() is None\n"
        f"torch.ops.load_library({str(path)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "ops = ('gather_embed', 'gather_merge', 'pool_video_tokens', 'temporal_attention')\n"
        "print(*(has(f'bt_kernels_native::{op}{end}', 'CUDA') for op in ops for end in ('', '_backward')))"
    )
    assert loaded.split() == ["True"] * 8
