"""Questions about the same videos in one batch: what they have in common is run once, the answers are the same."""

import inspect

import pytest
import torch
from chat_models import FAMILIES, make_branch, make_chat
from rich.console import Console
from test_answer import chat, folder  # noqa: F401 (fixtures)
from test_chat import make_tokenizer
from transformers import MistralConfig

from bt_adapter.chat import answer, attach, caches, conversation, shares
from bt_adapter.chat.conversation import answer_batch, conversation_ids
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.families import family_of
from bt_adapter.chat.prompts import Turn
from bt_adapter.chat.questions import Question
from bt_adapter.chat.settings import Answer
from bt_adapter.training.processes import Processes

TEXTS = ["how ?", "w20 w21 w22 w23 w24 ?", "is it moving ?", "left or right ?"]


@pytest.fixture
def runs(monkeypatch):
    """Rows and tokens of every run of a language model on embeddings."""
    found = []

    def follow(engine):
        generator = family_of(engine.model).generator
        forward = generator.forward

        def followed(*arguments, **options):
            if options.get("inputs_embeds") is not None:
                found.append(tuple(options["inputs_embeds"].shape[:2]))
            return forward(*arguments, **options)

        followed.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(generator, "forward", followed)
        return found

    return follow


def prompts_of(engine, count: int, texts, kinds=("video",)):
    """Each text about each of ``count`` visuals, in turns."""
    draws = torch.Generator().manual_seed(7)
    width = engine.model.config.get_text_config().hidden_size
    shown = [
        conversation.Visual(kind, torch.randn(6 + (kind == "video"), width, generator=draws))
        for kind in kinds
        for _ in range(count)
    ]
    found = []
    for text in texts:
        for visual in shown:
            ids = conversation_ids(engine.processor, [Turn(text, (visual.kind,))], [len(visual.tokens)])
            found.append((ids, [visual]))
    return found


def alone(engine, prompts):
    return [answer_batch(engine.model, engine.tokenizer, [prompt], 6)[0] for prompt in prompts]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "instructblip"])
@pytest.mark.parametrize("kinds", [("video",), ("video", "image")])
def test_what_prompts_share_is_run_once(runs, family, kinds):
    model = make_chat(family)
    engine = VideoChat(attach.attach(model, make_branch(model)), make_tokenizer())
    generator = family_of(model).generator
    generator.generation_config.min_new_tokens = 6
    if family == "blip-2":  # whose small language model else says the same whatever it is asked
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    prompts = prompts_of(engine, 2, TEXTS, kinds)
    expected = alone(engine, prompts)
    found = runs(engine)
    assert answer_batch(model, engine.tokenizer, prompts, 6) == expected and len(set(expected)) > 2
    (files, begun), (rows, rest) = found[:2]
    longest = max(len(ids) for ids, _ in prompts)
    assert (files, rows, begun + rest) == (2 * len(kinds), 8 * len(kinds), longest) and begun >= 6
    found.clear()
    assert answer_batch(model, engine.tokenizer, prompts[:2], 6) == expected[:2]  # a question each: nothing in common
    assert found[0][0] == 2 and found[0][1] == max(len(ids) for ids, _ in prompts[:2])


def test_layers_that_forget_tokens_run_whole_prompts(runs, chat, monkeypatch):  # noqa: F811
    prompts = prompts_of(chat, 2, TEXTS)
    expected = alone(chat, prompts)
    found = runs(chat)
    with monkeypatch.context() as patch:
        patch.setattr(conversation, "keeps_all", lambda config: False)
        assert answer_batch(chat.model, chat.tokenizer, prompts, 6) == expected
    assert found[0] == (8, max(len(ids) for ids, _ in prompts))
    config = chat.model.config.get_text_config()
    assert caches.keeps_all(config)
    assert not caches.keeps_all(MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert caches.keeps_all(MistralConfig(num_hidden_layers=2, sliding_window=None))


def test_equal_prompts_and_text_alone(chat):  # noqa: F811
    prompts = prompts_of(chat, 1, ["how ?", "how ?"])
    assert answer_batch(chat.model, chat.tokenizer, prompts, 6) == alone(chat, prompts)
    texts = [(conversation_ids(chat.processor, [Turn(text)], []), []) for text in TEXTS]
    assert answer_batch(chat.model, chat.tokenizer, texts, 6) == alone(chat, texts)


def test_each_file_is_watched_once_in_whatever_order_its_questions_stand(chat, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(answer, "load", lambda command: chat)
    watched = []
    monkeypatch.setattr(answer, "watch", lambda *a, real=answer.watch, **k: watched.append(a[1].path) or real(*a, **k))
    asked = [Question(f"{text}/{name}", folder / f"{name}.mp4", TEXTS[text]) for text in range(3) for name in "abc"]
    command = Answer(questions=folder, videos=folder, frames=4, max_new_tokens=4)
    with shares.SharedRows(tmp_path / "out.jsonl", {}, Processes("cpu")) as rows:
        skipped = answer.answer_with(command, asked, rows, 2, Console(quiet=True))
        assert not len(skipped) and set(rows.done) == {question.id for question in asked}
    assert sorted(watched) == [folder / f"{name}.mp4" for name in "abc"]
