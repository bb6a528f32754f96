"""The small pretraining benchmark: its clips are what they are said to be, and a run goes on where it stopped."""

import sys
from collections import Counter

import pytest
import torch
from measure import write
from miniature import pretraining, scoring, systems, text
from miniature.scenes import (
    COLOURS,
    EVENTS,
    FRAMES,
    ITEMS,
    KINDS,
    balanced_labels,
    caption,
    counterpart,
    draw,
    every_label,
    label_number,
    object_labels,
    paired_labels,
    render,
)
from miniature.tower import Replay, run_tower

from bt_adapter.mini.clip import normalise
from bt_adapter.mini.items import load_items
from bt_kernels import VisibleTokens


@pytest.fixture(scope="module")
def every_event():
    """A clip of each event, all of the same draws: uint8 [16, 8, 3, 48, 48]."""
    items = load_items("shipped")
    one = draw(items, torch.tensor([5]), torch.tensor([2]), torch.Generator().manual_seed(3))
    return render(one.repeat(len(EVENTS)), torch.arange(len(EVENTS)))


def frames_of(clip):
    return Counter(frame.numpy().tobytes() for frame in clip)


def test_counterparts_hold_the_same_frames_in_another_order(every_event):
    for number, event in enumerate(EVENTS):
        other = int(counterpart(torch.tensor(number)))
        assert EVENTS[other].kind == event.kind and EVENTS[other].channel == event.channel
        assert frames_of(every_event[number]) == frames_of(every_event[other])
        assert not torch.equal(every_event[number], every_event[other])
        backwards = every_event[other].flip(0)
        if event.kind in ("direction", "appearing"):
            assert torch.equal(every_event[number], backwards)
        if event.kind == "order":  # the direction of time tells nothing
            assert torch.equal(every_event[number], every_event[number].flip(0))
    assert len({tuple(sorted(frames_of(clip))) for clip in every_event}) > 4  # pairs do differ from each other


def test_what_moves_moves_as_its_caption_says(every_event):
    def centre(number, axis):
        bright = (every_event[number].float().sum(1) - every_event[number].float().sum(1).amin(0)).clamp(min=0)
        places = torch.arange(48.0).view((48, 1) if axis == 0 else (1, 48))
        return (bright * places).sum((1, 2)) / bright.sum((1, 2))

    named = {event.phrase: number for number, event in enumerate(EVENTS)}
    assert centre(named["moving left"], 1)[0] > centre(named["moving left"], 1)[-1] + 5
    assert centre(named["moving up"], 0)[0] > centre(named["moving up"], 0)[-1] + 5
    there_and_back = centre(named["moving left then right"], 1)
    assert there_and_back[3] < there_and_back[0] - 5 and there_and_back[4] < there_and_back[7] - 5
    path = {
        speed: every_event[named[f"moving {speed}"]].float().diff(dim=0).abs().mean() for speed in ("slowly", "quickly")
    }
    assert path["quickly"] > 1.3 * path["slowly"]


def test_captions_are_unique_and_the_tokenizer_knows_their_words():
    labels = text.all_captions().tolist()
    for template in range(4):
        told = [caption(*row, template) for row in labels]
        assert len(set(told)) == len(told) == len(ITEMS) * len(COLOURS) * (len(EVENTS) + 1)
    _, tokenizer = text.extended_clip()
    tokens = tokenizer(told, padding=True)["input_ids"]
    assert len({tuple(row) for row in tokens}) == len(told)
    assert tokenizer.unk_token_id not in {token for row in tokens for token in row}
    assert torch.equal(label_number(every_label()), torch.arange(len(every_label())))


def test_labels_are_balanced_and_a_batch_names_no_caption_twice():
    labels = balanced_labels(16, torch.Generator().manual_seed(0))
    kinds = Counter(EVENTS[event].kind for event in labels[:, 2].tolist())
    assert kinds == dict.fromkeys(KINDS, 16)
    pairs = paired_labels(40, torch.Generator().manual_seed(0))
    assert len(pairs.unique(dim=0)) == len(pairs) == 80
    assert torch.equal(pairs[1::2, :2], pairs[::2, :2])
    assert torch.equal(pairs[1::2, 2], counterpart(pairs[::2, 2]))


def test_a_batch_of_objects_shows_each_of_them_in_one_colour():
    labels = object_labels(8, torch.Generator().manual_seed(0))
    item, colour, event = labels.unbind(1)
    assert sorted(item[::2].tolist()) == list(range(8)) and torch.equal(item[::2], item[1::2])
    assert len(colour.unique()) == 1 and torch.equal(counterpart(event[::2]), event[1::2])
    assert len(event.unique()) > 4
    # with them, about every second batch of a pool is one
    for objects, wanted in ((True, range(12, 29)), (False, [0])):
        colour = pretraining.pool_labels(40, 16, 0, objects)[:, 1].view(40, 16)
        assert int((colour == colour[:, :1]).all(1).sum()) in wanted


