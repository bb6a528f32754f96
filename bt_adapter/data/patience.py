"""Reads files that may be broken from storage that may fail temporarily."""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from av.error import FFmpegError

from bt_adapter.data._source import VideoError
from bt_adapter.errors import CommandError

P = ParamSpec("P")
T = TypeVar("T")

# Seconds between attempts to read a file after an error of storage or the system.
WAITS = (0.1, 0.5, 2.0, 5.0, 10.0)
# Attempts after which an error that either the file or the system may cause is attributed to the file.
DOUBTFUL_ATTEMPTS = 3

_SYSTEM = frozenset(
    getattr(errno, name)
    for name in (
        "EIO EMFILE ENFILE ENOMEM ESTALE ETIMEDOUT EAGAIN EINTR EBUSY ENOBUFS ENOLCK EDEADLK EUCLEAN EREMOTEIO ENOLINK "
        "ECOMM EPROTO ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ECONNREFUSED ENOTCONN ESHUTDOWN EHOSTDOWN "
        "EHOSTUNREACH ENOKEY EKEYEXPIRED EKEYREVOKED"
    ).split()
    if hasattr(errno, name)
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# FFmpeg also reports these for file content: a truncated Matroska file is an "input/output error".
_DOUBTFUL_OF_FFMPEG = (errno.EIO, errno.EAGAIN)
_MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_PARSERS = ("PIL", "av", "tarfile", "struct", "json")
_ADVICE = {
    errno.EMFILE: "; allow more open files (ulimit -n) or use fewer --workers",
    errno.ENFILE: "; the machine has too many files open",
    errno.ENOMEM: "; use fewer --workers, or free memory",
}


class StorageError(CommandError):
    """A file cannot be read because of storage, network or a system limit, not because of the file itself."""


def read_patiently(path: str | os.PathLike[str], read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``read(*args, **kwargs)``, which reads the file ``path``; retry system errors and classify the others.

    A system error (too many open files, an I/O error, an unresponsive network mount) is retried after a pause, because
    skipping the file would make a run depend on chance. Every other exception is attributed to the file, except errors
    of the program (:func:`is_mistake`).

    Returns:
        The result of ``read``.

    Raises:
        VideoError: the file is broken, or needs more memory than available; the caller should skip it.
        StorageError: the system still fails after all attempts; the caller should stop.
        CommandError, and errors of the program: as ``read`` raised them.
        OSError, VideoError: ``read`` also writes, and the disk is full or not writable.
    """
    attempt = 0
    while True:
        try:
            _check_reachable(path)
            return read(*args, **kwargs)
        except CommandError:
            raise
        except Exception as error:
            number = _system_error(error)
            if is_full(error) or is_mistake(error):
                raise
            doubtful = _is_memory(error)
            if number in _DOUBTFUL_OF_FFMPEG and _is_of_ffmpeg(error):
                unreadable = _unreadable(path)
                doubtful, number = unreadable is None, None if unreadable is None else unreadable.errno
            if doubtful and attempt + 1 >= DOUBTFUL_ATTEMPTS or not (doubtful or number in _SYSTEM):
                if isinstance(error, VideoError):
                    raise
                problem = "not enough memory to read it" if _is_memory(error) else "cannot be read"
                raise VideoError(f"{os.fspath(path)}: {problem} ({_words(error)})") from error
            if attempt == len(WAITS):
                raise StorageError(
                    f"{os.fspath(path)}: cannot be read ({_words(error)}) after {attempt + 1} attempts within "
                    f"{sum(WAITS):g} seconds. The file itself may be intact, so it is not skipped and the run stops"
                    f"{_ADVICE.get(number or 0, '')}; run the same command again to resume"
                ) from error
        time.sleep(WAITS[attempt])
        attempt += 1


def is_passing(error: BaseException) -> bool:
    """Tell whether an error comes from storage or a system limit and may be temporary."""
    return _system_error(error) in _SYSTEM


def is_full(error: BaseException) -> bool:
    """Tell whether a write failed because the disk is full, over quota or read-only."""
    return _system_error(error) in _FULL


def is_mistake(error: BaseException) -> bool:
    """Tell whether an error is a bug of the program: a wrong type, name or attribute outside of a file parser.

    Parsers may also raise such errors for a damaged file.
    """
    if not isinstance(error, _MISTAKES):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return True
    innermost = frames[-1]
    file = innermost.f_code.co_filename
    # compiled modules have no globals and a source name relative to their package's parent folder
    module = innermost.f_globals.get("__name__", "") if os.path.isabs(file) else file.replace("/", ".")
    return module.partition(".")[0] not in _PARSERS


def _check_reachable(path: str | os.PathLike[str]) -> None:
    """Raise OSError if the system cannot tell whether a file exists: a reader might report it as missing."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if is_passing(error):
            raise


def _words(error: BaseException) -> str:
    """Return an error's message; other errors than the system's get their type in front, for clarity."""
    if isinstance(error, VideoError):
        return str(error)
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the chain of errors that it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _system_error(error: BaseException) -> int | None:
    """Return the errno of the first system error in the chain of causes; None if there is none."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if isinstance(cause, TimeoutError):
            return errno.ETIMEDOUT
    return None


def _is_memory(error: BaseException) -> bool:
    return any(
        isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and "can't allocate memory" in str(cause))
        for cause in _causes(error)
    )


def _is_of_ffmpeg(error: BaseException) -> bool:
    return any(isinstance(cause, FFmpegError) for cause in _causes(error))


def _unreadable(path: str | os.PathLike[str]) -> OSError | None:
    """Read all bytes of a file; return the OSError that this raises, or None."""
    buffer: Any = bytearray(1 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    except OSError as error:
        return error
    return None
