"""Two processes with a half of the batch each: the gradients of one with both halves, under every memory policy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import PATCHES, make, shake, video
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bt_adapter import BTAdapterVisionModel
from bt_kernels import VisibleTokens


def make_model(recompute: str) -> BTAdapterVisionModel:
    return shake(make(depth=3, recompute=recompute)).double()


def half_step(model, core, half: int) -> None:
    """Backward of one half's losses; ``core`` is what ``model`` wraps."""
    part = slice(2 * half, 2 * half + 2)
    visible = VisibleTokens.tube(4, PATCHES, 4, 0.5, generator=torch.Generator().manual_seed(0))
    visible = VisibleTokens(visible.index[part], PATCHES, 4, visible.slots)
    text = torch.randn(4, 24, generator=torch.Generator().manual_seed(3)).double()
    output = model(video(4, batch=4)[part].double(), visible)
    sum(core.pretraining_losses(output, text[part]).values()).backward()


def gradients(model: BTAdapterVisionModel) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.branch.named_parameters()
    }


def work(rank: int, way: str, recompute: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = make_model(recompute)
    if way == "ddp":
        half_step(DistributedDataParallel(model), model, rank)
    else:
        fully_shard(model, ignored_params=set(model.tower.parameters()))
        assert model.branch.time.to_local().numel() < model.branch.time.numel()
        half_step(model, model, rank)
    found = gradients(model)
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_get_the_gradients_of_one(way, recompute, tmp_path):
    mp.spawn(work, (way, recompute, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    model = make_model(recompute)
    for half in range(2):
        half_step(model, model, half)
    for name, parameter in model.branch.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad / 2, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
