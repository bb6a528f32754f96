"""Tables: a row that cannot be read is named, and takes no other row with it."""

from __future__ import annotations

import pytest

from bt_adapter.data.annotations import read_annotations
from bt_adapter.data.manifests import read_clips
from bt_adapter.errors import CommandError


@pytest.fixture
def folder(tmp_path):
    """A folder with the files 1.mp4 to 9.mp4."""
    for number in range(1, 10):
        (tmp_path / f"{number}.mp4").touch()
    return tmp_path


def read(folder, content: str | bytes, name: str = "clips.csv"):
    """Captions by number, and reasons by line."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    clips, skipped = read_clips(path)
    return (
        {int(clip.key.removesuffix(".mp4")): "|".join(clip.captions) for clip in clips},
        {key.rpartition(" line ")[2]: reason for key, reason in skipped.reasons.items()},
    )


HEAD = "video,caption\n"


@pytest.mark.parametrize(
    "rows",
    [
        ["1.mp4,one", '2.mp4,"half open', "3.mp4,three", "4.mp4,four"],  # open to the end of the file
        ["1.mp4,one", '2.mp4,"half open', '3.mp4,"three, quoted"', "4.mp4,four"],
        ["1.mp4,one", '2.mp4,"half open', "3.mp4,three", '4.mp4,"four"'],
        ["1.mp4,one", '2.mp4,"half open', '3.mp4,three"', "4.mp4,four"],  # closes as if it had been meant so
        ["1.mp4,one", '2.mp4,"half open', '3.mp4,say ""three""', "4.mp4,four"],
        ["1.mp4,one", '"2.mp4,half open', "3.mp4,three", "4.mp4,four"],
        ["1.mp4,one", '2.mp4,"half" open', "3.mp4,three", "4.mp4,four"],
        ["1.mp4,one", '2.mp4,"say \\"half\\" open"', "3.mp4,three", "4.mp4,four"],
        ["1.mp4,one", '2.mp4,"half open"x', "3.mp4,three", "4.mp4,four"],
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_is_not_closed_costs_its_own_row_alone(folder, rows, end):
    captions, reasons = read(folder, end.join([HEAD.strip(), *rows]) + end)
    assert set(captions) == {1, 3, 4} and "half" not in "".join(captions.values())
    assert set(reasons) == {"3"}


def test_the_last_row_may_be_the_broken_one(folder):
    captions, reasons = read(folder, HEAD + '1.mp4,one\n2.mp4,"half open')
    assert captions == {1: "one"} and "an opening quote in it is never closed" in reasons["3"]


def test_quotes_around_commas_and_line_ends_are_read(folder):
    content = HEAD + '1.mp4,"one, two"\n2.mp4,"say ""hi"""\n3.mp4,"first\nthen, second\n\nlast"\n4.mp4,5" pipe\n'
    captions, reasons = read(folder, content)
    assert captions == {1: "one, two", 2: 'say "hi"', 3: "first\nthen, second\n\nlast", 4: '5" pipe'} and not reasons


def test_webvid_rows_are_told_apart_by_their_numbers(folder):
    rows = '1,u,PT00H00M10S,,"open\n2,u,PT00H00M12S,,two\n3,u,PT00H00M13S,,"three"\n'
    captions, reasons = read(folder, "videoid,contentUrl,duration,page_dir,name\n" + rows)
    assert captions == {2: "two", 3: "three"} and set(reasons) == {"2"}


def test_many_unclosed_quotes_take_no_time(folder):
    rows = "".join(f'x{n}.avi,"open {n}\n' for n in range(5000))
    captions, reasons = read(folder, HEAD + rows + "1.mp4,one\n")
    assert captions == {1: "one"} and len(reasons) == 5000


def test_in_a_tsv_quotes_are_letters(folder):
    rows = '1.mp4\t"Hi" said he\n2.mp4\t"Stop\n3.mp4\tbe" quick\n4.mp4\t5" pipe, "long"\n'
    captions, reasons = read(folder, "video\tcaption\n" + rows, "clips.tsv")
    assert captions == {1: '"Hi" said he', 2: '"Stop', 3: 'be" quick', 4: '5" pipe, "long"'} and not reasons


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends(folder, encoding, end):
    content = end.join(["video,caption", "1.mp4,läuft ☃", "", '2.mp4,"a, b"', ""])
    assert read(folder, content.encode(encoding)) == ({1: "läuft ☃", 2: "a, b"}, {})


