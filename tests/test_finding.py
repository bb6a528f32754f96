"""The file of a video that a list names: without its suffix, beside files of the same stem, in sub-folders."""

from __future__ import annotations

import json

import pytest
from tuning import write_clips

from bt_adapter.chat.questions import read_questions
from bt_adapter.data.finding import SUFFIXES, VideoFolder, VisualFolder
from bt_adapter.data.video import VideoError
from bt_adapter.qa import run as qa
from bt_adapter.tune.conversations import read_conversations


@pytest.fixture
def folder(tmp_path):
    def put(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return tmp_path

    return put


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        (("clip0.mp4", "clip0.srt", "clip0.txt"), "clip0", "clip0.mp4"),
        (("clip0.mp4", "clip0.npy", "clip0.pkl", "clip0.safetensors"), "clip0", "clip0.mp4"),
        (("clip0.avi", "clip0.aac", "clip0.json", "clip0.jpg"), "clip0", "clip0.avi"),
        (("clip0.MP4", "clip0.srt"), "clip0", "clip0.MP4"),
        (("clip0.webm", "clip0.mp4", "clip0.mkv"), "clip0", "clip0.mp4"),
        (("clip0.mkv", "clip0.mp4"), "clip0.mkv", "clip0.mkv"),
        (("v_a.b.mp4", "v_a.mp4"), "v_a.b", "v_a.b.mp4"),
        (("v_a.b.mp4", "v_a.mp4"), "v_a", "v_a.mp4"),
        (("v_a.b.srt", "v_a.mp4"), "v_a.b", None),
        (("clip0", "clip0.mp4"), "clip0", "clip0"),
        (("clip0.srt", "clip0.npy"), "clip0", None),
        (("clip01.mp4",), "clip0", None),
        (("sub/d.mp4", "sub/d.srt"), "sub/d", "sub/d.mp4"),
        (("sub/d.mp4", "sub/d.srt"), "d", "sub/d.mp4"),
        (("a/b/d.mkv",), "d", "a/b/d.mkv"),
        (("a/b/d.mkv",), "d.mkv", "a/b/d.mkv"),
        (("a/d.npy",), "d.npy", None),  # below, videos alone
        (("a/d.mp4", "d.mp4"), "d", "d.mp4"),
        (("a/d.mp4", "b/d.mkv"), "d", "twice"),
        (("a/d.mp4", "b/d.mkv"), "b/d", "b/d.mkv"),
        (("a/d.mp4", "a/d.mkv"), "d", "a/d.mp4"),
        (("a/d.mp4",), "b/d", None),
        ((), "d", None),
    ],
)
def test_one_rule(folder, files, name, found):
    root = folder(*files)
    if found in (None, "twice"):
        with pytest.raises(VideoError, match="there is no .*" if found is None else "2 sub-folders .*write its folder"):
            VideoFolder(root).find(name)
        assert VisualFolder(root).find(name, "video") == (root / name, "video")
    else:
        assert VideoFolder(root).find(name) == str(root / found)
        assert VisualFolder(root).find(name, "video") == qa._find(VisualFolder(root), name) == (root / found, "video")


def test_every_suffix_is_found_and_a_folder_of_that_name_is_no_video(folder):
    for number, suffix in enumerate(SUFFIXES):
        assert VideoFolder(folder(f"v{number}{suffix}")).find(f"v{number}").endswith(suffix)
    (folder() / "w.mp4").mkdir()
    with pytest.raises(VideoError, match="there is no"):
        VideoFolder(folder()).find("w")


def test_what_may_stand_before_a_name(folder):
    root = folder("v_abc.mp4", "video7.mp4", "part/vid8.avi", "9.srt", "vid9.avi")
    names = [qa._find(VisualFolder(root), name)[0].relative_to(root).as_posix() for name in ("abc", "7", "8", "9")]
    assert names == ["v_abc.mp4", "video7.mp4", "part/vid8.avi", "vid9.avi"]


def test_training_and_answering_take_the_same_file(folder, tmp_path):
    videos = tmp_path / "v"
    write_clips(videos, 2)
    folder("v/clip0.srt", "v/clip0.npy", "v/clip1.avi.txt", "v/sub/d.npy", "v/sub/d.mp4")
    names = ["clip0", "clip1", "clip1.mp4", "sub/d", "d"]
    (tmp_path / "tune.json").write_text(json.dumps([{"q": "how ?", "a": "left", "video_id": name} for name in names]))
    rows = [{"video": n, "conversations": [{"from": "human", "value": "<video> how ?"}, {"from": "gpt", "value": "a"}]}
            for n in names]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps({"video": n, "question": "how ?"}) + "\n" for n in names))
    expected = [str(videos / name) for name in ("clip0.mp4", "clip1.mp4", "clip1.mp4", "sub/d.mp4", "sub/d.mp4")]
    for name in ("tune.json", "llava.json"):
        found, skipped = read_conversations(tmp_path / name, videos)
        assert [c.sources[0].path for c in found] == expected and not len(skipped)
    assert [str(question.video) for question in read_questions(tmp_path / "ask.jsonl", videos)] == expected
