"""``bt-adapter eval retrieval --scores``: the similarities that the figures come from, in both formats."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from test_cli import run
from test_eval_cli import data, evaluate  # noqa: F401 (fixtures)


def read(path):
    """The scores, the right column of each row, the captions, the clips' keys and the settings."""
    if path.suffix == ".npz":
        with np.load(path) as file:  # without pickles
            return (
                file["scores"],
                file["clip_of_caption"],
                *(json.loads(str(file[name])) for name in ("captions", "clips", "settings")),
            )
    with safe_open(path, "np") as file:
        texts = (json.loads(file.metadata()[name]) for name in ("captions", "clips", "settings"))
        return file.get_tensor("scores"), file.get_tensor("clip_of_caption"), *texts


@pytest.fixture
def shared(data):  # noqa: F811
    """A manifest in which one clip has a second caption, and the clip after it the first one's first caption."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows.insert(1, rows[0] | {"caption": "one more caption"})
    rows[2]["caption"] = rows[0]["caption"]
    path = data.parent / "shared.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_figures_follow_from_the_file_in_either_format(evaluate, shared, tmp_path):  # noqa: F811
    found = {}
    for name in ("scores.npz", "new folder/scores.safetensors"):
        result, _, notes = evaluate("--scores", str(tmp_path / name), manifest=shared)
        assert "similarities" in notes and name.split("/")[-1] in notes
        scores, right, captions, clips, settings = found[name] = read(tmp_path / name)
        assert scores.dtype == np.float32 and right.dtype == np.int64
        assert scores.shape == (result["captions"], result["clips"]) == (len(captions), len(clips)) and len(right) == 9
        assert not set(clips) & set(result["skipped"])
        own = scores[np.arange(len(right)), right]
        ranks = 1 + (scores > own[:, None]).sum(1)
        figures = result["text_to_video"]
        assert figures["r1"] == pytest.approx((ranks <= 1).mean()) and figures["queries"] == len(ranks)
        assert figures["mean_rank"] == pytest.approx(ranks.mean())
        wrong = np.where(right[:, None] == np.arange(len(clips)), -np.inf, scores).T  # [V, Q], own captions left out
        best = np.array([own[right == clip].max() for clip in range(len(clips))])
        to_text = 1 + (wrong > best[:, None]).sum(1)
        assert result["video_to_text"]["mean_rank"] == pytest.approx(to_text.mean())
        assert settings["frames"] == 8 and settings["branch_used"] is True and len(settings["fingerprint"]) > 8
        assert result["captions_of_several_videos"] == 1
    for first, second in zip(*found.values(), strict=True):
        assert np.array_equal(first, second)
    first, second = (row for row, caption in enumerate(captions) if captions.count(caption) == 2)
    assert right[first] != right[second] and np.array_equal(scores[first], scores[second])
    assert not list(tmp_path.rglob("*.writing"))


def test_scores_of_other_settings_are_not_overwritten(capsys, data, tmp_path):  # noqa: F811
    path, other = tmp_path / "scores.safetensors", tmp_path / "scores.npz"
    common = ["eval", "retrieval", "--data", str(data), "--cache", str(tmp_path / "features"), "--workers", "0"]
    for file in (path, other):
        assert run(capsys, *common, "--out", str(tmp_path / "a.json"), "--scores", str(file))[0] == 0
        before = file.read_bytes()
        given = [*common, "--out", str(tmp_path / "b.json"), "--no-branch", "--scores", str(file)]
        code, _, notes = run(capsys, *given)
        assert code == 2 and f"--scores {file}" in notes and "branch_used True, now False" in notes
        assert file.read_bytes() == before and not (tmp_path / "b.json").exists()
        assert run(capsys, *common, "--out", str(tmp_path / "c.json"), "--dual-softmax", "--scores", str(file))[0] == 0
        (tmp_path / "c.json").unlink()
        assert np.array_equal(read(file)[0], read(path)[0])  # the dual softmax has no part in them
    path.write_bytes(b"mine")
    code, _, notes = run(capsys, *common, "--out", str(tmp_path / "a.json"), "--scores", str(path))
    assert code == 2 and "holds no result of this command" in notes and path.read_bytes() == b"mine"
    assert run(capsys, *given, "--overwrite")[0] == 0 and read(other)[4]["branch_used"] is False


@pytest.mark.parametrize(("name", "message"), [("scores.json", "FILE.safetensors or FILE.npz"), ("", "FILE.npz")])
def test_bad_names(capsys, data, tmp_path, name, message):  # noqa: F811
    common = ["eval", "retrieval", "--data", str(data), "--out", str(tmp_path / "r.json")]
    code, _, notes = run(capsys, *common, "--scores", str(tmp_path / name))
    assert code == 2 and "--scores" in notes and message in notes and not list(tmp_path.iterdir())
