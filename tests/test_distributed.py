"""Several processes with a part of the batch each: the losses and gradients of one, under every memory policy."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from small_models import PATCHES, make, shake, video
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bt_adapter import BTAdapterVisionModel
from bt_kernels import VisibleTokens

pytestmark = pytest.mark.usefixtures("gloo")


def make_model(recompute: str) -> BTAdapterVisionModel:
    return shake(make(depth=3, recompute=recompute)).double()


def step(model, core, part: slice, group=None) -> torch.Tensor:
    """Losses of a part of a batch of four, and their backward; ``core`` is what ``model`` wraps."""
    visible = VisibleTokens.tube(4, PATCHES, 4, 0.5, generator=torch.Generator().manual_seed(0))
    visible = VisibleTokens(visible.index[part], PATCHES, 4, visible.slots)
    text = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).double()
    output = model(video(4, batch=4)[part].double(), visible)
    losses = core.pretraining_losses(output, text[part], group=group)
    sum(losses.values()).backward()
    return torch.stack([loss.detach() for loss in losses.values()])


def work(rank: int, world: int, way: str, whole: bool, recompute: str, folder: str) -> None:
    model = make_model(recompute)
    wrapped = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        fully_shard(model, ignored_params=set(model.tower.parameters()))
        assert model.branch.time.to_local().numel() < model.branch.time.numel()
    size = 4 // world
    losses = step(wrapped, model, slice(rank * size, rank * size + size), dist.group.WORLD if whole else None)
    dist.all_reduce(losses)
    gradients = {
        name: p.grad.full_tensor() if way == "fsdp2" else p.grad for name, p in model.branch.named_parameters()
    }
    if rank == 0:
        torch.save({"losses": losses / world, **gradients}, Path(folder) / "found.pt")


def check(folder: Path, expected: torch.Tensor, model: BTAdapterVisionModel, parts: int) -> None:
    found = torch.load(folder / "found.pt")
    torch.testing.assert_close(found["losses"], expected, rtol=1e-9, atol=1e-12)
    for name, parameter in model.branch.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad / parts, rtol=1e-9, atol=1e-12, msg=lambda message, n=name: f"{n}: {message}"
        )


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_with_a_half_each(way, recompute, tmp_path):
    processes.run(tmp_path, 2, work, way, False, recompute, str(tmp_path))
    model = make_model(recompute)
    losses = [step(model, model, slice(2 * half, 2 * half + 2)) for half in range(2)]
    check(tmp_path, sum(losses) / 2, model, 2)


@pytest.mark.parametrize(("way", "world"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2)])
def test_contrastive_losses_over_the_batches_of_all_processes(way, world, tmp_path):
    processes.run(tmp_path, world, work, way, True, "mlp", str(tmp_path))
    model = make_model("mlp")
    check(tmp_path, step(model, model, slice(0, 4)), model, 1)
