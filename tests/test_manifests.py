"""Lists of clips: every row is read right or named with the reason."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from bt_adapter.data.clips import Clip, Member
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.video import VideoError
from bt_adapter.errors import CommandError


@pytest.fixture
def videos(tmp_path):
    """A folder with the files a.mp4, b.mp4 and c.mp4; what is in them is not looked at."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.mp4").write_bytes(name.encode())
    return folder


def lines(folder: Path, *rows) -> Path:
    path = folder / "clips.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def found(clips: list[Clip]) -> dict[str, tuple[str, ...]]:
    return {clip.key: clip.captions for clip in clips}


def test_webvid_csv(tmp_path):
    for path in ("train/000001_000050/11.mp4", "12.mp4", "videos/000051_000100/13.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    table = tmp_path / "results_2M_train.csv"
    table.write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        "11,https://x/11.mp4,PT00H00M10S,train/000001_000050,A cat jumps.\n"
        '12,https://x/12.mp4,PT00H00M10S,,"A dog, ""Rex"", runs."\n'
        "13,https://x/13.mp4,PT00H00M10S,000051_000100,Fish\n"
        "14,https://x/14.mp4,PT00H00M10S,000051_000100,Lost\n"
    )
    clips, skipped = read_clips(table)
    assert found(clips) == {"11": ("A cat jumps.",), "12": ('A dog, "Rex", runs.',), "13": ("Fish",)}
    assert all(Path(clip.source).exists() for clip in clips)
    assert list(skipped.reasons) == ["14"] and "no such video" in skipped.reasons["14"]
    elsewhere = tmp_path / "lists" / "clips.csv"
    elsewhere.parent.mkdir()
    table.rename(elsewhere)
    assert found(read_clips(elsewhere, tmp_path)[0]) == found(clips)


def test_plain_csv_with_mark_parts_and_odd_rows(videos):
    table = videos / "clips.csv"
    table.write_bytes(
        "\ufeffVideo , caption,start,end\r\n"
        "a.mp4,eine Katze läuft ☃,,\r\n"
        '"a.mp4","two\nlines",1.5,3\r\n'
        "\r\n"
        "b.mp4\r\n"
        "a.mp4,an open comma, and the rest,,\r\n"
        "b.mp4,reversed,3,1\r\n"
        "b.mp4,no time,soon,\r\n"
        f"c.mp4,{'long ' * 5000},0,\r\n".encode()
        + b"c.mp4,caf\xe9,,\r\n"
        + b"caf\xe9.mp4,a place,,\r\n"
        + b"http://host/a.mp4,an address,,\r\n"
        + b",nothing,,\r\n"
    )
    clips, skipped = read_clips(table)
    assert found(clips) == {
        "a.mp4": ("eine Katze läuft ☃",),
        "a.mp4#1.5-3": ("two\nlines",),
        "c.mp4#0-": (("long " * 5000).strip(),),
    }
    assert (clips[1].start, clips[1].end) == (1.5, 3.0)
    reasons = skipped.reasons
    assert "1 columns instead of 4" in reasons[f"{table} line 6"]
    assert "5 columns instead of 4" in reasons[f"{table} line 7"]
    assert "is not before" in reasons["b.mp4"] and len(reasons) == 8
    assert "number of seconds" in reasons[f"b.mp4 ({table} line 9)"]
    report = skipped.report().encode()  # also what is no UTF-8 can be shown
    assert b"caf\\udce9.mp4" in report
    assert "caption is not UTF-8" in reasons["c.mp4"]
    assert "address" in reasons["http://host/a.mp4"]
    assert "not UTF-8" in skipped.report() and f"{table} line 14" in skipped.report()


def test_rows_of_one_video_are_one_clip_with_several_captions(videos):
    table = videos / "clips.csv"
    table.write_text("id,video,caption\n1,a.mp4,one\n1,a.mp4,two\n1,a.mp4,one\n2,b.mp4,three\n2,c.mp4,four\n")
    clips, skipped = read_clips(table)
    assert found(clips) == {"1": ("one", "two"), "2": ("three",)}
    assert list(skipped.reasons) == [f"2 ({table} line 6)"] and "same name" in skipped.reasons[f"2 ({table} line 6)"]


