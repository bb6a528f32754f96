"""Write a chat model with its branch as one folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bt_adapter.chat.native.saving import save_video_model
from bt_adapter.model.time_steps import Long


def save_chat(chat: Any, folder: Path, frames: int, long: Long, replace: bool = False) -> None:
    """Write model, branch and processor.

    Args:
        chat: a `VideoChat`, with merged adapters, if any.
        folder, replace: see `save_video_model`, whose errors are raised.
        frames: default number of frames that the processor takes from a video file.
        long: value of the configuration's ``long_videos``.
    """
    chat.processor.video_frames = frames
    chat.model.config.long_videos = long
    save_video_model(chat.model, chat.processor, folder, replace)
