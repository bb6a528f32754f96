"""Annotations of public data sets, in their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bt_adapter.data.annotations import class_names, read_annotations
from bt_adapter.data.clips import Clip
from bt_adapter.errors import CommandError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def captions(clips: list[Clip]) -> dict[str, tuple[str, ...]]:
    return {clip.key: clip.captions for clip in clips}


@pytest.fixture
def msrvtt(tmp_path):
    touch(tmp_path / "videos", "video1.mp4", "video2.mp4", "video3.avi")
    data = {
        "info": {"year": "2016"},
        "videos": [
            {"video_id": f"video{n}", "split": split, "category": 1, "url": "x", "start time": 1.0, "end time": 9.0}
            for n, split in ((1, "train"), (2, "test"), (3, "test"), (4, "test"), (5, "validate"))
        ],
        "sentences": [
            {"sen_id": n, "video_id": f"video{n % 5 + 1}", "caption": f"sentence {n}"} for n in range(10)
        ],
    }  # fmt: skip
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(data))
    return tmp_path


def test_msrvtt_1k_a(msrvtt):
    table = msrvtt / "MSRVTT_JSFUSION_test.csv"
    table.write_text(
        'key,vid_key,video_id,sentence\nret0,msr1,video3,a man sings\nret1,msr2,video1,"a cat, asleep"\n'
        "ret2,msr3,video9,a lost one\n"
    )
    clips, skipped = read_annotations("msrvtt", table, msrvtt / "videos")
    assert captions(clips) == {"video3": ("a man sings",), "video1": ("a cat, asleep",)}
    assert clips[0].source.endswith("video3.avi") and clips[0].start is None and clips[0].label is None
    assert list(skipped.reasons) == ["video9"]
    with pytest.raises(CommandError, match="holds only one split"):
        read_annotations("msrvtt", table, msrvtt / "videos", "test")


def test_msrvtt_json_and_lists_of_names(msrvtt):
    clips, skipped = read_annotations("msrvtt", msrvtt / "MSRVTT_data.json", msrvtt / "videos", "test")
    assert captions(clips) == {"video2": ("sentence 1", "sentence 6"), "video3": ("sentence 2", "sentence 7")}
    assert list(skipped.reasons) == ["video4"]
    (msrvtt / "MSRVTT_train.9k.csv").write_text("video_id\nvideo1\nvideo3\n")
    clips, _ = read_annotations("msrvtt", msrvtt / "MSRVTT_train.9k.csv", msrvtt / "videos")
    assert captions(clips) == {"video1": ("sentence 0", "sentence 5"), "video3": ("sentence 2", "sentence 7")}
    assert len(read_annotations("msrvtt", msrvtt / "MSRVTT_data.json", msrvtt / "videos")[0]) == 3
    with pytest.raises(CommandError, match="no split 'dev'; it has test, train, validate"):
        read_annotations("msrvtt", msrvtt / "MSRVTT_data.json", msrvtt / "videos", "dev")


def test_didemo_makes_a_paragraph_of_the_first_thirty_seconds(tmp_path):
    touch(tmp_path, "1@N00_2.mov", "3@N00_4.mp4", "5@N00_6.avi.mp4")
    entries = [
        {"video": "1@N00_2.mov", "description": "a dog runs. ", "times": [[0, 0]], "annotation_id": 1},
        {"video": "3@N00_4.avi", "description": "a boat", "times": [[1, 1]]},
        {"video": "1@N00_2.mov", "description": "it sits", "times": [[2, 2]]},
        {"video": "1@N00_2.mov", "description": None},
        {"video": "5@N00_6.avi", "description": "rain"},
        {"video": "7@N00_8.avi", "description": "gone"},
        {"description": "no video"},
    ]
    (tmp_path / "test_data.json").write_text(json.dumps(entries))
    clips, skipped = read_annotations("didemo", tmp_path / "test_data.json")
    assert captions(clips) == {
        "1@N00_2.mov": ("a dog runs. it sits",), "3@N00_4.avi": ("a boat",), "5@N00_6.avi": ("rain",),
    }  # fmt: skip
    assert all((clip.start, clip.end) == (None, 30.0) for clip in clips)
    assert set(skipped.reasons) == {"1@N00_2.mov, sentence 3", "7@N00_8.avi", f"{tmp_path / 'test_data.json'} entry 6"}


def test_lsmdc(tmp_path):
    first, second = "1001_A_Movie_00.00.51.926-00.00.54.129", "3009_OTHER_00.03.07.170-00.03.09.675"
    touch(tmp_path / "clips", f"1001_A_Movie/{first}.avi", f"{second}.mp4")
    times = "00.00.51.926\t00.00.54.129\t00.00.51.815\t00.00.54.340"
    table = tmp_path / "LSMDC16_challenge_1000_publictect.csv"
    table.write_text(
        f'{first}\t{times}\tSOMEONE "smiles, and" leaves.\n{second}\t{times}\tHe runs.\n'
        f"9999_GONE_00.00.01.000-00.00.02.000\t{times}\tShe is gone.\n{second}\tHe runs.\n"
    )
    clips, skipped = read_annotations("lsmdc", table, tmp_path / "clips")
    assert captions(clips) == {first: ('SOMEONE "smiles, and" leaves.',), second: ("He runs.",)}
    assert set(skipped.reasons) == {"9999_GONE_00.00.01.000-00.00.02.000", f"{table} line 4"}


def test_activitynet_makes_a_paragraph(tmp_path):
    touch(tmp_path / "videos", "v_QOlSCBRmfWY.mp4", "v_ehGHCYKzyZ8.mkv")
    data = {
        "v_QOlSCBRmfWY": {"duration": 82.7, "timestamps": [[0.8, 19.9], [17.4, 60.8]], "sentences": [
            "A woman is seen. ", " She dances."]},
        "v_ehGHCYKzyZ8": {"duration": 61.7, "timestamps": [[0, 2]], "sentences": ["Cars pass."]},
        "v_gone": {"duration": 61.7, "timestamps": [[0, 2]], "sentences": ["Nothing."]},
        "v_odd": {"duration": 1},
    }  # fmt: skip
    (tmp_path / "val_1.json").write_text(json.dumps(data))
    clips, skipped = read_annotations("activitynet", tmp_path / "val_1.json", tmp_path / "videos")
    assert captions(clips) == {
        "v_QOlSCBRmfWY": ("A woman is seen. She dances.",), "v_ehGHCYKzyZ8": ("Cars pass.",),
    }  # fmt: skip
    assert set(skipped.reasons) == {"v_gone", "v_odd"}


def test_hmdb51(tmp_path):
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "brush_hair_test_split1.txt").write_text("a_brush_hair_u.avi 1 \nb_brush_hair_u.avi 2 \nc.avi 0 \n")
    (splits / "brush_hair_test_split2.txt").write_text("a_brush_hair_u.avi 2 \nb_brush_hair_u.avi 1 \n")
    (splits / "cartwheel_test_split1.txt").write_text("(Rad)d!_cartwheel.avi 2 \ngone_cartwheel.avi 2 \nodd\n")
    (splits / "cartwheel_test_split2.txt").write_text("(Rad)d!_cartwheel.avi 1 \n")
    videos = touch(tmp_path / "videos", "brush_hair/a_brush_hair_u.avi", "brush_hair/b_brush_hair_u.avi",
                   "cartwheel/(Rad)d!_cartwheel.avi")  # fmt: skip
    clips, skipped = read_annotations("hmdb51", splits, videos)
    assert [(clip.key, clip.captions, clip.label) for clip in clips] == [
        ("brush_hair/b_brush_hair_u.avi", ("brush hair",), 0),
        ("cartwheel/(Rad)d!_cartwheel.avi", ("cartwheel",), 1),
    ]
    assert set(skipped.reasons) == {"cartwheel/gone_cartwheel.avi", f"{splits / 'cartwheel_test_split1.txt'} line 3"}
    clips, _ = read_annotations("hmdb51", splits, videos, "train2")
    assert [(clip.key, clip.label) for clip in clips] == [
        ("brush_hair/b_brush_hair_u.avi", 0),
        ("cartwheel/(Rad)d!_cartwheel.avi", 1),
    ]
    assert class_names("hmdb51", splits) == ["brush hair", "cartwheel"]
    with pytest.raises(CommandError, match="test1, test2.*got 'val'"):
        read_annotations("hmdb51", splits, videos, "val")
    with pytest.raises(CommandError, match="test_split3.txt"):
        read_annotations("hmdb51", splits, videos, "test3")


def test_ucf101(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 YoYo\r\n10 Typing\r\n3 TaiChi\r\n")
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_A_g01_c01.avi\nTyping/v_T_g01_c01.avi\nNope/v_N.avi\n")
    (lists / "trainlist02.txt").write_text("TaiChi/v_C_g08_c01.avi 3\n")
    videos = touch(tmp_path / "UCF-101", "ApplyEyeMakeup/v_A_g01_c01.avi", "v_T_g01_c01.avi", "TaiChi/v_C_g08_c01.avi")
    clips, skipped = read_annotations("ucf101", lists, videos)
    assert [(clip.captions, clip.label) for clip in clips] == [(("apply eye makeup",), 0), (("typing",), 3)]
    assert list(skipped.reasons) == [f"{lists / 'testlist01.txt'} line 3"]
    clips, _ = read_annotations("ucf101", lists, videos, "train2")
    assert [(clip.key, clip.captions, clip.label) for clip in clips] == [("TaiChi/v_C_g08_c01.avi", ("tai chi",), 2)]
    assert class_names("ucf101", lists) == ["apply eye makeup", "yo yo", "tai chi", "typing"]


def test_kinetics400_official_table(tmp_path):
    table = tmp_path / "validate.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "ski jumping,-jO_1,3,13,validate\ntai chi,abc,20,30,validate\ntai chi,gone,0,10,validate\n"
        "tai chi,other,0,10,test\nzumba,odd,x,10,validate\n"
    )
    videos = touch(tmp_path / "k400", "-jO_1_000003_000013.mp4", "tai chi/abc_000020_000030.mkv",
                   "test/other_000000_000010.mp4")  # fmt: skip
    clips, skipped = read_annotations("kinetics400", table, videos, "validate")
    assert [(clip.key, clip.captions, clip.label) for clip in clips] == [
        ("-jO_1_000003_000013", ("ski jumping",), 0), ("abc_000020_000030", ("tai chi",), 1),
    ]  # fmt: skip
    assert set(skipped.reasons) == {"gone_000000_000010", f"{table} line 6"}
    assert len(read_annotations("kinetics400", table, videos)[0]) == 3
    assert class_names("kinetics400", table) == ["ski jumping", "tai chi", "zumba"]
    (tmp_path / "kinetics_400_labels.csv").write_text("id,name\n1,ski jumping\n0,abseiling\n2,tai chi\n3,zumba\n")
    assert class_names("kinetics400", table) == ["abseiling", "ski jumping", "tai chi", "zumba"]
    assert [clip.label for clip in read_annotations("kinetics400", table, videos, "validate")[0]] == [1, 2]
    with pytest.raises(CommandError, match="no split 'val'; it has test, validate"):
        read_annotations("kinetics400", table, videos, "val")


def test_kinetics400_lists(tmp_path):
    listed = tmp_path / "kinetics400_val_list_videos.txt"
    listed.write_text("a clip.mp4 1\nsub/b.mp4, 0\nsub/b2.mp4 2\nnonsense\n")
    touch(tmp_path, "a clip.mp4", "sub/b.mp4", "sub/b2.mp4")
    with pytest.raises(CommandError, match="needs a class list in the same folder: label_map_k400.txt"):
        read_annotations("kinetics400", listed)
    (tmp_path / "label_map_k400.txt").write_text("abseiling\nair drumming\n")
    clips, skipped = read_annotations("kinetics400", listed)
    assert [(clip.key, clip.captions, clip.label) for clip in clips] == [
        ("a clip.mp4", ("air drumming",), 1), ("sub/b.mp4", ("abseiling",), 0),
    ]  # fmt: skip
    assert set(skipped.reasons) == {f"{listed} line {n}" for n in (3, 4)}


def test_clips_is_the_layout_of_manifests(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "c.jsonl").write_text('{"video": "a.mp4", "captions": ["x", "y"]}\n')
    assert captions(read_annotations("clips", tmp_path / "c.jsonl")[0]) == {"a.mp4": ("x", "y")}


@pytest.mark.parametrize(
    ("layout", "name", "content", "message"),
    [
        ("msvd", "x.csv", "", "--layout must be one of msrvtt, .*got 'msvd'"),
        ("msrvtt", "x.csv", "a,b\n", "no column video_id; its columns: a, b"),
        ("msrvtt", "x.json", "{}", "no list 'videos'"),
        ("msrvtt", "x.json", "{", "is not JSON"),
        ("didemo", "x.json", "{}", "expected a list at its top"),
        ("activitynet", "x.json", "[]", "expected a dict at its top"),
        ("lsmdc", "x.csv", "a,b\n", "no usable clip"),
        ("hmdb51", "x.csv", "", "expected the folder of the splits"),
        ("ucf101", "x.csv", "", "expected the folder of the splits"),
    ],
)
def test_other_layouts_are_one_error(tmp_path, layout, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CommandError, match=message):
        read_annotations(layout, tmp_path / name)


def test_missing_files_are_named(tmp_path):
    for layout in ("msrvtt", "didemo", "lsmdc", "activitynet", "kinetics400"):
        with pytest.raises(CommandError, match="missing.*No such file"):
            read_annotations(layout, tmp_path / "missing.csv")
    with pytest.raises(CommandError, match="--layout must be one of hmdb51, ucf101, kinetics400"):
        class_names("msrvtt", tmp_path)
