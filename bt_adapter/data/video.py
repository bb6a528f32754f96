"""Video files to frames and back, with PyAV."""

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

from bt_adapter.progress import Progress

from ._decode import Taken, take_by_seeking, take_in_sequence
from ._index import Span, scan
from ._source import PathLike, Source, VideoError, reason
from .sampling import check_count, check_sampling, sample_indices
from .transforms import check_frames

__all__ = ["Video", "VideoError", "read_video", "write_video"]

_METHODS = ("auto", "sequential", "seek")
# Frames decoded beyond the end of a range where packets do not tell their order for sure: more than a decoder holds
# back.
_MARGIN = 32


@dataclass(frozen=True)
class Video:
    """Frames read from a video.

    Attributes:
        frames: uint8 `[T, 3, H, W]`, RGB, upright (turned and mirrored as the file says), channels last in memory.
            Pixels are those stored: where they are to be shown wider than high (a "sample aspect ratio" other than
            1, as of DVDs), frames are not stretched, as the readers that CLIP's video data are read with (decord,
            FFmpeg) do not stretch them either.
        timestamps: float64 `[T]`, ascending: when each frame is shown, in seconds from the start of the file, by the
            file's own clock (whose earliest stream starts at 0), at a variable frame rate too. Where that clock starts
            anew, as in joined recordings, times go on; frames without a time of their own, or with that of
            another one, are spread evenly between their neighbours.
        duration: seconds from the first frame's begin to the last one's end, of all that is there.
        fps: average frames per second.
        indices: int64 `[T]`, place of each frame among all frames of the file as presented, from 0.
        path: the file's name ("<bytes>" or "<file>" for nameless sources).
        total: number of frames sampled from: those of the file, or those between `start` and `end`.
        truncated: part of the file is missing or damaged (also pictures at its beginning that refer to others which
            were cut away); all of the above speaks of what could be read.
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

    Sampling runs over frames in order of presentation, not over seconds: that is the published rule, and the
    two differ only at a variable frame rate, where `timestamps` tell when each frame is shown. Only the frames
    asked for are held in memory. Of several video streams the one that moves is read, then the one marked as default,
    then the largest.

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
        side: the side in pixels that the frames will be resized or cropped to. Much larger frames (a short side of more
            than 6 times `side`) are then scaled down to 4 times `side` while they are decoded, to spare memory.
        max_pixels: frames of more pixels are refused; None: what the environment variable BT_ADAPTER_MAX_PIXELS says,
            or 2**26, which is twice 8K.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown `sampling` or `method`.
        VideoError: missing, empty, unreadable or unsupported file, something other than a regular file, no video in
            it, no frame in it or between `start` and `end`, frames of more than `max_pixels` pixels or for which
            there is too little memory, `frames` below 1, a bad range, or too few frames without `repeat`.
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
    order: Sequence[int | None] = index.order
    times = index.times(order)
    settled, damaged = False, index.truncated
    source = replace(source, frame_threads=not damaged)
    while True:
        # The first pass goes by what the packets tell, and its frames serve if decoding bears that out. Otherwise a
        # second one goes by what was decoded.
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
        raise VideoError(f"{source.name}: is damaged, and decodes to other frames each time")

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
