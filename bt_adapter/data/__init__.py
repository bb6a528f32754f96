"""Reads video and picture files, samples frames and normalises them for a CLIP tower."""

from .images import read_image
from .sampling import sample_indices
from .transforms import CLIP_MEAN, CLIP_STD, TrainTransform, normalise, preprocess
from .video import Video, VideoError, read_video, write_video

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