def test_json_lines(videos):
    path = lines(
        videos,
        {"video": "a.mp4", "caption": "  one "},
        {"video": "b.mp4", "captions": ["x", "", None, 3, "y", "x"], "id": "B"},
        {"video": "c.mp4", "caption": "part", "start": 1, "end": 2.5},
        {"video": "c.mp4", "caption": None, "id": "none"},
        {"video": "c.mp4", "id": "missing"},
        {"video": "c.mp4", "caption": "\t ", "id": "empty"},
        {"video": "c.mp4", "caption": 7, "id": "number"},
        {"video": "c.mp4", "captions": [], "id": "no alternatives"},
        {"video": "c.mp4", "captions": [], "caption": "but this", "id": "beside"},
        {"video": "c.mp4", "caption": "x", "start": True, "id": "time"},
        {"video": "c.mp4", "caption": "x", "start": float("nan"), "id": "nan"},
        '{"video": "c.mp4", "caption": "half \\ud83d", "id": "half"}',
        {"video": 5, "caption": "x"},
        ["a list"],
        "{broken",
        "",
    )
    clips, skipped = read_clips(path)
    assert found(clips) == {"a.mp4": ("one",), "B": ("x", "y"), "c.mp4#1-2.5": ("part",), "beside": ("but this",)}
    named = set(skipped.reasons)
    assert named >= {"none", "missing", "empty", "number", "no alternatives", "time", "nan", "half"}
    assert named >= {f"B, caption {n}" for n in (2, 3, 4)} | {f"{path} line {n}" for n in (13, 14, 15)}
    assert len(named) == 14
    assert "int" in skipped.reasons["number"] and "empty" in skipped.reasons["empty"]


def test_utf16_tables_are_read(videos):
    (videos / "clips.tsv").write_text("video\tcaption\na.mp4\tKätzchen\n", encoding="utf-16")
    assert found(read_clips(videos / "clips.tsv")[0]) == {"a.mp4": ("Kätzchen",)}


def test_an_unclosed_quote_loses_no_other_rows_in_silence(videos):
    rows = "".join(f"b.mp4,caption {n}\n" for n in range(20000))
    (videos / "clips.csv").write_text('video,caption\na.mp4,"open\n' + rows)
    clips, skipped = read_clips(videos / "clips.csv")
    assert list(skipped.reasons) == [f"{videos / 'clips.csv'} line 2"] and "quote" in skipped.report()
    assert len(next(clip for clip in clips if clip.key == "b.mp4").captions) == 20000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.csv", "a,b\n1,2\n", "needs the columns video and caption.*a, b"),
        ("clips.csv", "", "it has none"),
        ("clips.csv", "video,caption\nmissing.mp4,x\n", "no usable clip.*missing.mp4"),
        ("clips.jsonl", "{}\n", "no usable clip"),
        ("clips.tar", "no tar at all " * 100, "(?s)no usable clip.*a damaged tar"),
        ("clips.txt", "hello", "not a known kind of list; expected .csv, .tsv, .jsonl, .tar"),
    ],
)
def test_a_file_of_no_use_is_one_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CommandError, match=f"(?s){message}"):
        read_clips(tmp_path / name)


