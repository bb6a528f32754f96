"""What is built, what runs where, and why not: ``python -m bt_kernels``. Made to be pasted into a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import bt_kernels  # noqa: F401  registers the ops
from bt_kernels import _native
from bt_kernels._dispatch import BACKENDS, forced_backend
from bt_kernels._library import OPS

_PACKAGES = ("bt-adapter", "torch", "triton", "xformers", "flash-attn", "transformers", "av")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Print the report."""
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
                state = "runs" if default is None else f"runs when asked for by name: {default}"
            print(f"  {backend:<10} {state}")


if __name__ == "__main__":
    main()
