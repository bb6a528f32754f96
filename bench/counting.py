"""What can be counted of a step: bytes kept for backward, operators, what the host waits for, launches, what fits."""

from __future__ import annotations

import gc

import torch
from contenders import BASELINES, CONTENDERS, POLICIES, Case, Contender, make_inputs, make_model
from measure import kept_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def saved_bytes(contender: Contender) -> int | None:
    """Unique storages kept for backward, without parameters, inputs and buffers."""
    if contender.case.part == "chat":
        return None
    own = {t.untyped_storage().data_ptr() for t in contender.model.parameters()}
    if contender.case.part == "branch":  # of the product that stands for a loss
        own.add(contender.inputs["cotangent"].untyped_storage().data_ptr())
    return kept_bytes(getattr(contender, contender.case.part), own)


class Operators(TorchDispatchMode):
    """Counts operators that do work, and those whose result a host waits for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        indices = args[1] if func.overloadpacket.__name__ in ("index", "index_put_", "index_put") else ()
        boolean = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        self.waits += boolean or func.overloadpacket.__name__ in self.WAITING
        self.count += not func.is_view
        return result


def launches(contender: Contender) -> int | None:
    """Kernels a run starts on a GPU."""
    if contender.device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        contender.run()
        torch.cuda.synchronize()
    return sum(1 for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def largest_batch(device: str) -> None:
    """Print the largest batch of a step (T = 8, ratio 0.7) for each contender, by trying."""
    model = make_model("step", device)
    for name in CONTENDERS:
        fits, fails = 0, None
        while fails is None or fails - fits > max(1, fits // 32):
            batch = max(1, 2 * fits) if fails is None else (fits + fails) // 2
            try:
                case = Case("step", 8, 0.7, batch)
                contender = Contender(name, model, case, device, make_inputs(case, device))
                contender.run()
                contender.clear()
                fits = batch
            except torch.OutOfMemoryError:
                fails = batch
            contender = None
            gc.collect()
            torch.cuda.empty_cache()
        print(f"{name}: {fits} clips of 8 frames, ratio 0.7")


def counted_batch(memory: float) -> None:
    """Print the largest batch of the branch (T = 8, ratio 0.7, float32) from the bytes that each contender keeps.

    Counted too: the tower's weights, the branch's, its gradients and Adam's two moments. Not counted: what lives within
    a layer, and the tower's state.
    """
    model = make_model("step", "cpu")
    fixed = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    for name in (*BASELINES, *POLICIES):
        kept = []
        for batch in (1, 2):
            case = Case("branch", 8, 0.7, batch)
            kept.append(saved_bytes(Contender(name, model, case, "cpu", make_inputs(case, "cpu"))) or 0)
        clip = kept[1] - kept[0]
        print(f"{name}: {clip / 1e6:.1f} MB a clip, {int((memory * 2**30 - fixed) // clip)} clips in {memory:g} GiB")
