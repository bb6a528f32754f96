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


class OrientationReader:
    """Reads in which orientation the frames of a video are to be shown, one frame after the other.

    A display matrix says so, which containers, codecs and EXIF give; angles are rounded to quarter turns. Without a
    matrix a frame is shown as it is stored.
    """

    def __init__(self) -> None:
        self._graph = av.filter.Graph()
        self._made_for: tuple | None = None
        self._unknown: list[int] = []  # kinds of side data that PyAV has no names for

    def read(self, frame: av.VideoFrame) -> Orientation:
        """The orientation of a frame."""
        content = self._display_matrix(frame)
        if content is None or len(content) < _MATRIX.size:
            return Orientation()
        # The stored point (column p, row q) is shown at column a*p + c*q, row b*p + d*q.
        a, b, _, c, d, *_ = _MATRIX.unpack_from(content)
        across, down = hypot(a, c) or 1.0, hypot(b, d) or 1.0  # a matrix may stretch each direction otherwise
        if abs(a) / across + abs(d) / down >= abs(c) / across + abs(b) / down:
            return Orientation(False, flipped_rows=d < 0, flipped_columns=a < 0)
        return Orientation(True, flipped_rows=b < 0, flipped_columns=c < 0)

    def _display_matrix(self, frame: av.VideoFrame) -> bytes | None:
        # A frame whose side data was read is freed no earlier than at Python's next search for cycles (PyAV 18: the
        # two refer to each other), and hundreds of them may wait for it. So it is read of a copy of four pixels.
        small = self._shrink(frame)
        try:
            side_data = small.side_data
        except ValueError as error:
            # PyAV 18 shows none of a frame's side data where it knows one kind of it by no name, such as EXIF (31).
            unknown = re.match(r"(\d+) is not a valid Type", str(error))
            if unknown is None or int(unknown[1]) in self._unknown:
                raise
            self._unknown.append(int(unknown[1]))
            self._made_for = None
            return self._display_matrix(frame)
        matrix = side_data.get("DISPLAYMATRIX")
        return None if matrix is None else bytes(matrix)  # type: ignore[call-overload]  # a buffer, of which PyAV does not say so

    def _shrink(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame in 2 x 2 pixels, with those of its side data that PyAV knows."""
        made_for = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if made_for != self._made_for:
            self._graph = graph = av.filter.Graph()
            graph.threads = 1
            source = graph.add(
                "buffer",
                video_size=f"{frame.width}x{frame.height}",
                pix_fmt=frame.format.name,
                time_base=str(frame.time_base or Fraction(1)),
                colorspace=str(int(frame.colorspace)),
                range=str(int(frame.color_range)),
            )
            known = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in self._unknown]
            graph.link_nodes(
                source, *known, graph.add("scale", "2:2:flags=neighbor"), graph.add("buffersink")
            ).configure()
            self._made_for = made_for
        self._graph.push(frame)
        small = self._graph.pull()
        assert isinstance(small, av.VideoFrame)
        return small
