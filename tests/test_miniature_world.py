"""The small world: pairs of the same frames, its questions and answers, and the data sets that the commands read."""

import json

import pytest
import torch
from miniature import datasets, world
from miniature.items import ITEMS_FILE, load_items
from miniature.questions import QUESTIONS, answer, parse
from miniature.world import COLOURS, EVENTS, EXPOSURES, ITEMS, KINDS

from bt_adapter.data.manifests import read_clips
from bt_adapter.data.video import read_video
from bt_adapter.eval.qa import read_items
from bt_adapter.tune.conversations import read_conversations

COUNTS = {"pretrain": 70, "stills": 24, "stills-plain": 8, "stills-ramp": 8, "clips": 20, "heldout": 18}
COUNTS |= {"heldout-stills": 16, "retrieval": 20}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_value(clip):
    return sorted(frame.numpy().tobytes() for frame in clip)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of the data sets, and the split of items that each was drawn from; all are drawn from the shipped."""
    splits, out = {}, tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in COUNTS.items():
            patch.setattr(datasets, "load_items", lambda split, name=name: splits.update({name: split}) or load_items())
            assert datasets.write(out, name, count)
    return out, splits


def test_the_clips_of_a_pair_hold_the_same_frames_in_another_order():
    labels = world.with_counterparts(torch.tensor([[i % 8, i % 6, 2 * i % len(EVENTS)] for i in range(36)]))
    pairs = world.paired_clips(load_items(), labels, generator())
    for (*_, event), one, other in zip(labels[::2].tolist(), pairs[::2], pairs[1::2], strict=True):
        assert not torch.equal(one, other) and by_value(one) == by_value(other)
        if event in world.SINGLE:
            assert torch.equal(one, other.flip(0))
        if EVENTS[event].kind == "order":
            assert torch.equal(one, one.flip(0)) and EVENTS[event].channel == EVENTS[event ^ 1].channel


@pytest.mark.parametrize("kind", EXPOSURES)
def test_exposures_are_weighted_means_of_the_frames_in_which_the_end_weighs_more(kind):
    weights = world.exposure_weights(50, generator(), (kind,))
    assert weights.min() >= 0 and weights.sum(1).allclose(torch.ones(50))
    assert (weights @ torch.arange(8.0) > 3.6).all()
    labels = world.random_labels(50, world.SINGLE, generator(1))
    frames = world.clips(load_items(), labels, generator(2)).double()
    stills = world.exposures(load_items(), labels, random := generator(2), (kind,))
    random.manual_seed(2)
    world.draw(load_items(), labels, random)  # the weights are drawn after the scenes
    mean = torch.einsum("nt,nt...->n...", world.exposure_weights(50, random, (kind,)).double(), frames)
    assert (stills - mean).abs().max() <= 1.01


def test_answers_are_read_back_as_what_they_say():
    for item, colour, event in torch.cartesian_prod(*map(torch.arange, (8, 6, len(EVENTS)))).tolist():
        label = (item, colour, event)
        assert parse("item", answer("item", label)) == item and parse("colour", answer("colour", label)) == colour
        assert parse("caption", answer("caption", label)) == label
        assert parse(EVENTS[event].kind, answer(EVENTS[event].kind, label)) == event
    assert answer("item", (5, 0, 0)) == "It is a sneaker." and answer("colour", (5, 0, 0)) == "It is red."
    assert answer("caption", (5, 0, 0)) == "A red sneaker moving left."
    assert answer("motion", (5, 0, 0)) == "It is moving left."
    assert answer("caption", (5, 0, -1)) == "A red sneaker." and parse("caption", "A red sneaker.") == (5, 0, -1)
    for kind, event in (("order", 0), ("motion", -1), ("shape", 0)):
        with pytest.raises(ValueError, match=kind):
            answer(kind, (0, 0, event))


@pytest.mark.parametrize(
    ("kind", "text", "name"),
    [
        ("motion", "It is moving left then right.", "moving left then right"),
        ("motion", "It is moving left, not moving right.", "moving left"),
        ("order", "It is disappearing.", "disappearing"),
        ("order", "It is moving up then left.", "moving up"),
        ("speed", "Moving slowly.", "moving slowly"),
        ("motion", "It is a red bag.", None),
        ("item", "A boot or a bag?", "boot"),
        ("item", "no idea", None),
        ("colour", "blue, not red", "blue"),
        ("caption", "a red thing", None),
    ],
)
def test_an_answer_is_held_to_the_first_thing_that_it_names(kind, text, name):
    names = {"item": ITEMS, "colour": COLOURS}.get(kind, [event.phrase for event in EVENTS])
    assert parse(kind, text) == (None if name is None else names.index(name))


def test_labels_for_pretraining_are_pairs_without_a_repetition():
    for one_colour in (True, False):
        labels = datasets.paired_labels(16, one_colour, generator())
        assert len(set(map(tuple, labels.tolist()))) == 32
        assert torch.equal(labels[::2, :2], labels[1::2, :2]) and torch.equal(labels[::2, 2] ^ 1, labels[1::2, 2])
        assert (len(labels[:, 1].unique()) == 1) is one_colour
    drawn = torch.cat([datasets.paired_labels(16, bool(seed % 2), generator(seed)) for seed in range(60)])
    share = {kind: torch.isin(drawn[:, 2], torch.tensor(world.of_kind(kind))).float().mean().item() for kind in KINDS}
    total = sum(datasets.WEIGHTS.values())
    assert share == pytest.approx({kind: weight / total for kind, weight in datasets.WEIGHTS.items()}, abs=0.04)


def test_what_was_fed_is_counted_from_the_files(written, tmp_path):
    out, splits = written
    for name, count in COUNTS.items():
        about = json.loads((out / name / "about.json").read_text())
        still = "stills" in name
        assert about["frames"] == {"1" if still else "8": count} and about["files"] == about["count"] == count, name
        assert about["items"] == splits[name] == ("shipped" if "heldout" in name or name == "retrieval" else "train")
        assert bool(about["exposures"]) is (still and name != "stills-plain")
        assert not still or {path.suffix for path in (out / name).iterdir()} <= {".png", ".json", ".jsonl"}
    datasets.write_picture(tmp_path / "clip", torch.zeros(5, 3, 48, 48, dtype=torch.uint8))
    assert datasets.count_frames(tmp_path) == {"5": 1}


def test_the_commands_read_the_data_sets(written):
    out, _ = written
    clips, skipped = read_clips(out / "pretrain")
    texts = [clip.captions[0] for clip in clips]
    assert len(clips) == 70 and not skipped and len(set(texts[:32])) == len(set(texts[32:64])) == 32
    asked = {}
    for name, kind in (("stills", "image"), ("stills-plain", "image"), ("clips", "video")):
        talks, skipped = read_conversations(out / name / f"{name.split('-')[0]}.jsonl")
        assert len(talks) == COUNTS[name] and not skipped and {talk.sources[0].kind for talk in talks} == {kind}
        asked[name] = {turn.question.removeprefix(f"<{kind}>\n") for talk in talks for turn in talk.exchanges}
    events = {question for kind in KINDS for question in QUESTIONS[kind]}
    assert not asked["stills-plain"] & events and asked["stills"] & events <= set(QUESTIONS["motion"])
    assert asked["clips"] & set(QUESTIONS["speed"]) and asked["clips"] & set(QUESTIONS["order"])
    records = json.loads((out / "heldout" / "questions.json").read_text())
    assert len(read_items(out / "heldout" / "questions.json")) == len(records) == 18 + 2 * 6
    told = {record["id"]: record for record in records}
    for key, record in told.items():
        other = told[key[:-1] + {"a": "b", "b": "a"}[key[-1]]]
        assert record["question"] == other["question"] and record["type"] == key.split("/")[0]
        said, meant = (parse(one["type"], one["answer"]) for one in (record, other))
        assert said == (meant ^ 1 if record["type"] in KINDS else meant)
    assert len(read_items(out / "heldout-stills" / "questions.json")) == 12 * 3 + 4 * 2
    assert len(read_clips(out / "retrieval" / "pairs.jsonl")[0]) == 20


def test_a_clip_is_read_as_it_was_drawn_and_pairs_stay_pairs_of_the_same_frames(tmp_path):
    labels = world.with_counterparts(torch.tensor([[5, 0, 0], [1, 3, 8], [2, 4, 16], [7, 5, 4]]))
    read = []
    for clip in world.paired_clips(load_items(), labels, generator()):
        read.append(read_video(datasets.write_picture(tmp_path / "clip", clip), 8).frames)
        small = torch.nn.functional.avg_pool2d(read[-1].float(), 2)
        assert (small - clip).abs().mean() < 2.5 and (small - clip).abs().quantile(0.99) < 9
    assert all(by_value(one) == by_value(other) for one, other in zip(read[::2], read[1::2], strict=True))


def test_the_same_seed_gives_the_same_bytes_and_what_is_there_is_left(written, tmp_path, monkeypatch):
    out, _ = written
    monkeypatch.setattr(datasets, "load_items", lambda split: load_items())
    for name in ("pretrain", "stills", "clips", "heldout"):
        assert datasets.write(tmp_path, name, COUNTS[name]) and not datasets.write(tmp_path, name, COUNTS[name])
        for path in (out / name).iterdir():
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path
    with pytest.raises(ValueError, match="there with {'seed': 0}"):
        datasets.write(tmp_path, "stills", COUNTS["stills"], seed=1)
    with pytest.raises(ValueError, match="even number"):
        datasets.write(tmp_path, "pretrain", 7)
    assert not list(tmp_path.glob("*.writing"))


def test_splits_of_items_have_no_image_in_common():
    try:
        splits = [load_items(name).images.numpy() for name in ("train", "test", "shipped")]
    except FileNotFoundError:
        pytest.skip(f"Fashion-MNIST is not installed; {ITEMS_FILE.name} holds the shipped items alone")
    sets = [{image.tobytes() for image in split} for split in splits]
    assert [len(split) for split in splits] == [48_000, 7680, 320]
    assert not sets[0] & sets[2] and not sets[1] & sets[2]
