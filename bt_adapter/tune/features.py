"""Tower features of videos, stored on disk: the input of the tower layer beside which the branch begins.

One file per video, ``<name>-<hash>.safetensors``: ``features [T, 1+P, D]`` in float16, or in float8 (e4m3) with a
``scale [T, 1+P, 1]`` for each token. ``features.json`` records tower, number of frames and image size.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from bt_adapter.data import VideoError, normalise
from bt_adapter.data.loading import in_order
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.files import digest, remove_unfinished, write_json, writing
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.training.loop import Stopped
from bt_adapter.training.processes import Processes
from bt_kernels import quantize_rows

SECONDS = 10.0  # between lines of progress
ABOUT = "features.json"


class FeatureStore:
    """The features of one tower at one number of frames.

    Args:
        folder: created when the first features are written.
        root: folder of the videos; a video is identified by its path relative to it.
        model: tower and branch.
        frames: T. mean, std: normalisation of the frames. dtype: "float16" or "float8".

    Raises:
        CommandError: the folder holds features of another tower, number of frames, size or dtype; the message lists
            what differs.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        model: BTAdapterVisionModel,
        frames: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: str = "float16",
    ) -> None:
        self.folder, self.root, self.dtype = folder, root, dtype
        self.unusable: dict[str, str] = {}  # videos without features, and why
        config = model.vision_config
        self.shape = (frames, 1 + config.patches, config.hidden_size)
        self.about: dict[str, Any] = {
            "format": 1, "frames": frames, "image_size": config.image_size, "layer": model.first_branch_layer,
            "dtype": dtype, "mean": list(mean), "std": list(std), "tower": model.tower.fingerprint(),
        }  # fmt: skip
        if (
            model.images.resize is not None or model.images.resample != "bicubic"
        ):  # else as stored before there were any
            self.about["images"] = model.images.to_dict()
        self._check()

    def _check(self) -> None:
        file = self.folder / ABOUT
        if not file.exists():
            return
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"--features {file} is damaged: {error}") from error
        wrong = [
            f"{name} {stored.get(name)} against {value}"
            for name, value in self.about.items()
            if not _same(stored.get(name), value)
        ]
        if wrong:
            raise CommandError(
                f"--features {self.folder} holds other features than this run needs: {'; '.join(wrong)}. Give another "
                "folder, or delete it"
            )

    @property
    def bytes_each(self) -> int:
        """Bytes of one video's features."""
        frames, tokens, width = self.shape
        return frames * tokens * (width * 2 if self.dtype == "float16" else width + 4)

    def path(self, video: str) -> Path:
        """The file of a video's features."""
        name = os.path.relpath(video, self.root)
        return self.folder / f"{Path(name).stem[:80]}-{digest([name.encode()], 16)}.safetensors"

    def has(self, video: str) -> bool:
        """Whether features of the video are stored; a file of another size counts as another video."""
        try:
            with safe_open(self.path(video), "pt") as file:
                return (file.metadata() or {}).get("bytes") == str(os.path.getsize(video))
        except (OSError, SafetensorError):
            return False

    def write(self, video: str, features: Tensor) -> None:
        """Store ``[T, 1+P, D]`` by renaming a complete file. Raises VideoError for values beyond the dtype."""
        if not (self.folder / ABOUT).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / ABOUT, self.about)
        if self.dtype == "float16":
            tensors = {"features": features.to(torch.float16)}
            if not tensors["features"].isfinite().all():
                raise VideoError(f"{video}: its features leave the range of float16; use --feature-dtype float8")
        else:
            values, scale = quantize_rows(features.flatten(0, 1))
            if not scale.isfinite().all():
                raise VideoError(f"{video}: its features are not finite")
            tensors = {"features": values.view(features.shape), "scale": scale.view(*features.shape[:2], 1)}
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with writing(self.path(video)) as temporary:
            save_file(kept, temporary, metadata={"bytes": str(os.path.getsize(video))})

    def read(self, video: str) -> Tensor:
        """Read ``[T, 1+P, D]`` in float16, or of float8 in bfloat16, whose range holds float8 times its scales.

        Raises VideoError where no features are stored, with the reason where it is known.
        """
        if video in self.unusable:
            raise VideoError(self.unusable[video])
        try:
            with safe_open(self.path(video), "pt") as file:
                features = file.get_tensor("features")
                if self.dtype == "float8":
                    features = features.float().mul_(file.get_tensor("scale")).bfloat16()
        except (OSError, SafetensorError) as error:
            raise VideoError(f"{video}: has no stored features ({error})") from error
        return features


