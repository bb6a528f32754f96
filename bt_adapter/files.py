"""Write files and folders atomically, lock them, hash contents, and read and write JSON lines."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from bt_adapter.errors import CommandError

VERSION = "0.1.0"  # of this package, recorded in the files that it writes

_UNFINISHED = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.writing(\.\w+)?")  # the names that _temporary makes


@contextmanager
def writing(
    path: str | os.PathLike[str], flush: bool = False, suffix: str = "", replace: bool = True
) -> Iterator[Path]:
    """Write a file or folder atomically: the context yields a temporary path, which is renamed to ``path`` at its end.

    A killed process leaves the old ``path`` or the new one; after an error the temporary file or folder is removed.

    Args:
        path: its folder must exist.
        flush: flush the content to disk before the rename, and the name after it. Otherwise a crash of the machine may
            keep the name but lose the content.
        suffix: end of the temporary name, for writers that choose the format by it.
        replace: False: a folder that another process has written in the meantime is kept, and the new one removed.
    """
    path = Path(path)
    temporary = _temporary(path, suffix)
    try:
        yield temporary
        if flush:
            to_disk(*temporary.rglob("*"), temporary)
        if temporary.is_dir():
            if replace or not path.exists():
                replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
        if flush:
            to_disk(path.parent)
    finally:
        _remove(temporary)


def write_bytes(path: Path, data: bytes, flush: bool = False) -> None:
    """Write a file as :func:`writing` does; its folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, flush) as temporary:
        temporary.write_bytes(data)


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8 as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, indent: int = 2, ascii: bool = True, flush: bool = False) -> None:
    """Write a JSON file as :func:`write_bytes` does. ascii: escape all other characters."""
    text = json.dumps(value, indent=indent, ensure_ascii=ascii) + "\n"
    write_bytes(path, encode_json(text), flush)


def encode_json(text: str) -> bytes:
    """Encode a JSON text in UTF-8. Half a surrogate pair, which UTF-8 lacks, becomes its escape, which JSON has."""
    return text.encode("utf-8", "backslashreplace")


def replace_folder(aside: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; an existing folder of that name is removed only after that."""
    old = _temporary(folder)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that it does not look complete while it is partly deleted."""
    old = _temporary(folder)
    os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders that killed processes left in a folder, of one ``name`` or of all.

    A running process of another machine is taken for a killed one.
    """
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.writing*"):
        found = _UNFINISHED.fullmatch(path.name)
        if found and (int(found[1]) == os.getpid() or not _is_running(int(found[1]))):
            _remove(path)


def to_disk(*paths: str | os.PathLike[str]) -> None:
    """Flush these files, or the entries of these folders, to disk (fsync)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(file: int, in_use: str) -> None:
    """Lock an open file against other processes until it is closed; does nothing on a file system without locks.

    The descriptor must not be inheritable, as Python opens it: processes that this one starts do not hold the lock.

    Args:
        file: descriptor. in_use: message of the error.

    Raises:
        CommandError: another process has locked the file.
    """
    from filelock import lock_descriptor  # takes time, which not every command needs

    try:
        free = lock_descriptor(file, blocking=False)
    except OSError:  # a file system without locks
        return
    if not free:
        raise CommandError(in_use)


def lock_folder(folder: Path) -> IO[str]:
    """Create the folder of ``--out`` and lock it against other processes until the returned file is closed.

    Raises:
        CommandError: another process has locked it, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise CommandError(f"--out {folder} cannot be written: {error}") from error
    try:
        lock(file.fileno(), f"--out {folder} is in use: another run writes there")
    except CommandError:
        file.close()
        raise
    return file


def digest(
    chunks: Iterable[bytes | memoryview], length: int, algorithm: Literal["blake2b", "sha256"] = "blake2b"
) -> str:
    """Hash the concatenation of ``chunks`` to ``length`` hexadecimal characters.

    Digests are stored beside results and compared later, so each keeps the algorithm and length it began with.
    """
    state = hashlib.blake2b(digest_size=length // 2) if algorithm == "blake2b" else hashlib.new(algorithm)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()[:length]


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises CommandError with the line and byte of an invalid character."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise CommandError(f"{path}, line {line}: not UTF-8 ({error.reason} at byte {error.start})") from error


def parse_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[int, Any]]:
    """Parse JSON lines: yield the number of each line, from 1, and its value, or a ValueError if it is not JSON.

    Blank lines are left out. Split a text at "\\n" alone: JSON may hold other line separators as they are.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                value = error
            except RecursionError as error:
                value = ValueError(str(error))
            yield number, value


def about_file(path: Path) -> Path:
    """Return the path of the file with the settings that produced the rows of ``path``."""
    return path.with_name(path.name + ".about.json")


class Rows:
    """An append-only file of rows, each with an "id".

    Existing rows are kept; an incomplete last line, left by a killed run, is removed. The settings that produced the
    rows are stored in ``<name>.about.json`` next to it, so that rows of different settings never mix. An open file is
    locked against other processes.

    Attributes:
        done: id -> row.

    Raises:
        CommandError: the file holds rows of other settings, or no rows at all; or another run is writing it.
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
        self.path = Path(path)
        self.done: dict[str, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            lock(self._file, f"{self.path} is being written by another run")
            self._check(about)
            self._read()
        except BaseException:
            self.close()
            raise

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._write(encode_json(text))
        os.fsync(self._file)
        self.done |= {row["id"]: row for row in rows}

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def _check(self, about: dict[str, Any]) -> None:
        """Compare the settings with the stored ones, or store them for a new file."""
        about = json.loads(json.dumps(about))
        stored = about_file(self.path)
        if os.fstat(self._file).st_size and not stored.exists():
            raise CommandError(
                f"{self.path} already exists, but {stored.name} with its settings does not: choose another file"
            )
        if os.fstat(self._file).st_size:
            before = json.loads(stored.read_text(encoding="utf-8"))
            names = sorted(name for name in before.keys() | about.keys() if before.get(name) != about.get(name))
            if names:
                changed = ", ".join(f"{name} {before.get(name)!r}, now {about.get(name)!r}" for name in names)
                raise CommandError(f"{self.path} was made with {changed}: use the same settings, or another file")
            return
        write_json(stored, about, indent=1)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        for number, row in parse_lines(data[:whole].split(b"\n")):
            try:
                if isinstance(row, ValueError):
                    raise row
                self.done[row["id"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise CommandError(f"{self.path}, line {number}, is not a row of a run: {error}") from error


def _temporary(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.writing{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or no process id
        pass
    return True
