"""One process of perhaps many: which it is, on which device, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from bt_adapter.errors import CommandError
from bt_adapter.locked import lock


class Processes:
    """Which of how many processes this is, by torchrun's environment variables, and its device.

    Args:
        device: "cpu", "cuda", "cuda:1"; "auto" takes GPUs where there are any, one a process.
        patience: how long one process waits for the others, where the group is begun here.

    Raises:
        CommandError: no such device, or no GPU that this torch can use.
    """

    def __init__(self, device: str = "auto", patience: timedelta = timedelta(minutes=30)) -> None:
        self.device = _device(device)
        self._held: IO[str] | None = None
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        self.began = "RANK" in os.environ and not dist.is_initialized()
        if self.began:
            dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=patience)
        many = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        self.group = dist.group.WORLD if many else None

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def hold(self, folder: Path) -> None:
        """Keep other runs out of a folder, which is made, until :meth:`leave`. Every process calls it.

        Raises:
            CommandError: another run has it, or it cannot be made.
        """

        def take() -> None:
            self._held = lock(folder)

        self.check_in_first(take)

    def check_in_first(self, check: Callable[[], object]) -> None:
        """Call ``check`` in the first process; the CommandError that it raises is raised in every one."""
        problem = None
        if self.first:
            try:
                check()
            except CommandError as error:
                problem = str(error)
        self.agree(problem)

    def agree(self, problem: str | None) -> None:
        """Wait for all processes, and raise CommandError in every one where one of them has a problem."""
        for found in self.gather(problem):
            if found is not None:
                raise CommandError(found)

    def leave(self) -> None:
        """End the group, where it was begun here, and let go of the folder."""
        if self._held is not None:
            self._held.close()
        if self.began:
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def _device(name: str) -> torch.device:
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: not a device") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CommandError(f"--device {name}: no GPU that this torch can use")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
