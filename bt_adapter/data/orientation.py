"""The orientation in which a decoded video frame or picture is to be shown: turned, mirrored, or both."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from fractions import Fraction
from math import hypot

import av
import av.filter
import numpy as np

# One 3 x 3 matrix of 32-bit integers, row by row (FFmpeg's libavutil/display.h).
_MATRIX = struct.Struct("=9i")


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a picture: first perhaps rows and columns change places, then perhaps a mirror.

    Attributes:
        transposed: rows and columns change places, so that height and width do too.
        flipped_rows: the picture is then turned upside down (the first row becomes the last).
        flipped_columns: the picture is then mirrored left to right.
    """

    transposed: bool = False
    flipped_rows: bool = False
    flipped_columns: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A view of pixels ``[H, W, ...]`` as they are to be shown: ``[W, H, ...]`` where ``transposed``."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flipped_rows else 1, :: -1 if self.flipped_columns else 1]


def read_orientation(frame: av.VideoFrame) -> Orientation:
    """Read a frame's display matrix, which containers, codecs and EXIF give; angles are rounded to quarter turns.

    Without a matrix the frame is shown as it is stored.
    """
    content = _display_matrix(frame)
    if content is None or len(content) < _MATRIX.size:
        return Orientation()
    # The stored point (column p, row q) is shown at column a*p + c*q, row b*p + d*q.
    a, b, _, c, d, *_ = _MATRIX.unpack_from(content)
    across, down = hypot(a, c) or 1.0, hypot(b, d) or 1.0  # a matrix may stretch each direction otherwise
    if abs(a) / across + abs(d) / down >= abs(c) / across + abs(b) / down:
        return Orientation(False, flipped_rows=d < 0, flipped_columns=a < 0)
    return Orientation(True, flipped_rows=b < 0, flipped_columns=c < 0)


def _display_matrix(frame: av.VideoFrame) -> bytes | None:
    try:
        side_data = frame.side_data
    except ValueError as error:
        # PyAV 18 shows none of a frame's side data where it knows one kind of it by no name, such as EXIF (number 31).
        unknown = re.match(r"(\d+) is not a valid Type", str(error))
        if unknown is None:
            raise
        return _display_matrix(_without_side_data(frame, int(unknown[1])))
    matrix = side_data.get("DISPLAYMATRIX")
    return None if matrix is None else bytes(matrix)  # type: ignore[call-overload]  # a buffer, of which PyAV does not say so


def _without_side_data(frame: av.VideoFrame, kind: int) -> av.VideoFrame:
    """The frame without its side data of one kind."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base or Fraction(1),
    )
    graph.link_nodes(source, graph.add("sidedata", f"mode=delete:type={kind}"), graph.add("buffersink")).configure()
    graph.push(frame)
    result = graph.pull()
    assert isinstance(result, av.VideoFrame)
    return result
