"""Reads video and picture files, samples frames and normalises them for a CLIP tower."""

from bt_adapter.data.images import read_image
from bt_adapter.data.sampling import sample_indices
from bt_adapter.data.transforms import CLIP_MEAN, CLIP_STD, TrainTransform, normalise, preprocess
from bt_adapter.data.video import Video, VideoError, read_video, write_video

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "TrainTransform",
    "Video",
    "VideoError",
    "normalise",
    "preprocess",
    "read_image",
    "read_video",
    "sample_indices",
    "write_video",
]
