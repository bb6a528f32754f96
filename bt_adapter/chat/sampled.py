"""Read the frame sampling of a model's or branch's training, the default of the commands that ask about videos.

``tuned.json`` of a tuned folder and ``pretrained.json`` of a pretrained branch store it under "sampling"; a video chat
model's processor stores the number of frames, its configuration the treatment of long videos. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bt_adapter.chat.model_folders import TUNED, is_native, mini_stage
from bt_adapter.chat.settings import ChatModel
from bt_adapter.errors import CommandError
from bt_adapter.mini import weights_folder
from bt_adapter.towers.hugging_face import read_json

PRETRAINED = "pretrained.json"
DEFAULTS: dict[str, Any] = {"frames": 8, "repeat": False, "windows": None, "long": "average", "branch": True}


def settle_sampling(command: ChatModel) -> tuple[dict[str, Any], list[str]]:
    """Resolve the frames, repeat, windows, long and branch of a command: given, else from training, else the default.

    The windows of training apply only with the frames of training. A model tuned without the branch is used without it
    unless --branch names one.

    Returns:
        The values by name, and notes on values that were taken from training or differ from it.

    Raises:
        CommandError: ``--repeat`` and ``--no-repeat`` are both given.
    """
    if command.repeat and command.no_repeat:
        raise CommandError("--repeat and --no-repeat were both given: give one of them")
    given: dict[str, Any] = {"frames": command.frames, "windows": command.windows, "long": command.long}
    given["repeat"] = True if command.repeat else False if command.no_repeat else None
    given["branch"] = False if command.no_branch else True if command.branch is not None else None
    trained, source = read_sampling(command.model, command.branch)
    if command.fps is not None or (given["frames"] is not None and given["frames"] != trained.get("frames")):
        trained = {name: value for name, value in trained.items() if name != "windows"}
    values = DEFAULTS | trained | {name: value for name, value in given.items() if value is not None}
    notes = []
    taken = [f"{name} {trained[name]}" for name in trained if given[name] is None and trained[name] != DEFAULTS[name]]
    if command.fps is not None:
        taken = [text for text in taken if not text.startswith("frames ")]
        if "frames" in trained:
            notes.append(f"--fps {command.fps:g} is another choice than the {trained['frames']} frames of {source}")
    if taken:
        notes.append(f"videos are sampled as {source} was trained: {', '.join(taken)}")
    notes += [
        f"--{name} {value} is another choice than {source} was trained with: {trained[name]}"
        for name, value in given.items()
        if name != "branch" and value is not None and name in trained and trained[name] != value
    ]
    return values, notes


def read_sampling(model: str, branch: str | None) -> tuple[dict[str, Any], str]:
    """Read the sampling of training from a tuned folder, a video chat model, or a pretrained branch.

    Returns:
        The values by name, and the folder that stores them.
    """
    if branch is None and is_native(model):
        frames = read_json(Path(model) / "processor_config.json").get("video_frames")
        config = read_json(Path(model) / "config.json")
        found = {"frames": frames, "repeat": True}
        found |= {"long": config.get("long_videos"), "branch": config.get("use_branch")}
        return {name: value for name, value in found.items() if value is not None}, model
    stage = mini_stage(model)
    tuned = model if stage is None else weights_folder(stage)
    for name, folder, file in ((model, tuned, TUNED), (branch, branch, PRETRAINED)):
        path = Path(folder or "") / file
        if name is None or not path.is_file():
            continue
        about = read_json(path)
        try:
            found = about.get("sampling") or {"frames": about["recipe"]["frames"], "repeat": True}
            return {key: found[key] for key in DEFAULTS if key in found}, str(name)
        except (KeyError, TypeError):
            continue  # loading the folder reports the error
    return {}, ""