def test_the_reference_order_is_no_tubes_and_its_pairs_do_not_match():
    tubes = VisibleTokens.tube(5, 36, FRAMES, 0.7, torch.Generator().manual_seed(1))
    assert torch.equal(systems.visible_of(systems.System(), _recipe(), 4).target_index, _drawn().index)
    order = systems.reference_order(tubes).validate()
    assert order.index.shape == tubes.index.shape
    assert not torch.equal(order.index, tubes.index) and not torch.equal(order.target_index, order.index)
    for video in range(5):  # the same places of the flat mask, read the other way round
        pattern = set((tubes.index[video, ::FRAMES] // FRAMES).tolist())
        flat = {t * 36 + p for t in range(FRAMES) for p in pattern}
        assert set(order.index[video].tolist()) == flat
        seen = set(order.target_index[video].tolist())
        assert seen == {p * FRAMES + t for t in range(FRAMES) for p in pattern} == set(tubes.index[video].tolist())
    pairs = systems.reference_pairs(tubes).validate()
    assert torch.equal(pairs.index, tubes.index)
    assert (pairs.target_index != pairs.index).float().mean() > 0.8


def _recipe():
    return systems.recipe_of(systems.System(), 5, 0, 0.05)


def _drawn():
    return systems.draw_visible(_recipe(), 36, 4, 0, 1, torch.device("cpu"))


@torch.no_grad()
def test_the_stored_tower_is_the_tower(every_event):
    clip, _ = text.extended_clip()
    model = systems.make_model(clip, systems.System(), 0).eval()
    labels = torch.zeros(len(EVENTS), 3, dtype=torch.long)
    wanted = model(normalise(every_event[:6])).video_embeds
    clips = run_tower(model, every_event, labels, chunk=4)
    plain = model.image_embeds(normalise(every_event[2:4]).flatten(0, 1)).unflatten(0, (2, FRAMES)).mean(1)
    torch.testing.assert_close(clips.frame_mean[2:4], plain)
    replay = Replay(model, clips)
    replay.rows = slice(0, 6)
    torch.testing.assert_close(model(every_event[:6].float()).video_embeds, wanted)


def test_scoring_counts_ties_as_wrong_and_a_perfect_system_as_right():
    texts = torch.eye(len(text.all_captions()))
    labels = balanced_labels(16, torch.Generator().manual_seed(0))
    videos = texts[scoring.PLAIN + label_number(labels)] + 0.1 * texts[labels[:, 0] * len(COLOURS) + labels[:, 1]]
    assert set(scoring.figures_of(videos, texts, labels).values()) == {1.0}
    blind = texts[labels[:, 0] * len(COLOURS) + labels[:, 1]]
    figures = scoring.figures_of(blind, texts, labels)
    assert figures["object alone"] == 1.0
    assert not any(figures[kind] for kind in (*KINDS, "event", "object", "video to text R@1"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder that keeps the captions' embeddings from one small run to the next."""
    return tmp_path_factory.mktemp("weights")


def test_a_run_writes_a_row_and_a_second_start_does_nothing(weights, monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = ["--only", "ablation", "--seeds", "1", "--steps", "2", "--batch", "4", "--pool", "8", "--per-kind", "8"]
    options += ["--text-steps", "1", "--data", "shipped", "--weights", str(weights), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["pretraining.py", *options])
    for module in (text, systems):  # one wording of the captions is enough here
        monkeypatch.setattr(module, "TEMPLATES", module.TEMPLATES[:1])
    chosen = (systems.FULL, "reference's mask order", "without gates", "without MBTA")
    monkeypatch.setattr(pretraining, "SYSTEMS", {name: systems.SYSTEMS[name] for name in chosen})
    pretraining.main()
    rows = pretraining.read_rows(out)
    assert [row.system for row in rows] == list(chosen)
    assert all(0 <= row.figures["object"] <= 1 and len(row.losses) == 3 for row in rows)
    assert rows[3].losses[2] == 0 < rows[0].losses[2]
    assert len({tuple(row.losses) for row in rows}) == len(rows)
    before = out.read_bytes()
    monkeypatch.setattr(pretraining, "Workshop", lambda options: pytest.fail("the second start did something"))
    pretraining.main()
    assert out.read_bytes() == before


def test_a_longer_run_stores_its_branch_and_the_stored_one_does_what_its_row_says(weights, monkeypatch, tmp_path):
    out = tmp_path / "rows.json"
    options = [
        "--seeds",
        "1",
        "--long-steps",
        "2",
        "--batch",
        "4",
        "--pool",
        "8",
        "--per-kind",
        "8",
        "--text-steps",
        "1",
    ]
    options += ["--data", "shipped", "--weights", str(weights), "--out", str(out)]
    for module in (text, systems):
        monkeypatch.setattr(module, "TEMPLATES", module.TEMPLATES[:1])

    def run(only: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pretraining.py", "--only", only, *options])
        pretraining.main()

    run("long")
    (row,) = pretraining.read_rows(out)
    with pytest.raises(SystemExit) as ended:
        run("stored")
    assert ended.value.code == 0
    row.figures["object"] += 0.25
    write([row], out)
    with pytest.raises(SystemExit, match="do not agree"):
        run("stored")
