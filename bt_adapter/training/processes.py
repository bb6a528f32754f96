"""The processes of a distributed run: rank, world size, device, and exchange of Python objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from bt_adapter.errors import CommandError
from bt_adapter.files import lock_folder


class Processes:
    """The rank, world size and device of this process, from torchrun's environment variables.

    Args:
        device: "cpu", "cuda", "cuda:1"; "auto" uses GPUs if there are any, one per process.
        patience: timeout of collective operations, if the process group is started here.

    Raises:
        CommandError: no such device, or torch finds no usable GPU.
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
        """Whether this is the first process, which writes the files."""
        return self.rank == 0

    def hold(self, folder: Path) -> None:
        """Create a folder and lock it against other runs until :meth:`leave`. Every process must call it.

        Raises:
            CommandError: another run has locked it, or it cannot be created.
        """

        def take() -> None:
            self._held = lock_folder(folder)

        self.check_in_first(take)

    def check_in_first(self, check: Callable[[], object]) -> None:
        """Call ``check`` in the first process; a CommandError of it is raised in every process."""
        problem = None
        if self.first:
            try:
                check()
            except CommandError as error:
                problem = str(error)
        self.agree(problem)

    def agree(self, problem: str | None) -> None:
        """Wait for all processes; raise CommandError in every process if one of them reports a problem."""
        for message in self.gather(problem):
            if message is not None:
                raise CommandError(message)

    def leave(self) -> None:
        """Release the folder's lock, and end the process group if it was started here."""
        if self._held is not None:
            self._held.close()
        if self.began:
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """Collect the value of every process, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def _device(name: str) -> torch.device:
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: not a device; use auto, cpu or cuda") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CommandError(f"--device {name}: torch finds no usable GPU; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