def _same(stored: Any, wanted: Any) -> bool:
    """Whether values are equal, numbers up to the rounding of half precision."""
    if isinstance(wanted, dict):
        return isinstance(stored, dict) and all(_same(stored.get(name), value) for name, value in wanted.items())
    if isinstance(wanted, float):
        return isinstance(stored, int | float) and abs(stored - wanted) <= 1e-2 * abs(wanted)
    return stored == wanted


class _Frames(Dataset):
    """Frames of videos by number, or the reason why they cannot be read."""

    def __init__(self, videos: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self.videos, self.read = videos, read

    def __getitem__(self, number: int) -> tuple[Tensor | None, str]:
        try:
            return self.read(self.videos[number]), ""
        except VideoError as error:
            return None, str(error)


def store_features(
    store: FeatureStore,
    videos: Sequence[str],
    read: Callable[[str], Tensor],
    model: BTAdapterVisionModel,
    processes: Processes,
    workers: int,
    say: Callable[[str], None],
    asked: Callable[[], bool] = lambda: False,
) -> Skipped:
    """Write missing features, after a line with their size. Processes share the work.

    Args:
        videos: paths. read: returns the frames of a path, uint8 ``[T, 3, S, S]``. say: prints a line of progress.
        asked: whether to stop, asked between two videos.

    Returns:
        The videos that could not be read or stored.

    Raises:
        CommandError: the features do not fit onto the disk.
        Stopped: one of the processes was asked to stop.
    """
    remove_unfinished(store.folder)
    # One list for all: a late process would find fewer files missing, and some videos would belong to no process. One
    # free space, so that either all processes continue or none.
    lacking = [video for video in dict.fromkeys(videos) if not store.has(video)]
    missing, free = processes.gather((lacking, _free(store.folder)))[0]
    wanted = store.bytes_each * len(missing)
    say(
        f"features of {len(set(videos))} videos, {store.bytes_each * len(set(videos)) / 1e9:.3g} GB in {store.dtype} "
        f"({'x'.join(map(str, store.shape))} each); {len(missing)} are to be written, {wanted / 1e9:.3g} GB of the "
        f"{free / 1e9:.3g} GB free in {store.folder}"
    )
    if wanted > free:
        raise CommandError(
            f"--features {store.folder}: {wanted / 1e9:.3g} GB do not fit into the {free / 1e9:.3g} GB free there; "
            "fewer --frames or --feature-dtype float8 take less, and without --features nothing is stored"
        )
    mine = missing[processes.rank :: processes.world]
    skipped, last_line, stop = Skipped(), time.monotonic(), False
    for number, (frames, reason) in enumerate(in_order(_Frames(mine, read), 0, len(mine), workers)):
        if stop := asked():
            break
        if frames is None:
            skipped.add(mine[number], reason)
        else:
            pixels = normalise(frames.to(processes.device), store.about["mean"], store.about["std"], model.tower.dtype)
            try:
                store.write(mine[number], model.tower.run(pixels, model.first_branch_layer))
            except VideoError as error:
                skipped.add(mine[number], str(error))
        if time.monotonic() - last_line > SECONDS:
            last_line = time.monotonic()
            say(f"features: {number + 1} of {len(mine)} videos")
    everything = Skipped()
    gathered = processes.gather((skipped.state_dict(), stop))  # also waits for the other processes
    if any(stop for _, stop in gathered):
        raise Stopped("stopped while features were stored; the same command resumes from there")
    for part, _ in gathered:
        everything.load_state_dict(part)
    store.unusable = everything.reasons
    return everything


def _free(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
