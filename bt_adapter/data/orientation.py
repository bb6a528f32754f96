"""Reads and applies the display orientation of decoded frames: rotation, mirroring or both."""

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
    """One of the eight orientations of a picture: an optional transposition, then optional flips.

    Attributes:
        transposed: rows and columns are exchanged, and so are height and width.
        flipped_rows: the order of the rows is then reversed (upside down).
        flipped_columns: the order of the columns is then reversed (left to right).
    """

    transposed: bool = False
    flipped_rows: bool = False
    flipped_columns: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return a view of pixels ``[H, W, ...]`` in display orientation: ``[W, H, ...]`` if ``transposed``."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flipped_rows else 1, :: -1 if self.flipped_columns else 1]


class OrientationReader:
    """Reads the display orientation of a video's frames, one frame at a time.

    It comes from a frame's display matrix, set by containers, codecs or EXIF; angles are rounded to quarter turns. A
    frame without a matrix keeps its stored orientation.
    """

    def __init__(self) -> None:
        self._graph = av.filter.Graph()
        self._made_for: tuple | None = None
        self._unknown: list[int] = []  # kinds of side data unknown to PyAV

    def read(self, frame: av.VideoFrame) -> Orientation:
        """Return the orientation of a frame."""
        content = self._display_matrix(frame)
        if content is None or len(content) < _MATRIX.size:
            return Orientation()
        # The stored point (column p, row q) is shown at column a*p + c*q, row b*p + d*q.
        a, b, _, c, d, *_ = _MATRIX.unpack_from(content)
        across, down = hypot(a, c) or 1.0, hypot(b, d) or 1.0  # a matrix may scale each axis differently
        if abs(a) / across + abs(d) / down >= abs(c) / across + abs(b) / down:
            return Orientation(False, flipped_rows=d < 0, flipped_columns=a < 0)
        return Orientation(True, flipped_rows=b < 0, flipped_columns=c < 0)

    def _display_matrix(self, frame: av.VideoFrame) -> bytes | None:
        # In PyAV 18 a frame and its side data refer to each other, so reading it keeps the frame alive until Python's
        # next cycle collection, perhaps with hundreds of others. A copy of four pixels is read instead.
        small = self._shrink(frame)
        try:
            side_data = small.side_data
        except ValueError as error:
            # PyAV 18 fails to list a frame's side data if it does not know one of the kinds, such as EXIF (31).
            unknown = re.match(r"(\d+) is not a valid Type", str(error))
            if unknown is None or int(unknown[1]) in self._unknown:
                raise
            self._unknown.append(int(unknown[1]))
            self._made_for = None
            return self._display_matrix(frame)
        matrix = side_data.get("DISPLAYMATRIX")
        return None if matrix is None else bytes(matrix)  # type: ignore[call-overload]  # a buffer, undeclared

    def _shrink(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return the frame scaled to 2 x 2 pixels, with only the side data that PyAV knows."""
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
