"""Reads frames from video files and writes them, with PyAV."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError

from bt_adapter.data._decode import Taken, take_by_seeking, take_in_sequence
from bt_adapter.data._index import scan
from bt_adapter.data._source import PathLike, Source, VideoError, reason
from bt_adapter.data._times import read_span
from bt_adapter.data.sampling import check_count, check_positive, check_sampling, sample_indices
from bt_adapter.data.transforms import check_frames
from bt_adapter.files import writing
from bt_adapter.progress import Progress

__all__ = ["Video", "VideoError", "read_video", "write_video"]

_METHODS = ("auto", "sequential", "seek")
# Extra frames decoded after a range if the packets do not give an exact order: more than any decoder's delay.
_MARGIN = 32


@dataclass(frozen=True)
class Video:
    """Frames read from a video.

    Attributes:
        frames: uint8 `[T, 3, H, W]`, RGB, upright (rotated and mirrored as the file states), channels last in memory.
            Pixels are as stored: frames with a sample aspect ratio other than 1 (DVDs) are not stretched, as in
            decord and FFmpeg, the usual readers of CLIP's video data.
        timestamps: float64 `[T]`, ascending: when each frame is shown, in seconds from the start of the file (where
            its earliest stream starts), also at a variable frame rate. If the file's clock restarts, as in joined
            recordings, times continue; missing and repeated times are spread evenly between their neighbours.
        duration: seconds from the start of the first frame in the file to the end of the last.
        fps: average frames per second.
        indices: int64 `[T]`, index of each frame among all frames of the file in presentation order, from 0.
        path: the file's name ("<bytes>" or "<file>" for nameless sources).
        total: number of frames sampled from: all of the file, or those between `start` and `end`.
        truncated: part of the file is missing or damaged (also if its first pictures refer to missing ones); all
            values above describe the readable part.
    """

    frames: torch.Tensor
    timestamps: torch.Tensor
    duration: float
    fps: float
    indices: torch.Tensor
    path: str
    total: int
    truncated: bool = False


def read_video(
    path: PathLike,
    frames: int | None = 8,
    sampling: str = "middle",
    generator: torch.Generator | None = None,
    start: float | None = None,
    end: float | None = None,
    progress: Progress | None = None,
    repeat: bool = False,
    method: str = "auto",
    threads: int | None = None,
    side: int | None = None,
    max_pixels: int | None = None,
) -> Video:
    """Read `frames` frames of a video file, chosen by `sample_indices`.

    Sampling is over frames in presentation order, not over seconds: this is the published rule. The two differ only
    at a variable frame rate, where `timestamps` give the times. Only the requested frames are held in memory. If there
    are several video streams, a moving one is preferred, then the default one, then the largest.

    Args:
        path: a local file, its bytes, or a binary file object (read from its current position).
        frames: number of frames T; None for all.
        sampling: "middle", "random" or "reference", see `sample_indices`.
        generator: random generator for "random"; torch's global one if None.
        start, end: read only frames shown at `start <= t < end`, in seconds from the start of the file.
        progress: called with (steps done, steps in total) while decoding; restarts for a second pass, which is
            needed if the packets do not give the number of frames.
        repeat: if the video has fewer than `frames` frames, repeat frames, ascending and evenly spread, instead of
            raising.
        method: "sequential" decodes from the first frame; "seek" seeks the keyframe before each requested frame
            if container and codec allow it (MP4, MOV, Matroska, WebM; H.264, H.265, VP9, AV1); "auto" takes the
            cheaper one. The frames are the same; only sequential decoding is sure to find damage.
        threads: decoder threads; None: one per core. If many processes decode, one thread each is faster.
        side: the side in pixels that the frames will be resized or cropped to. Much larger frames (a short side of more
            than 6 times `side`) are scaled down to 4 times `side` while they are decoded, to save memory.
        max_pixels: limit on the pixels of a frame; None: the environment variable BT_ADAPTER_MAX_PIXELS, or 2**26
            (twice 8K) if it is not set.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown `sampling` or `method`.
        VideoError: the file is missing, empty, unreadable, unsupported or not a regular file; it has no video, or no
            frame (between `start` and `end`); its frames exceed `max_pixels` or the available memory; `frames` is
            below 1; the range is empty; or there are too few frames without `repeat`.
    """
    for label, value in (("threads", threads), ("side", side), ("max_pixels", max_pixels)):
        if value is not None:
            check_count(label, value)
    source = Source.of(path, threads or 0, max_pixels)
    if frames is not None:
        check_count(f"{source.name}: frames", frames, VideoError)
    check_sampling(sampling)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    span = read_span(source.name, start, end)
    generator = generator if generator is not None else torch.default_generator
    state = generator.get_state()

    def choose(total: int) -> list[int]:
        # Same state each time: if a pass corrects the count, the draws are as if it had been known from the start.
        generator.set_state(state)
        if frames is None:
            return list(range(total))
        return sample_indices(total, frames, sampling, generator).tolist()

    def require(total: int) -> None:
        if total == 0:
            where = "" if start is None and end is None else f" between start={start} and end={end} seconds"
            raise VideoError(f"{source.name}: no frame can be decoded{where}")
        if not repeat and frames is not None and total < frames:
            raise VideoError(
                f"{source.name}: {frames} frames were requested, but there are only {total}; request fewer, or pass "
                "repeat=True to repeat frames"
            )

    index = scan(source)
    order: Sequence[int | None] = index.order
    times = index.times(order)
    settled, damaged = False, index.truncated
    source = replace(source, frame_threads=not damaged)
    while True:
        # The first pass follows the packets; its frames are kept if decoding confirms them. Otherwise a second pass
        # follows the decoded order.
        first = bisect.bisect_left(times, span[0])
        total = bisect.bisect_left(times, span[1]) - first
        if settled or index.exact:
            require(total)
        chosen = choose(max(total, 1))
        wanted = [first + number for number in sorted(set(chosen))]
        if index.exact and not settled and method != "sequential":
            taken = Taken(source.name, len(wanted), side)
            if take_by_seeking(source, index, wanted, taken, progress, force=method == "seek"):
                break
        taken = Taken(source.name, len(wanted), side)
        last = math.inf
        if settled or span[1] < math.inf:
            last = first + total - 1 + (0 if settled or index.exact else _MARGIN)
        take_in_sequence(source, index, wanted, taken, last, progress)
        damaged |= taken.damaged
        if settled:
            break
        found, whole = index.times(taken.order), len(taken.order) <= last
        if taken.damaged and source.frame_threads:
            source, whole = replace(source, frame_threads=False), False
        elif found == times if whole else found[: first + total + 1] == times[: first + total + 1]:
            break
        if not whole:
            taken = Taken(source.name, 0)
            take_in_sequence(source, index, (), taken, math.inf)
        order, settled = taken.order, True
        times = index.times(order)
    require(total)
    if len(taken.numbers) < len(wanted):
        raise VideoError(f"{source.name}: is damaged and decodes to different frames each time")

    places = torch.searchsorted(torch.tensor(wanted), torch.tensor(chosen) + first)
    pixels = torch.from_numpy(taken.pixels)  # [U, H, W, 3], each frame once
    pixels = pixels if len(wanted) == len(chosen) else pixels[places]
    return Video(
        frames=pixels.permute(0, 3, 1, 2),
        timestamps=torch.tensor([times[number] for number in wanted], dtype=torch.float64)[places],
        duration=index.duration(order, times),
        fps=index.fps,
        indices=torch.tensor(wanted)[places],
        path=source.name,
        total=total,
        truncated=damaged or (index.exact and len(order) < len(index.order)),
    )


def write_video(
    path: str | os.PathLike,
    frames: torch.Tensor,
    fps: float = 8.0,
    codec: str | None = None,
    options: Mapping[str, str] | None = None,
) -> None:
    """Write frames as a yuv420p video file: VP9 (libvpx-vp9) if the name ends in ".webm", else H.264 (libx264).

    An odd height or width is padded with a copy of its last row or column, since yuv420p needs even sides.

    Args:
        path: file to write; its suffix selects the container. It is created or replaced only when complete.
        frames: uint8 `[T, 3, H, W]`, RGB, T at least 1.
        fps: frames per second, above 0.
        codec: name of another encoder.
        options: encoder options, replacing constant quality ({"crf": "18"}).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank or channel count of `frames`, or `fps` not above 0.
        VideoError: the folder is missing, or FFmpeg does not support this container, codec or size.
    """
    check_frames(frames)
    check_positive("fps", fps)
    path = Path(path)
    webm = path.suffix.lower() == ".webm"
    codec = codec or ("libvpx-vp9" if webm else "libx264")
    options = dict(options) if options is not None else {"crf": "18", **({"b": "0"} if webm else {})}
    right, below = frames.shape[3] % 2, frames.shape[2] % 2
    try:
        if av.Codec(codec, "w").type != "video":
            raise ValueError("not a video encoder")
        with writing(path, suffix=path.suffix) as temporary, av.open(str(temporary), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(60000), options=options)
            assert isinstance(stream, av.VideoStream)
            stream.pix_fmt = "yuv420p"
            stream.height, stream.width = frames.shape[2] + below, frames.shape[3] + right
            for frame in frames.cpu():  # [3, H, W]
                rgb = np.pad(frame.permute(1, 2, 0).numpy(), ((0, below), (0, right), (0, 0)), "edge")
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    except (FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be written with codec {codec!r} ({reason(error)})") from error
