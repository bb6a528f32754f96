"""Reading a file that may be broken, on storage that may fail for a while."""

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

# Seconds between the attempts to read a file that storage or system fail to give.
WAITS = (0.1, 0.5, 2.0, 5.0, 10.0)
# Attempts after which an error that the file and the system may both cause is put down to the file.
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
# FFmpeg also reports these for the content of a file: a Matroska file that breaks off is an "input/output error".
_DOUBTFUL_OF_FFMPEG = (errno.EIO, errno.EAGAIN)
_MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)
_PARSERS = ("PIL", "av", "tarfile", "struct", "json")
_ADVICE = {
    errno.EMFILE: "; allow more open files (ulimit -n) or use fewer --workers",
    errno.ENFILE: "; the machine has too many files open",
    errno.ENOMEM: "; use fewer --workers, or free memory",
}


class StorageError(CommandError):
    """A file cannot be read, and not the file is at fault but storage, network or a limit of the system."""


def read_patiently(path: str | os.PathLike[str], read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``read(*args, **kwargs)``, which reads the file ``path``, and sort the errors by who is at fault.

    An error of the system (too many open files, an I/O error, a network mount that does not answer) is waited for and
    tried again, since a file left out for it would make a run depend on chance. Whatever else goes wrong, whichever
    exception it is, is the file's own fault; but mistakes of the program are no file's (:func:`is_mistake`).

    Returns:
        The result of ``read``.

    Raises:
        VideoError: the file is at fault, or takes more memory than there is: leave it out and go on.
        StorageError: the system still fails after all attempts: stop.
        CommandError, and mistakes of the program: as ``read`` raised them.
        OSError, VideoError: ``read`` also writes, and the disk is full or may not be written to.
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
                problem = "takes more memory than there is" if _is_memory(error) else "cannot be read"
                raise VideoError(f"{os.fspath(path)}: {problem} ({_words(error)})") from error
            if attempt == len(WAITS):
                raise StorageError(
                    f"{os.fspath(path)}: cannot be read ({_words(error)}), in {attempt + 1} attempts within "
                    f"{sum(WAITS):g} seconds. The file itself is not known to be broken, so it is not left out and the "
                    f"run stops{_ADVICE.get(number or 0, '')}; the same command goes on from here"
                ) from error
        time.sleep(WAITS[attempt])
        attempt += 1


def is_passing(error: BaseException) -> bool:
    """Whether an error is one of storage or of the system's limits, which may be over at another time."""
    return _system_error(error) in _SYSTEM


def is_full(error: BaseException) -> bool:
    """Whether there was no room, or no right, to write what was to be written."""
    return _system_error(error) in _FULL


def is_mistake(error: BaseException) -> bool:
    """Whether an error shows a mistake of the program: a wrong type, name or attribute outside of a parser of files.

    Parsers raise such errors, too, where a damaged file leads them astray.
    """
    if not isinstance(error, _MISTAKES):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return True
    innermost = frames[-1]
    file = innermost.f_code.co_filename
    # compiled modules give their source's name from their package on, and no globals
    module = innermost.f_globals.get("__name__", "") if os.path.isabs(file) else file.replace("/", ".")
    return module.partition(".")[0] not in _PARSERS


def _check_reachable(path: str | os.PathLike[str]) -> None:
    """Raise OSError where the system cannot say whether a file is there: a reader might call it missing."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if is_passing(error):
            raise


def _words(error: BaseException) -> str:
    """The message of an error; where it is none of the system's, with its type, since it may say little by itself."""
    if isinstance(error, VideoError):
        return str(error)
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error that is behind it."""
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
    """The error that reading all bytes of a file gives; None where they can be read."""
    buffer: Any = bytearray(1 << 20)
    try:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    except OSError as error:
        return error
    return None