def test_bytes_0_are_named(folder):
    captions, reasons = read(folder, HEAD + "1.mp4,one\n2.mp4,t\0wo\n3\0.mp4,x\n4.mp4,four\n")
    assert captions == {1: "one", 4: "four"} and set(reasons) == {"3", "4"}
    with pytest.raises(CommandError, match="line 1: holds null bytes; save it as UTF-8"):
        read(folder, (HEAD + "1.mp4,one\n").encode("utf-16-le"))


def test_long_lines_and_cells(folder, monkeypatch):
    monkeypatch.setattr("bt_adapter.data.tables.LONGEST_LINE", 200_000)
    rows = f"1.mp4,one\n2.mp4,{'x' * 150_000}\n3.mp4,three\n4.mp4,{'y, ' * 400_000}\n5.mp4,five\n"
    captions, reasons = read(folder, HEAD + rows)
    assert captions == {1: "one", 3: "three", 5: "five"} and len(reasons) == 2
    assert "field larger" in reasons["3"] and "a line of more than 200000 characters" in reasons["5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it has none"),
        ("\n\n", "it has none"),
        ('video,"caption\n' + "1.mp4,one\n" * 20000, "line 1: the column names cannot be read: an opening quote"),
        ('video,"cap"tion\n1.mp4,one\n', "line 1: the column names cannot be read"),
        (f"video,{'caption' * 20000}\n1.mp4,one\n", "line 1: the column names cannot be read: field larger"),
        ("video,caption,Caption\n1.mp4,one,two\n", "has the column caption 2 times"),
        ("video,video,caption\n1.mp4,2.mp4,two\n", "has the column video 2 times"),
        ("video;caption\n1.mp4;one\n", "needs the columns video and caption"),
        (HEAD, "no usable clip"),
    ],
)
def test_a_first_line_of_no_use_is_one_error(folder, content, message):
    with pytest.raises(CommandError, match=message):
        read(folder, content)


def test_columns_that_nobody_reads_may_come_twice_and_empty_lines_before(folder):
    assert read(folder, "\n\nvideo,x,caption,x\n1.mp4,,one,\n") == ({1: "one"}, {})


def test_broken_lines_of_json_cost_themselves_alone(folder):
    lines = [
        '{"video": "1.mp4", "caption": "one"}', '{"video": "2.mp4", "caption": "open', '{"video": "3.mp4"',
        "[" * 100_000, '{"video": "4.mp4", "caption": "four"} {}', '{"video": "5\\u0000.mp4", "caption": "x"}', "null",
        '{"video": "6.mp4", "caption": "six"}',
    ]  # fmt: skip
    captions, reasons = read(folder, "\n".join(lines), "clips.jsonl")
    assert captions == {1: "one", 6: "six"} and len(reasons) == 6


def test_msrvtts_table_is_read_as_strictly(folder):
    path = folder / "test.csv"
    for number in range(1, 5):
        (folder / f"video{number}.mp4").touch()
    path.write_text(
        'key,vid_key,video_id,sentence\nret1,msr1,video1,"open\nret2,msr2,video2,two\nret3,msr3,video3,a, b\n'
        'ret4,msr4,video4,"four, 4"\n'
    )
    clips, skipped = read_annotations("msrvtt", path)
    assert {clip.key: clip.captions for clip in clips} == {"video2": ("two",), "video4": ("four, 4",)}
    assert list(skipped.reasons) == [f"{path} line 2", f"{path} line 4"]
    for header, message in (
        ('key,"video_id\n', "line 1: the column names"), ("key,x\n", "has no column video_id"),
        ("video_id,sentence,video_id\n", "has the column video_id 2 times"),
    ):  # fmt: skip
        path.write_text(header + "ret1,video1\n" * 20000)
        with pytest.raises(CommandError, match=message):
            read_annotations("msrvtt", path)


def test_kinetics_rows_and_classes_are_read_as_strictly(folder):
    (folder / "abc_000001_000011.mp4").touch()
    path = folder / "val.csv"
    path.write_text('label,youtube_id,time_start,time_end,split\n"riding,xyz,1,11,val\nsinging,abc,1,11,val\n')
    clips, skipped = read_annotations("kinetics400", path)
    assert [(clip.key, clip.label, clip.captions) for clip in clips] == [("abc_000001_000011", 0, ("singing",))]
    assert f"{path} line 2" in skipped.reasons
    (folder / "kinetics_400_labels.csv").write_text('id,name\n0,"singing\n1,riding\n')
    with pytest.raises(CommandError, match="kinetics_400_labels.csv line 2: an opening quote"):
        read_annotations("kinetics400", path)
