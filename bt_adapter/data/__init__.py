"""Reads video and picture files, samples frames and normalises them for a CLIP tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bt_adapter import import_on_access

if TYPE_CHECKING:
    from bt_adapter.data.images import read_image as read_image
    from bt_adapter.data.sampling import sample_indices as sample_indices
    from bt_adapter.data.transforms import CLIP_MEAN as CLIP_MEAN
    from bt_adapter.data.transforms import CLIP_STD as CLIP_STD
    from bt_adapter.data.transforms import TrainTransform as TrainTransform
    from bt_adapter.data.transforms import normalise as normalise
    from bt_adapter.data.transforms import preprocess as preprocess
    from bt_adapter.data.video import Video as Video
    from bt_adapter.data.video import VideoError as VideoError
    from bt_adapter.data.video import read_video as read_video
    from bt_adapter.data.video import write_video as write_video

# Imported on first access: the model needs the image settings of this folder, but neither a video decoder nor Pillow.
_PLACES = {
    "CLIP_MEAN": "transforms",
    "CLIP_STD": "transforms",
    "TrainTransform": "transforms",
    "Video": "video",
    "VideoError": "video",
    "normalise": "transforms",
    "preprocess": "transforms",
    "read_image": "images",
    "read_video": "video",
    "sample_indices": "sampling",
    "write_video": "video",
}

__all__ = list(_PLACES)

__getattr__ = import_on_access(__name__, _PLACES)
