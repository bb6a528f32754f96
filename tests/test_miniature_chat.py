"""The chat side of the paper in miniature: its questions, probes, tuning and bookkeeping, on tiny random models."""

import argparse
import json

import measure
import pytest
import torch
from miniature import chat, chat_questions, chat_report, chat_tuning, probes
from miniature.chat_tuning import Pool, Setting, Stand, ask, draw_batch, event_directions, tune, warm_start
from miniature.scenes import EVENTS
from small_models import shake
from test_attach import IMAGE_TOKEN, VISION, make_branch, make_chat
from test_chat import make_tokenizer

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.chat.attach import attached_branch
from bt_adapter.mini import lora
from bt_adapter.mini.items import load_items
from bt_adapter.mini.retrieval import mcnemar
from bt_adapter.mini.trees import Prompts

SMALL = {"motion": 3, "order": 4, "speed": 2}


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    return chat_questions.pairs(load_items("shipped"), SMALL, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stand(tmp_path_factory) -> Stand:
    model = make_chat(image_size=48)
    folder = tmp_path_factory.mktemp("branch")
    make_branch(model).save_pretrained(folder)
    return Stand(model, Prompts(make_tokenizer(), IMAGE_TOKEN), folder)


@pytest.fixture(scope="module")
def pool(stand, clips) -> Pool:
    frames, labels = clips
    stand.reset()
    model = shake(BTAdapterVisionModel({**VISION, "image_size": 48}, BTAdapterConfig(depth=3)).eval())
    found = probes.features(model, stand.chat.model.multi_modal_projector, frames)
    tokens = {on: found[name].view(len(frames), 37, -1) for on, name in probes.ALL_TOKENS.items()}
    return Pool(frames, labels, tokens)


def test_pairs_are_alike_but_for_the_order_of_frames(clips):
    frames, labels = clips
    assert len(frames) == 2 * sum(SMALL.values())
    counts = {kind: int(own.sum()) for kind, own in chat_questions.type_of(labels).items()}
    assert counts == {kind: 2 * count for kind, count in SMALL.items()}
    for first, second in zip(frames[::2], frames[1::2], strict=True):
        sorted_first, sorted_second = (sorted(f.flatten().tolist() for f in clip) for clip in (first, second))
        assert sorted_first == sorted_second
        assert not torch.equal(first, second)
    assert torch.equal(labels[::2, :2], labels[1::2, :2])
    assert torch.equal(labels[::2, 2] ^ 1, labels[1::2, 2])


@pytest.mark.parametrize("kind", chat_questions.TYPES)
def test_every_answer_is_read_as_what_it_says(kind):
    texts = chat_questions.answers(kind)
    assert [chat_questions.parse(kind, text) for text in texts] == list(range(len(texts)))
    assert chat_questions.parse(kind, "It is a nothing.") is None


def test_answers_are_read_strictly_where_they_name_an_event_and_loosely_where_they_do_not():
    parse = chat_questions.parse
    assert parse("motion", "It is moving left then right.") is None
    assert parse("motion", "It goes to the left.") == parse("motion", "It is moving left.")
    assert parse("motion", "It stands still.") is None
    assert parse("order", "It is moving left.") is None
    assert parse("speed", "Very fast, not slow.") == parse("speed", "It is moving quickly.")


def test_truth_and_turns_agree_with_the_captions(clips):
    generator = torch.Generator().manual_seed(0)
    for label in clips[1].tolist():
        kind = next(k for k, own in chat_questions.type_of(torch.tensor([label])).items() if own[0])
        asked = chat_questions.turn(kind, tuple(label), generator)
        assert asked.answer == f"It is {EVENTS[label[2]].phrase}." and asked.question in chat_questions.PHRASINGS[kind]


def test_ridge_solves_the_same_problem_in_either_dimension():
    x = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direct = torch.linalg.solve(x.T @ x + 0.1 * 12 * torch.eye(9, dtype=torch.float64), x.T @ y)
    assert torch.allclose(probes.ridge(x, y, 0.1), direct)
    wide = torch.cat([x, x.flip(1)], 1)
    direct = torch.linalg.solve(wide.T @ wide + 0.1 * 12 * torch.eye(18, dtype=torch.float64), wide.T @ y)
    assert torch.allclose(probes.ridge(wide, y, 0.1), direct)


def test_probe_reads_what_is_there_and_nothing_else():
    labels = chat_questions.pairs(load_items("shipped"), {"motion": 30, "order": 40, "speed": 20}, torch.Generator())[1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(labels), 24, generator=generator)
    told = noise + 4 * torch.nn.functional.one_hot(labels[:, 2], 24)
    paired = noise[::2].repeat_interleave(2, 0)  # one feature for both of a pair, as the frame mean has it
    found = probes.accuracies(
        *({"told": told, "paired": paired}, labels), *({"told": told.roll(0, 0), "paired": paired}, labels)
    )
    assert min(found["told"][kind] for kind in chat_questions.TEMPORAL) > 0.9
    assert all(found["paired"][f"{kind}, of the pair"] <= 0.5 for kind in chat_questions.TEMPORAL)


def test_frame_mean_is_one_for_a_pair_and_video_tokens_are_not(pool):
    mean, video = pool.tokens[False], pool.tokens[True]
    assert torch.allclose(mean[::2], mean[1::2], atol=1e-5)
    assert ((video[::2] - video[1::2]).abs().amax((1, 2)) > 1e-3).all()


def test_batches_hold_whole_pairs_and_are_the_same_for_all(pool):
    seen = []
    for step in range(3):
        rows, turns = draw_batch(pool, step, 6, 7)
        again = draw_batch(pool, step, 6, 7)
        assert torch.equal(rows, again[0]) and turns == again[1]
        assert torch.equal(rows[::2] + 1, rows[1::2]) and (rows[::2] % 2 == 0).all()
        assert {len(own) for own in turns} == {2}
        seen += rows.tolist()
    assert sorted(seen) == list(range(18))  # an epoch


def values(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("learns", [("projector",), ("projector", "branch"), ("projector", "adapters")])
def test_tuning_changes_what_learns_and_reset_sets_it_back(stand, pool, learns):
    stand.reset()
    before = values(stand.chat)
    stand.reset(None, 3 if "adapters" in learns else None)
    seconds, losses = tune(stand, Setting(True, learns), pool, 4, 4, 0)
    assert seconds > 0 and len(losses) == 4
    adapters = lora.adapter_state(stand.chat.model.language_model)
    assert bool(adapters) == ("adapters" in learns)
    assert not adapters or any(value.abs().max() > 0 for name, value in adapters.items() if name.endswith("lora_b"))
    after = {name.replace(".base.", "."): value for name, value in values(stand.chat).items() if "lora_" not in name}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = {"projector": "multi_modal_projector", "branch": "bt_adapter"}
    assert {part for part, name in parts.items() if any(name in key for key in changed)} == set(learns) & parts.keys()
    assert not {key for key in changed if not any(name in key for name in parts.values())}
    stand.reset()
    assert all(torch.equal(value, before[name]) for name, value in values(stand.chat).items())


def test_branch_off_answers_a_pair_alike(stand, clips):
    stand.reset()
    told = ask(stand, False, *clips, 0)
    counts = {kind: len(own["generated"]) for kind, own in told.items()}
    assert counts == {"motion": 6, "order": 8, "speed": 4, "object": 7, "colour": 7}
    on = ask(stand, True, *clips, 0)
    assert on.keys() == told.keys()
    assert attached_branch(stand.chat).config.depth == 3


def test_tuning_on_stills_is_done_once_with_the_branch_off(stand, pool, monkeypatch):
    shared = chat.Bench(argparse.Namespace(steps=2, batch=4))
    shared._stands = {"projector": stand}
    motion = chat_questions.type_of(pool.labels)["motion"]
    frames = chat_questions.exposures(pool.frames[motion])
    assert frames.shape == (6, 1, 3, 48, 48) and not torch.equal(frames[::2], frames[1::2])  # a trail has a direction
    shared.stills = Pool(frames, pool.labels[motion], {False: pool.tokens[False][motion]})
    tuned = []
    monkeypatch.setattr(chat, "tune", lambda *args: tuned.append(args) or tune(*args))
    found = []
    for name in ("stills", "stills, branch off"):
        shared.prepare(chat.SETTINGS[name], 0)
        found.append(values(stand.chat))
    assert len(tuned) == 1
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert any("lora_b" in key and value.abs().max() > 0 for key, value in found[1].items())


def test_warm_start_writes_the_event_and_little_else(stand, monkeypatch):
    def words(chat, prompts, names):  # the tiny vocabulary knows none of them
        drawn = torch.randn(len(names), 40, generator=torch.Generator().manual_seed(len(names)))
        return torch.nn.functional.normalize(drawn, dim=-1)

    monkeypatch.setattr(chat_tuning, "word_embeddings", words)
    monkeypatch.setattr(chat_tuning, "STRENGTH", 1.0)  # as strong as all else, so that it is read in what is drawn here
    directions = event_directions(stand)
    product = directions @ directions.T  # at right angles, but for the common part that is left out
    assert (product - torch.eye(len(EVENTS))).abs().max() < 0.1
    event = torch.arange(len(EVENTS)).repeat_interleave(2).repeat(6)
    labels = torch.stack([torch.zeros_like(event), torch.zeros_like(event), event], 1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(len(EVENTS), 1, 32, generator=generator)
    tokens = codes[event] + 0.1 * torch.randn(len(event), 37, 32, generator=generator)
    weights = warm_start(stand, Pool(torch.zeros(0), labels, {True: tokens}), True)
    read = []
    for start in (None, weights):
        stand.reset(start)
        with torch.no_grad():
            mean = stand.chat.model.multi_modal_projector(tokens).mean(1)
        read.append((((mean - mean.mean(0)) @ directions.T).argmax(1) == event).float().mean().item())
    assert read[0] < 0.5 and read[1] > 0.8


def test_paired_test_is_the_mini_stacks():
    first, second = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 0, 1, 0, 0])
    text = ["".join(map(str, hits.tolist())) for hits in (first, second)]
    found = chat.paired_p(*text)
    assert found == {"only_first": 5, "only_second": 1, "p": mcnemar(first.bool(), second.bool())}
    assert chat.paired_p("11", "11")["p"] == 1.0


def test_a_run_goes_on_with_the_rows_that_lack(monkeypatch, tmp_path):
    made = []

    def answers(self, setting, seed):
        made.append((seed, setting))
        hits = {"generated": [setting.branch, True], "likelihood": [True, setting.branch]}
        return {kind: hits for kind in chat_questions.TYPES}, 1.0, [0.5]

    monkeypatch.setattr(chat.Bench, "answers", answers)
    monkeypatch.setattr(chat.Bench, "probe", lambda self, seed: made.append((seed, "probe")) or {})
    monkeypatch.setattr(chat.language, "available", lambda: True)
    names = ["probe", "projector", "projector, branch off"]
    options = argparse.Namespace(
        seeds=[0], steps=1, batch=2, pool=1, clips=1, settings=names[:2], branch=tmp_path, data=None,
        out=tmp_path / "rows.json",
    )  # fmt: skip
    chat.run(options)
    options.settings, options.seeds = names, [0, 1]
    chat.run(options)
    assert len(made) == len(set(map(str, made))) == 6
    rows = json.loads(options.out.read_text())
    assert [row["setting"] for row in rows if row["part"] == "test"] == ["projector against projector, branch off"]
    assert rows[-1]["figures"]["motion"]["generated"] == {"only_first": 2, "only_second": 0, "p": 0.5}
    chat.run(options)
    assert len(made) == 6
    options.steps = 2  # tunings of another length are none of this run's; probes do not depend on it
    chat.run(options)
    assert len(made) == 10


@pytest.fixture
def stored(tmp_path):
    """Rows of two settings and two seeds, as the report reads them."""
    told = {kind: {"generated": [True, False], "likelihood": [True, True]} for kind in chat_questions.TYPES}
    worse = {kind: {"generated": [False, False], "likelihood": [True, False]} for kind in chat_questions.TYPES}
    rows = [
        chat.Row("answers", name, seed, chat.summary(hits), chat.as_text(hits), [2.0, 1.0], 3.0, 60.0)
        for name, hits in (("projector", told), ("projector, branch off", worse))
        for seed in (0, 1)
    ]
    place = {name: 0.25 for kind in chat_questions.TEMPORAL for name in (kind, f"{kind}, of the pair")}
    rows.insert(
        0, chat.Row("probe", "probe", 0, {"here": place, "there": {"motion": 0.5, "motion, of the pair": 0.75}})
    )
    asked = {"steps": 4, "batch": 8, "branch": "some/branch"}
    for row in rows:
        row.options, row.facts = asked, {"threads": 1, "device": "machine", "torch": "2", "commit": "abc"}
    measure.write(rows + chat.tests(rows), tmp_path / "rows.json")
    return chat_report.load(tmp_path / "rows.json")


def test_tables_say_what_the_rows_say(stored, monkeypatch):
    monkeypatch.setattr(chat_report, "load", lambda: stored)
    tables = {name: table() for name, table in chat_report.TABLES.items()}
    assert "tuned on video questions | 2 | 0.50 ± 0.00 |" in tables["miniature-chat"]
    assert "6 : 0, p = 0.031 | 2 : 0, p = 0.50 |" in tables["miniature-chat"]
    assert "4 CPU minutes" in tables["miniature-chat"]
    assert "| there | 0.50 | 0.75 |  |" in tables["miniature-chat-probes"]
    assert "| 2.00 | 1.00 | 1.00 | 3 |" in tables["miniature-chat-losses"]


def test_plot_is_drawn(stored, tmp_path):
    pytest.importorskip("matplotlib")
    assert chat_report.plot(stored, tmp_path / "plot.png").stat().st_size > 1000
