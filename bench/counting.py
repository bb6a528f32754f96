"""Count of a step: bytes kept for backward, operators, waits of the host, launches, products' dtypes, what fits."""

from __future__ import annotations

import gc
from collections import Counter

import torch
from contenders import BASELINES, CONTENDERS, POLICIES, Case, Contender, make_inputs, make_model
from device_work import PRODUCTS, host_waits, memory_of, name_of, operations
from measure import kept_bytes
from torch.utils._python_dispatch import TorchDispatchMode


def saved_bytes(contender: Contender) -> int | None:
    """Unique storages kept for backward, without parameters, inputs and buffers."""
    if contender.case.part == "chat":
        return None
    own = {memory_of(t) for t in contender.model.parameters()}
    if contender.case.part == "branch":  # of the product that stands for a loss
        own.add(memory_of(contender.inputs["cotangent"]))
    return kept_bytes(getattr(contender, contender.case.part), own)


class Operators(TorchDispatchMode):
    """Counts operators that do work, those that the host would wait for on a GPU, and operations of products.

    Attributes:
        operations: floating-point operations of matrix products by the dtype of their left operand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0
        self.operations: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = name_of(func)
        self.waits += host_waits(func, args, kwargs)
        self.count += not func.is_view
        if name in PRODUCTS:
            self.operations[args[PRODUCTS[name]].dtype] += operations(name, args, result)
        return result


# The contrastive losses, and token alignment's sums, are float32 on purpose.
LEAST_SHARE = 0.95


def why_wrong_products(contender: Contender, operators: Operators) -> str | None:
    """Return how the counted matrix products of a contender miss the dtypes that they should have, or None.

    At least :data:`LEAST_SHARE` of their operations must be in ``contender.product_dtypes``.
    """
    total = operators.operations.total()
    share = sum(operators.operations[dtype] for dtype in contender.product_dtypes) / max(total, 1)
    if share >= LEAST_SHARE:
        return None
    seen = ", ".join(f"{dtype} {count / total:.1%}" for dtype, count in operators.operations.most_common())
    return f"its products are not in {' or '.join(map(str, contender.product_dtypes))}: {seen or 'there are none'}"


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
