"""Open a live source with FFmpeg: network streams, devices, and files."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import av
from av.error import FFmpegError

from bt_adapter.data._source import Source, VideoError, reason

# The protocols that FFmpeg may use for a source of each scheme: a playlist or a redirect must not open local files.
_WEB = "http,https,httpproxy,tcp,tls,crypto,data"
_PROTOCOLS = {
    "http": _WEB, "https": _WEB, "udp": "udp,rtp", "rtp": "rtp,udp", "tcp": "tcp", "srt": "srt",
    "rtsp": "rtsp,rtp,udp,tcp,tls,http,https,httpproxy", "rtsps": "rtsps,rtsp,rtp,udp,tcp,tls,https,httpproxy",
    "rtmp": "rtmp,tcp", "rtmps": "rtmps,rtmp,tcp,tls",
}  # fmt: skip
_FORMATS = (
    "mpegts,mpjpeg,hls,rtsp,rtp,sdp,flv,mov,matroska,webm,avi,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,asf,ogg,nut,mxf,dv,"
    "mp3,aac,ac3,eac3,webvtt"
)
# Defaults of FFmpeg's options by scheme; TCP, because many routers lose or block RTP's own packets.
_DEFAULTS = {"rtsp": {"rtsp_transport": "tcp"}, "rtsps": {"rtsp_transport": "tcp"}}
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
_EARLY_END = 1.0  # seconds before its duration at which a finite stream counts as complete


class Connection:
    """How to open one source, any number of times.

    Args:
        source: a URL, the name of a device, or a file.
        format: name of FFmpeg's demuxer or input device; None: FFmpeg detects it among those of video streams.
        options: further options of FFmpeg's protocols and demuxers.
        open_timeout, read_timeout: seconds.
        max_pixels: frames with more pixels are refused.

    Attributes:
        name: the source without user name and password, for messages.
        is_file: a local file, which ends. is_playlist: HLS, whose frames come a segment at a time.

    Raises:
        VideoError: there is no such file. ValueError: the scheme is none of those that are supported. TypeError: the
            format or an option is no text.
    """

    def __init__(
        self,
        source: str,
        format: str | None,
        options: Mapping[str, str],
        open_timeout: float,
        read_timeout: float,
        max_pixels: int | None,
    ) -> None:
        if format is not None and not isinstance(format, str):
            raise TypeError(f"format must be the name of a format, but is {format!r}")
        if not isinstance(options, Mapping) or not all(
            isinstance(text, str) for pair in options.items() for text in pair
        ):
            raise TypeError(f"options must be a mapping of names to texts, but is {options!r}")
        found = _SCHEME.match(source)
        scheme = found[1].lower() if found else ""
        if scheme and scheme not in _PROTOCOLS and format is None:
            raise ValueError(f"source must be a file, a device with its format, or a URL of {', '.join(_PROTOCOLS)}, "
                             f"but its scheme is {scheme!r}")  # fmt: skip
        self.name, self._target = _PASSWORD.sub("", source), source
        self.is_file = not scheme and (format is None or os.path.isfile(source))
        self.is_playlist = format == "hls" or source.partition("?")[0].endswith(".m3u8")
        if self.is_file:
            source_file = Source.of(source, max_pixels=max_pixels)  # VideoError if there is none
            self._target = str(source_file.target)
        # one thread: more would hold frames back, and take cores from the model
        self._decoding = replace(Source.of(b"-", 1, max_pixels), name=self.name, frame_threads=False)
        self._format, self._timeouts = format, (open_timeout, read_timeout)
        self._options = {"format_whitelist": _FORMATS if format is None else f"{format},{_FORMATS}"}
        if scheme in _PROTOCOLS or self.is_file:
            self._options["protocol_whitelist"] = _PROTOCOLS.get(scheme, "file,crypto,data")
        self._options |= _DEFAULTS.get(scheme, {}) | dict(options)

    def frames(self, alive: Callable[[float], object]) -> Iterator[av.VideoFrame | None]:
        """Open the source and yield its frames as they are decoded, and None for each packet that is damaged.

        alive: called with the seconds that the next step may take at most.

        Raises:
            VideoError: it cannot be opened or read, is silent for longer than the timeout, or has ended before its
                duration; the message says which.
        """
        open_timeout, read_timeout = self._timeouts
        with ExitStack() as stack:
            alive(2 * open_timeout)  # to connect, and to find the streams
            container = stack.enter_context(self._open())
            try:
                yield from self._decoded(container, alive, read_timeout)
            except av.error.ExitError as error:
                raise VideoError(f"{self.name}: no data for {read_timeout:g} s") from error
            except (FFmpegError, OSError) as error:
                raise VideoError(f"{self.name}: cannot be read ({reason(error)})") from error

    def _open(self) -> av.container.InputContainer:
        try:
            return av.open(
                self._target, "r", format=self._format, options=self._options, timeout=self._timeouts,
                metadata_errors="replace",
            )  # fmt: skip
        except av.error.ExitError as error:
            raise VideoError(f"{self.name}: cannot be opened within {self._timeouts[0]:g} s") from error
        except (FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.name}: cannot be opened ({reason(error)})") from error

    def _decoded(
        self, container: av.container.InputContainer, alive: Callable[[float], object], read_timeout: float
    ) -> Iterator[av.VideoFrame | None]:
        """Yield the frames of the first video stream; see :meth:`frames`."""
        number = self._decoding.candidates(container)[0].index
        stream = self._decoding.stream(container, number)
        seen, begin, stamp = time.monotonic(), None, 0.0
        alive(read_timeout)
        for packet in container.demux():  # all streams, so that a silent one among others is noticed
            decoded: list[av.VideoFrame] = []
            if packet.stream.index == number:  # its stream_index is 0 in the packet that ends a stream
                try:
                    decoded = stream.decode(packet)
                except av.error.InvalidDataError:
                    yield None
            for frame in decoded:
                yield frame
                seen = time.monotonic()
                stamp = frame.time if frame.time is not None else stamp
                begin = stamp if begin is None else begin
            if not self.is_file and time.monotonic() - seen > read_timeout:
                raise VideoError(f"{self.name}: data, but no frame for {read_timeout:g} s")
            alive(read_timeout)
        duration = 0.0 if container.duration is None else container.duration / av.time_base
        if not self.is_file and (begin is None or not 0 < duration <= stamp - begin + _EARLY_END):
            raise VideoError(f"{self.name}: the stream was ended by its source")