def test_missing_files_and_folders_without_shards(tmp_path):
    for name in ("missing.csv", "missing.jsonl", "missing.tar", "shard-*.tar"):
        with pytest.raises(CommandError, match="[Nn]o such file"):
            read_clips(tmp_path / name)
    with pytest.raises(CommandError, match="this folder holds no .tar"):
        read_clips(tmp_path)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_are_read_by_place(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        {
            "x/1.mp4": b"first", "x/1.txt": " läuft \n".encode(),
            "2.webm": b"second",
            "2.json": b'{"captions": ["a", "b"], "start": 1, "end": 4, "label": 3, "key": "own.name"}',
            "3.mp4": b"third", "3.json": b'{"other": 1}', "3.txt": b"from the text",
            "4.mp4": b"", "4.txt": b"an empty video",
            "5.txt": b"alone",
            "6.mp4": b"no caption",
            "7.mp4": b"x", "7.json": b"{broken",
            "8.a.mp4": b"x", "8.b.mp4": b"y", "8.txt": b"two",
            "9.mp4": b"x", "9.txt": b"caf\xe9",
        },
    )  # fmt: skip
    write_tar(tmp_path / "1.tar", {"3.mp4": b"another third", "3.txt": b"of another shard"})
    clips, skipped = read_clips(tmp_path)
    assert found(clips) == {
        "x/1": ("läuft",),
        "own.name": ("a", "b"),
        "3": ("from the text",),
        "1.tar/3": ("of another shard",),
    }
    assert [clip.source.read() for clip in clips] == [b"first", b"second", b"third", b"another third"]
    assert (clips[1].start, clips[1].end, clips[1].label) == (1.0, 4.0, 3)
    assert set(skipped.reasons) == {"0.tar/4", "0.tar/5", "6", "0.tar/7", "0.tar/8", "9"}
    assert "a key must not contain a dot" in skipped.reasons["0.tar/8"]
    assert [clip.key for clip in read_clips(tmp_path / "*.tar")[0]] == [clip.key for clip in clips]
    assert len(read_clips(tmp_path / "1.tar")[0]) == 1


@pytest.mark.parametrize("where", ["in a video", "in a header", "between members", "before the text"])
def test_a_tar_that_breaks_off_gives_its_whole_members_and_names_the_rest(tmp_path, where):
    content = {f"{n}{ending}": bytes([n]) * 700 for n in range(3) for ending in (".mp4", ".txt")}
    content |= {f"{n}.txt": f"caption {n}".encode() for n in range(3)}
    path = write_tar(tmp_path / "shard.tar", content)
    with tarfile.open(path) as tar:
        last = {member.name: member.offset for member in tar}
    cut = {
        "in a video": last["2.mp4"] + 512 + 100,
        "in a header": last["2.mp4"] + 100,
        "between members": last["2.mp4"],
        "before the text": last["2.txt"],
    }[where]
    path.write_bytes(path.read_bytes()[:cut])
    clips, skipped = read_clips(path)
    assert found(clips) == {"0": ("caption 0",), "1": ("caption 1",)}
    named = {"in a video": "shard.tar/2", "before the text": "2"}.get(where, str(path))
    assert named in skipped.reasons
    assert str(path) in skipped.reasons or "ends inside its .mp4" in skipped.reasons[named]


def test_a_broken_header_inside_a_tar_is_named(tmp_path):
    path = write_tar(tmp_path / "shard.tar", {f"{n}.{e}": b"x" for n in range(3) for e in ("mp4", "txt")})
    with tarfile.open(path) as tar:
        offset = next(member.offset for member in tar if member.name == "2.mp4")
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    clips, skipped = read_clips(path)
    assert len(clips) == 2 and f"byte {offset}" in skipped.reasons[str(path)]


def test_a_member_that_is_no_longer_there_is_a_video_error(tmp_path):
    path = write_tar(tmp_path / "shard.tar", {"1.mp4": b"x" * 5000})
    member = Member(str(path), 512, 5000, "1.mp4")
    assert member.read() == b"x" * 5000
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VideoError, match="ends inside 1.mp4, after 488 of its 5000 bytes"):
        Clip("1", member).read(1)


def test_a_folder_is_listed_once_and_no_file_looked_at(videos, monkeypatch):
    path = lines(videos, *({"video": f"{'abcx'[n % 4]}.mp4", "id": str(n), "caption": "x"} for n in range(400)))
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(os.path, "exists", lambda file: pytest.fail(f"looked at {file}"))
    clips, skipped = read_clips(path)
    assert listed == [str(videos)] and len(clips) == 300 and len(skipped) == 100


