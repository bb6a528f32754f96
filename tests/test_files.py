"""Files and folders are written whole or not at all, locked against other processes, and hashed as they were."""

import errno
import hashlib
import subprocess
import sys

import filelock
import pytest

from bt_adapter.errors import CommandError
from bt_adapter.files import (
    digest,
    lock_folder,
    parse_lines,
    read_text,
    remove_folder,
    remove_unfinished,
    write_json,
    write_whole,
    writing,
)


def test_a_file_is_replaced_at_the_end_and_kept_after_an_error(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), writing(path, suffix=".txt") as temporary:
        temporary.write_text("half", encoding="utf-8")
        assert path.read_text() == "old" and temporary.suffix == ".txt"
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"
    write_json(path, {"name": "\ud83d é"}, ascii=False, flush=True)
    assert path.read_bytes() == b'{\n  "name": "\\ud83d \xc3\xa9"\n}\n'


@pytest.mark.parametrize("replace", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, replace):
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        with writing(folder, flush=True, replace=replace) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in folder.iterdir()] == ["second" if replace else "first"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    remove_folder(folder)
    assert not any(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    code = (
        "import os, sys; from bt_adapter.files import writing\nwith writing(sys.argv[1]) as a: a.touch(); os._exit(0)"
    )
    for name in ("a.txt", "b.txt"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    others = {".c.txt.1-01234567.writing", ".d.txt.writing", "e.txt"}  # of a running process, and of other programs
    for name in others:
        (tmp_path / name).touch()
    left = {file.name for file in tmp_path.iterdir()} - others
    assert {name.split(".")[1] for name in left} == {"a", "b"}
    remove_unfinished(tmp_path, "a.txt")
    assert {file.name for file in tmp_path.iterdir()} - others == {name for name in left if name.startswith(".b")}
    remove_unfinished(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == others


def test_a_folder_is_locked_until_it_is_released_and_not_by_programs_that_were_started(tmp_path):
    with lock_folder(tmp_path / "out") as file:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
            with pytest.raises(CommandError, match="--out .*out is in use"):
                lock_folder(tmp_path / "out")
            file.close()
            lock_folder(tmp_path / "out").close()
            started.communicate(b"\n")


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", fails)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="--out .*file cannot be written"):
        lock_folder(tmp_path / "file")


def test_digests_stay_comparable_with_those_that_were_stored():
    assert digest([b"a", b"b"], 16) == hashlib.blake2b(b"ab", digest_size=8).hexdigest()
    assert digest([b"a", b"b"], 12, "sha256") == hashlib.sha256(b"ab").hexdigest()[:12]


def test_json_lines_with_their_numbers_and_errors():
    found = dict(parse_lines('{"a": "\u2028"}\n\nno\n[1]'.split("\n")))
    assert isinstance(found.pop(3), ValueError) and found == {1: {"a": "\u2028"}, 4: [1]}
    (deep,) = parse_lines(["[" * 1_000_000])
    assert isinstance(deep[1], ValueError)


def test_a_text_that_is_not_utf_8_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\nb")
    assert read_text(path) == "a\nb"
    path.write_bytes(b"a\n\xff")
    with pytest.raises(CommandError, match="a.txt, line 2: not UTF-8 .* at byte 2"):
        read_text(path)
