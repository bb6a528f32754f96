"""Video files to frames and back, with PyAV."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError

from bt_adapter.progress import Progress

from ._decode import (
    PathLike,
    Source,
    Span,
    VideoError,
    reason,
    scan,
    take_by_seeking,
    take_in_sequence,
)
from .sampling import check_count, check_sampling, sample_indices
from .transforms import check_frames

__all__ = ["Video", "VideoError", "read_video", "write_video"]

_METHODS = ("auto", "sequential", "seek")


@dataclass(frozen=True)
class Video:
    """Frames read from a video.

    Attributes:
        frames: uint8 `[T, 3, H, W]`, RGB, upright (rotation metadata applied), channels last in memory.
        timestamps: float64 `[T]`, when each frame is shown: seconds from the start of the file, by the file's
            own clock (whose earliest stream starts at 0), at a variable frame rate too.
        duration: seconds from the first frame's begin to the last one's end, of all that is there.
        fps: average frames per second.
        indices: int64 `[T]`, place of each frame among all frames of the file as presented, from 0.
        path: the file's name ("<bytes>" or "<file>" for nameless sources).
        total: number of frames sampled from: those of the file, or those between `start` and `end`.
        truncated: part of the file is missing or damaged; all of the above speaks of what could be read.
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
) -> Video:
    """Read `frames` frames of a video file, chosen by `sample_indices`.

    Sampling runs over frames in order of presentation, not over seconds: that is the published rule, and the
    two differ only at a variable frame rate, where `timestamps` tell when each frame is shown. Only the frames
    asked for are held in memory.

    Args:
        path: a local file, its bytes, or a binary file object (read from its present position on).
        frames: number of frames T; None for all.
        sampling: "middle", "random" or "reference", see `sample_indices`.
        generator: source of the draws of "random"; torch's global one if None.
        start, end: only frames shown at `start <= t < end`, in seconds from the start of the file.
        progress: called with (steps done, steps in all) while decoding; begins anew for a second pass, which
            a file needs whose packets do not tell the number of its frames.
        repeat: of a video with fewer than `frames` frames, repeat frames, ascending and evenly spread, instead of
            raising.
        method: "sequential" decodes from the first frame on; "seek" jumps to the key frame before each frame
            wanted where container and codec allow it (MP4, MOV, Matroska, WebM; H.264, H.265, VP9, AV1);
            "auto" takes the cheaper one. The frames are the same; damage inside a file is only sure to be
            seen in sequence.
        threads: of the decoder; None: one a core. Where many processes decode, one each is faster.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown `sampling` or `method`.
        VideoError: missing, empty, unreadable or unsupported file, no video in it, no frame in it or between
            `start` and `end`, `frames` below 1, a bad range, or too few frames without `repeat`.
    """
    source = Source.of(path)
    if threads is not None:
        check_count("threads", threads)
        source = replace(source, threads=threads)
    if frames is not None:
        check_count(f"{source.name}: frames", frames, VideoError)
    check_sampling(sampling)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    span = _span(source.name, start, end)
    generator = generator if generator is not None else torch.default_generator
    state = generator.get_state()

    def choose(total: int) -> list[int]:
        # From the same state each time: should the count be corrected, the draws are as if it had been known.
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
                f"{source.name}: {frames} frames were asked for, but there are only {total}; ask for fewer, or let "
                "frames repeat (repeat=True)"
            )

    index = scan(source)
    expected = index.count(span)
    if index.exact and expected == 0:
        require(0)
    total = max(expected, 1)  # decoding decides: a packet without a time may still stand for a frame
    chosen, taken = choose(total), None
    wanted = sorted(set(chosen))
    if index.exact and method != "sequential":
        taken = take_by_seeking(source, index, span, wanted, total, progress, force=method == "seek")
    if taken is None:
        taken = take_in_sequence(source, index, span, wanted, total, progress)
        if taken.count != total:
            total = taken.count
            require(total)
            chosen = choose(total)
            wanted = sorted(set(chosen))
            taken = take_in_sequence(source, index, span, wanted, total, progress)
    require(total)

    order = torch.searchsorted(torch.tensor(wanted), torch.tensor(chosen))
    pixels = torch.from_numpy(taken.pixels)  # [U, H, W, 3], each frame once
    pixels = pixels if len(wanted) == len(chosen) else pixels[order]
    return Video(
        frames=pixels.permute(0, 3, 1, 2),
        timestamps=torch.tensor(taken.seconds, dtype=torch.float64)[order],
        duration=index.duration,
        fps=index.fps,
        indices=torch.tensor(taken.numbers)[order],
        path=source.name,
        total=total,
        truncated=bool(index.truncated or taken.damaged or (index.exact and total < expected)),
    )


def write_video(
    path: str | os.PathLike,
    frames: torch.Tensor,
    fps: float = 8.0,
    codec: str | None = None,
    options: Mapping[str, str] | None = None,
) -> None:
    """Write frames as a video file: H.264 (libx264), or VP9 (libvpx-vp9) where the name ends in ".webm";
    yuv420p.

    An odd height or width grows by a copy of its last row or column, since yuv420p needs even sides.

    Args:
        path: file to write; its suffix chooses the container. It appears, or is replaced, only when complete.
        frames: uint8 `[T, 3, H, W]`, RGB, T at least 1.
        fps: frames per second, above 0.
        codec: another encoder's name.
        options: the encoder's own options instead of constant quality ({"crf": "18"}).

    Raises:
        TypeError, ValueError: wrong type, dtype, rank or channel count of `frames`, or `fps` not above 0.
        VideoError: the folder is missing, or FFmpeg cannot write this container, codec or size.
    """
    check_frames(frames)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a number above 0, got {fps!r}")
    path = Path(path)
    webm = path.suffix.lower() == ".webm"
    codec = codec or ("libvpx-vp9" if webm else "libx264")
    options = dict(options) if options is not None else {"crf": "18", **({"b": "0"} if webm else {})}
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    right, below = frames.shape[3] % 2, frames.shape[2] % 2
    try:
        if av.Codec(codec, "w").type != "video":
            raise ValueError("not a video encoder")
        with av.open(str(temporary), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(60000), options=options)
            assert isinstance(stream, av.VideoStream)
            stream.pix_fmt = "yuv420p"
            stream.height, stream.width = frames.shape[2] + below, frames.shape[3] + right
            for frame in frames.cpu():  # [3, H, W]
                rgb = np.pad(frame.permute(1, 2, 0).numpy(), ((0, below), (0, right), (0, 0)), "edge")
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    except (FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be written with codec {codec!r} ({reason(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _span(name: str, start: float | None, end: float | None) -> Span:
    for label, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{label} must be a number of seconds, got {type(value).__name__} ({value!r})")
    low = -math.inf if start is None else float(start)
    high = math.inf if end is None else float(end)
    if not low < high:
        raise VideoError(f"{name}: start={start} must lie before end={end} (seconds)")
    return low, high