def test_what_is_no_regular_file_among_the_videos_is_named(videos):
    os.mkfifo(videos / "pipe.mp4")
    (videos / "folder.mp4").mkdir()
    (videos / "link.mp4").symlink_to(videos / "a.mp4")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(videos / "socket.mp4"))
    names = ("pipe", "folder", "socket", "link", "b")
    clips, skipped = read_clips(lines(videos, *({"video": f"{name}.mp4", "caption": "x"} for name in names)))
    assert set(found(clips)) == {"link.mp4", "b.mp4"}
    assert set(skipped.reasons) == {"pipe.mp4", "folder.mp4", "socket.mp4"}
    assert all("not a regular file" in reason for reason in skipped.reasons.values())


def test_a_pipe_among_shards_and_a_compressed_one_are_named_and_the_others_go_on(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.mp4": b"x", "1.txt": b"one"})
    write_tar(tmp_path / "3.tar", {"3.mp4": b"x", "3.txt": b"three"})
    os.mkfifo(tmp_path / "1.tar")
    content = (tmp_path / "0.tar").read_bytes()
    for number, pack in enumerate((gzip.compress, bz2.compress, lzma.compress), 4):
        (tmp_path / f"{number}.tar").write_bytes(pack(content))
    (tmp_path / "7.tar").mkdir()
    (tmp_path / "8.tar").write_bytes(b"")
    clips, skipped = read_clips(tmp_path)
    assert found(clips) == {"1": ("one",), "3": ("three",)}
    reasons = {os.path.basename(path): reason for path, reason in skipped.reasons.items()}
    assert set(reasons) == {"1.tar", "4.tar", "5.tar", "6.tar", "7.tar", "8.tar"}
    assert "not a regular file" in reasons["1.tar"] and "not a regular file" in reasons["7.tar"]
    for number, name in enumerate(("gzip", "bzip2", "xz"), 4):
        assert f"compressed with {name}" in reasons[f"{number}.tar"]
    (tmp_path / "shard.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(CommandError, match="compressed with gzip: decompress it first"):
        read_clips(tmp_path / "shard.tar.gz")
    (tmp_path / "0.tar").rename(tmp_path / "shard")  # a tar by its content
    assert found(read_clips(tmp_path / "shard")[0]) == {"1": ("one",)}


FIELDS = {
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12),
    "type": (156, 1), "link": (157, 100), "magic": (257, 8), "user": (265, 32), "device": (329, 16),
    "prefix": (345, 155),
}  # fmt: skip


@pytest.mark.parametrize("valid_sum", [True, False])
@pytest.mark.parametrize("filling", [b"\xff", b"\x80", b"\x00", b"7", b" ", b"-", b"S", b"x", b"L"])
@pytest.mark.parametrize("where", FIELDS)
def test_no_damage_of_a_header_is_more_than_a_broken_shard(tmp_path, where, filling, valid_sum):
    """Every field, filled with what makes other numbers, kinds and names of it; the first and a middle member."""
    write_tar(tmp_path / "good.tar", {"9.mp4": b"x", "9.txt": b"nine"})
    members = {f"{n}.{e}": f"{n} {e}".encode() for n in range(3) for e in ("mp4", "txt")}
    original = write_tar(tmp_path / "bad.tar", members).read_bytes()
    start, size = FIELDS[where]
    for header in (0, 2 * 1024):
        content = bytearray(original)
        content[header + start : header + start + size] = filling * size
        if valid_sum:
            content[header + 148 : header + 156] = b" " * 8
            content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
        (tmp_path / "bad.tar").write_bytes(content)
        clips, skipped = read_clips(tmp_path)
        captions = found(clips)
        assert captions.pop("9") == ("nine",)
        if header:
            assert captions.pop("0", None) == ("0 txt",)
        for clip in clips:  # nothing wrong is taken, whatever is lost
            if clip.key in "012":
                assert clip.source.read() == f"{clip.key} mp4".encode() and clip.captions == (f"{clip.key} txt",)
        assert len(skipped) or {clip.key for clip in clips} == {"9", "0", "1", "2"}


def test_links_devices_and_holes_are_named_and_what_follows_is_read(tmp_path):
    def special(tar, name, kind, link=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)

    def plain(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        special(tar, "folder", tarfile.DIRTYPE)
        plain(tar, "1.mp4", b"one")
        plain(tar, "1.txt", b"first")
        for number, kind, link in (
            (2, tarfile.LNKTYPE, "1.mp4"), (3, tarfile.SYMTYPE, "1.mp4"), (4, tarfile.FIFOTYPE, ""),
            (5, tarfile.CHRTYPE, ""), (6, b"Z", ""),
        ):  # fmt: skip
            special(tar, f"{number}.mp4", kind, link)
            plain(tar, f"{number}.txt", b"lost")
        plain(tar, "7.mp4", b"seven")
        special(tar, "7.txt", tarfile.LNKTYPE, "1.txt")
        plain(tar, "läuft-" + "x" * 200 + ".mp4", b"long")  # a PAX header
        plain(tar, "läuft-" + "x" * 200 + ".txt", b"long name")
        plain(tar, "8.txt", b"alone")
    clips, skipped = read_clips(tmp_path / "a.tar")
    assert found(clips) == {"1": ("first",), "läuft-" + "x" * 200: ("long name",)}
    for number, words in (
        (2, "its .mp4 is a hard link to 1.mp4"), (3, "a symbolic link to 1.mp4"), (4, "a pipe"), (5, "a device"),
        (6, "of type b'Z'"), (7, "its .txt is a hard link to 1.txt"), (8, "no video under its key .only .txt."),
    ):  # fmt: skip
        assert re.search(words, skipped.reasons[f"a.tar/{number}"])
    assert len(skipped) == 7


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0", "gnu"])
def test_a_file_stored_with_holes_is_named_and_what_follows_is_read(tmp_path, version):
    holes = tmp_path / "holes.mp4"
    with open(holes, "wb") as file:
        file.seek(1 << 20)
        file.write(b"end" * 100)
    (tmp_path / "2.mp4").write_bytes(b"two")
    (tmp_path / "2.txt").write_text("second")
    (tmp_path / "holes.txt").write_text("first")
    form = ["--format=gnu"] if version == "gnu" else ["--format=posix", f"--sparse-version={version}"]
    names = ["holes.mp4", "holes.txt", "2.mp4", "2.txt"]
    subprocess.run(["tar", "-C", str(tmp_path), *form, "-S", "-cf", str(tmp_path / "a.tar"), *names], check=True)
    assert os.path.getsize(tmp_path / "a.tar") < 1 << 19
    clips, skipped = read_clips(tmp_path / "a.tar")
    assert found(clips) == {"2": ("second",)} and clips[0].source.read() == b"two"
    assert "holes" in skipped.report() and "its .mp4 is stored as a sparse file" in skipped.report()


def test_what_follows_the_end_mark_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.mp4": b"x", "1.txt": b"one"})
    with tarfile.open(tmp_path / "a.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 512
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "joined.tar").write_bytes(content[: end + 1024] + content)
    clips, skipped = read_clips(tmp_path / "joined.tar")
    assert found(clips) == {"1": ("one",)}
    assert "continues after its end mark" in skipped.reasons[str(tmp_path / "joined.tar")]


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.parquet", "a.mp4", "a"])
def test_of_another_kind_the_error_says_which_are_read(tmp_path, name):
    (tmp_path / name).write_text('[{"video": "a.mp4", "caption": "x"}]')
    with pytest.raises(CommandError, match=f"{name}: is not a known kind of list; expected .csv, .tsv, .jsonl, .tar"):
        read_clips(tmp_path / name)


def test_a_pipe_for_a_list_is_refused_at_once(tmp_path):
    for name in ("a.csv", "a.jsonl", "a.tar", "a.tsv"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(CommandError, match="not a regular file"):
            read_clips(tmp_path / name)
