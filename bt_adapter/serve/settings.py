"""Options of ``bt-adapter serve``. This file imports neither torch nor FastAPI."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, UseAppendAction, arg

from bt_adapter.chat.settings import AnswerOptions, ChatModel, ModelOptions, VideoOptions
from bt_adapter.errors import CommandError
from bt_adapter.serve.limits import MEBIBYTE, Limits
from bt_adapter.training.settings import COUNT, NATURAL, POSITIVE, check_numbers


@dataclass(frozen=True, kw_only=True)
class ServedModel(ModelOptions):
    """The chat model and its branch."""

    help_group: ClassVar[str] = "model"

    model: Positional[str] = "mini"
    """Chat model, as --model of "bt-adapter chat"; default: the small stack."""
    served_model_name: str | None = None
    """Name of the model in the API; default: MODEL as given, without the folders before it."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Address, key and work."""

    help_group: ClassVar[str] = "server"

    host: str = "127.0.0.1"
    """Address to listen on; default: this machine only. "0.0.0.0": reachable from other machines, set a key then."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    api_key: str | None = None
    """Key that requests below /v1/ must have as a bearer token; default: the environment variable
    BT_ADAPTER_API_KEY, which other users of the machine cannot read, or none."""
    threads: int | None = None
    """CPU threads of the model; default: half of the cores, at least 1 and at most 4."""
    batch_size: int = 8
    """Questions answered at once."""
    decoders: int = 2
    """Stills and videos decoded at a time, beside the model."""
    cache_mb: int = 256
    """Mebibytes of video tokens kept for further questions about the same content; 0: none."""
    access_log: bool = False
    """Print a line for each request."""
    page: bool = False
    """Serve a web page at "/" as well. Default: where gradio is installed (extra [page])."""
    no_page: Annotated[bool, arg(name="no-page")] = False
    """Serve no web page."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of requests."""

    help_group: ClassVar[str] = "limits"

    max_waiting: int = Limits.waiting
    """Requests that are answered or wait at one time; more get the status 429."""
    max_frames: int = Limits.frames
    """Frames of a video that a request may ask for."""
    max_body_mb: int = Limits.body // MEBIBYTE
    """Mebibytes of a request's body."""
    max_media_mb: int = Limits.media // MEBIBYTE
    """Mebibytes of a still or video."""
    max_pixels: int = Limits.pixels
    """Pixels of a frame or still."""
    max_visuals: int = Limits.visuals
    """Stills and videos of a request."""
    decode_seconds: float = Limits.seconds
    """Seconds of decoding, and of downloading, of a still or video."""
    live_sessions: int = Limits.live_sessions
    """Live sessions that may be open at one time; 0: none."""
    live_mb: int = Limits.live_bytes // MEBIBYTE
    """Mebibytes of the windows of all live sessions."""
    live_idle: float = Limits.live_idle
    """Seconds without a request after which a live session is closed."""
    allowed_media_path: Path | None = None
    """Folder below which requests may name files by file:///PATH; default: none may."""
    allowed_media_domain: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="HOST")]] = ()
    """Host from which requests may name files by https://; may be given several times; default: none. HOST:PORT for
    another port than 443. Addresses that are not public are refused."""


@dataclass(frozen=True, kw_only=True)
class Serve(ServerLimits, ServerOptions, AnswerOptions, VideoOptions, ServedModel):
    """Serve a video chat model over HTTP, with OpenAI's /v1/chat/completions.

    Without MODEL the small stack is served. The options of frames and of the answer's length are defaults, which a
    request can change; frames of short videos repeat unless --no-repeat is given.
    """

    def chat_model(self) -> ChatModel:
        """Return the options that concern the model, as the other commands have them."""
        return ChatModel(**{item.name: getattr(self, item.name) for item in fields(ChatModel)})

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or Path(self.model).name or self.model

    def check(self) -> None:
        """Raise CommandError for invalid options, before anything is loaded."""
        self.chat_model().check()
        counts = ("threads", "batch_size", "decoders", "max_waiting", "max_frames", "max_body_mb", "max_media_mb",
                  "max_pixels", "max_visuals", "live_mb")  # fmt: skip
        check_numbers(self, dict.fromkeys(counts, COUNT) | {"decode_seconds": POSITIVE, "live_idle": POSITIVE})
        check_numbers(self, {"cache_mb": NATURAL, "live_sessions": NATURAL})
        check_numbers(self, {"port": "[0, 65535]"})
        if self.page and self.no_page:
            raise CommandError("--page and --no-page contradict each other")
        if self.allowed_media_path is not None and not self.allowed_media_path.is_dir():
            raise CommandError(f"--allowed-media-path {self.allowed_media_path}: there is no such folder")
        for domain in self.allowed_media_domain:
            host, colon, port = domain.partition(":")
            if not host or "/" in domain or (colon and not (port.isascii() and port.isdigit())):
                raise CommandError(f"--allowed-media-domain {domain}: expected HOST or HOST:PORT")
