"""Several processes with a part of the batch each: the losses and gradients of one, under every memory policy."""

from __future__ import annotations

from pathlib import Path

import chat_models
import processes
import pytest
import torch
import torch.distributed as dist
from small_models import PATCHES, make, shake, video
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bt_adapter import BTAdapterVisionModel
from bt_adapter.chat.attach import attach
from bt_adapter.chat.families import family_of
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


def chat_model(name: str):
    chat = chat_models.make_chat(name)
    return attach(chat, chat_models.make_branch(chat, drop_path=0.0)).train()


def chat_loss(chat, core, rank: int) -> torch.Tensor:
    tokens = chat_models.ids(family_of(core).video_length, batch=2)
    pixels = chat_models.videos(2, seed=rank)
    return chat(input_ids=tokens, pixel_values=pixels, labels=tokens.masked_fill(tokens == 60, -100)).loss


def work_chat(rank: int, world: int, folder: str) -> None:
    """A chat model in which layers of the tower or the branch are sharded, each for itself, and then the rest."""
    for name in ("llava", "blip-2"):
        for part in ("tower", "tower layers", "branch", "branch layers", "no split"):
            chat = chat_model(name)
            tower, branch = family_of(chat).vision_tower, getattr(chat, "model", chat).bt_adapter
            language_layers = list(family_of(chat).language_model.modules())
            units = {
                "tower": [tower] if name == "llava" else tower.encoder.layers,
                "tower layers": tower.encoder.layers,
                "branch": [branch],
                "branch layers": [*branch.temporal, *branch.spatial],
                # what accelerate wraps unless told otherwise
                "no split": [m for m in chat.modules() if type(m).__name__ in (chat._no_split_modules or [])],
            }[part]
            units = [*units, *(m for m in language_layers if type(m).__name__.endswith("DecoderLayer"))]
            order = {module: number for number, module in enumerate(chat.modules())}
            for unit in sorted(set(units), key=order.__getitem__, reverse=True):  # from the inside out
                fully_shard(unit)
            fully_shard(chat)
            loss = chat_loss(chat, chat, rank)
            loss.backward()
            gradients = {n: p.grad.full_tensor() for n, p in chat.named_parameters() if p.grad is not None}
            every = torch.stack([loss.detach(), loss.detach()])
            every[1 - rank] = 0
            dist.all_reduce(every)
            if rank == 0:
                torch.save({"losses": every, **gradients}, Path(folder) / f"{name} {part}.pt")


def test_chat_models_with_sharded_layers_take_videos(tmp_path):
    processes.run(tmp_path, 2, work_chat, str(tmp_path))
    for name in ("llava", "blip-2"):
        chat = chat_model(name)
        losses = [chat_loss(chat, chat, rank) for rank in range(2)]
        (sum(losses) / 2).backward()
        expected = {n: p.grad for n, p in chat.named_parameters() if p.grad is not None}
        files = sorted(tmp_path.glob(f"{name} *.pt"))
        assert len(files) == 5
        for file in files:
            found = torch.load(file)
            torch.testing.assert_close(found.pop("losses"), torch.stack(losses), rtol=1e-5, atol=1e-5)
            assert found.keys() == expected.keys(), file
            for key, gradient in found.items():
                torch.testing.assert_close(
                    gradient, expected[key], rtol=1e-3, atol=1e-5, msg=lambda m, f=file, k=key: f"{f} {k}: {m}"
                )


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
