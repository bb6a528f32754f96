"""Report for bug reports: which libraries are built and which backends can run each op (``python -m bt_kernels``).

``--check`` also runs every op on every available backend and compares values and gradients with the reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

import bt_kernels  # noqa: F401  registers the ops
from bt_kernels import _native
from bt_kernels._dispatch import BACKENDS, forced_backend
from bt_kernels._library import OPS
from bt_kernels._self_check import check

_PACKAGES = ("bt-adapter", "torch", "triton", "xformers", "flash-attn", "transformers", "av")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    """Print the report. Return 1 if ``--check`` was given and found wrong numbers or nothing to check, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bt_kernels",
        description="Report which compiled libraries are loaded and which backends can run each op, with the reasons.",
    )
    parser.add_argument(
        "--check", action="store_true", help="also compare every available backend with the reference (default: off)"
    )
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _report(device)
    return _check(device) if options.check else 0


def _report(device: str) -> None:
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    print(f"GPU: {torch.cuda.get_device_name() if device == 'cuda' else 'none found by torch'}")
    for name, why_not in (("C++ for CPU", _native.why_not_cpu()), ("C++ for CUDA", _native.why_not_cuda())):
        print(f"{name}: {'loaded' if why_not is None else 'not loaded: ' + why_not}")
    for key, value in (_native.build_info() or {}).items():
        print(f"  {key}: {value}")
    print(f"forced backend: {forced_backend(None) or 'none'}")
    probe = torch.empty(0, device=device)
    for op in OPS.values():
        print(f"\n{op.name}  (tensors on {device})")
        kernels = {kernel.backend: kernel for kernel in op.kernels}
        for backend in BACKENDS:
            kernel = kernels.get(backend)
            if kernel is None:
                state = "no: not written for this op"
            elif (reason := kernel.why_not(probe)) is not None:
                state = f"no: {reason}"
            else:
                default = kernel.why_not_default(probe)
                state = "runs" if default is None else f"runs when requested by name: {default}"
            print(f"  {backend:<10} {state}")


def _check(device: str) -> int:
    print("\nlargest relative error of float32 values and gradients, compared with the reference in float64")
    results = list(check(device))
    for result in results:
        if result.why_not is None:
            print(f"  {result.name:<28} {result.backend:<8} {result.error:.1e}{'  WRONG' if result.wrong else ''}")
    ran, wrong = [r for r in results if r.why_not is None], [r for r in results if r.wrong]
    print(f"{len(ran)} checks, {len(wrong)} wrong" + ("" if ran else ": no compiled backend runs here"))
    return int(bool(wrong) or not ran)


if __name__ == "__main__":
    sys.exit(main())
