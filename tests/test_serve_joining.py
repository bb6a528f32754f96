"""Prompts join a batch that is being answered, and get the answers that they would get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from chat_models import FAMILIES, make_branch, make_chat
from serving import about, clip, data_url, mini, serving
from test_chat import make_tokenizer
from test_serve_batches import LONG, client_of, wait_for

from bt_adapter.chat.attach import attach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.families import family_of
from bt_adapter.chat.prompts import Turn, conversation_ids
from bt_adapter.chat.watch import Sampling, watch
from bt_adapter.serve import joining
from bt_adapter.serve.joining import OpenBatch, can_join
from bt_adapter.serve.rows import Decoding, Row, end_tokens, generate_rows

RAMBLING = {"messages": LONG, "max_tokens": 40, "temperature": 2.0, "seed": 0}  # so hot that it does not end
ASKED = [
    {"messages": about(data_url(clip(0)))},
    {"messages": [{"role": "user", "content": "What is it?"}]},
    {"messages": about(data_url(clip(1)), "What is it?"), "max_tokens": 3},
    {"messages": LONG, "max_tokens": 9, "temperature": 1.0, "seed": 7},
]


@pytest.fixture(scope="module")
def server():
    with serving(mini(), batch_size=3) as (url, service):
        yield url, service


class Held:
    """Holds the rambling answer at its third token until a condition is true, and at its 30th until it is let go."""

    def __init__(self, condition):
        self.condition, self.go_on, self._put = condition, threading.Event(), Row.put

    def put(self, row, token):
        if row.decoding.temperature == 2.0 and row.tokens == 2:
            wait_for(self.condition)
        if row.decoding.temperature == 2.0 and row.tokens == 29:
            assert self.go_on.wait(60)
        self._put(row, token)


@pytest.fixture
def hold(monkeypatch):
    held = []

    def hold(condition):
        held.append(Held(condition))
        monkeypatch.setattr(Row, "put", lambda row, token: held[-1].put(row, token))
        return held[-1].go_on

    yield hold
    for one in held:
        one.go_on.set()


def test_prompts_that_join_are_answered_as_if_alone_before_the_batch_ends(server, hold):
    """Four prompts, longer and shorter than what is cached, take turns in the two places beside a longer answer."""
    url, service = server
    sizes = service.metrics.batch_size
    with client_of(url) as ask, ThreadPoolExecutor(5) as pool:
        alone = [ask(**one).choices[0] for one in (RAMBLING, *ASKED)]
        assert alone[0].finish_reason == "length"
        begin = sizes._sum.get()
        go_on = hold(lambda: service.model.waiting == len(ASKED))
        rambling = pool.submit(ask, **RAMBLING)
        wait_for(lambda: sizes._sum.get() == begin + 1)
        joined = [pool.submit(ask, **one) for one in ASKED]
        assert [one.result(60).choices[0] for one in joined] == alone[1:]
        assert not rambling.done()
        go_on.set()
        assert rambling.result(60).choices[0] == alone[0]
    assert service.model.waiting == 0


def test_a_new_video_is_encoded_while_another_answer_is_generated(server, hold):
    url, service = server
    question, sizes = {"messages": about(data_url(clip(4)))}, service.metrics.batch_size
    begin = sizes._sum.get()
    with client_of(url) as ask, ThreadPoolExecutor(2) as pool:
        go_on = hold(lambda: bool(service.model._work))
        rambling = pool.submit(ask, **RAMBLING)
        wait_for(lambda: sizes._sum.get() == begin + 1)
        answer = pool.submit(ask, **question).result(60).choices[0]
        assert not rambling.done()
        go_on.set()
        assert rambling.result(60).choices[0].finish_reason == "length"
        assert ask(**question).choices[0] == answer


def test_prompts_that_fail_when_they_join_leave_the_batch_alone(server, hold, monkeypatch):
    url, service = server
    sizes, make = service.metrics.batch_size, joining.batch_prompts
    with client_of(url) as ask, ThreadPoolExecutor(2) as pool:
        alone = ask(**RAMBLING).choices[0]
        begin = sizes._sum.get()
        go_on = hold(lambda: service.model.waiting == 1)
        rambling = pool.submit(ask, **RAMBLING)
        wait_for(lambda: sizes._sum.get() == begin + 1)

        def fail(*arguments):
            monkeypatch.setattr(joining, "batch_prompts", make)
            raise RuntimeError("not enough memory")

        monkeypatch.setattr(joining, "batch_prompts", fail)
        with pytest.raises(openai.APIError, match="failed to answer"):
            pool.submit(ask, **ASKED[1]).result(60)
        assert not rambling.done()
        go_on.set()
        assert rambling.result(60).choices[0] == alone


def test_a_full_batch_takes_no_more(hold):
    with serving(mini(), batch_size=1) as (url, service):
        with client_of(url) as ask, ThreadPoolExecutor(2) as pool:
            go_on = hold(lambda: service.model.waiting == 1)
            rambling = pool.submit(ask, **RAMBLING)
            wait_for(lambda: service.metrics.batch_size._sum.get() == 1)
            second = pool.submit(ask, **ASKED[1])
            go_on.set()
            assert rambling.result(60) and second.result(60)
        sizes = service.metrics.batch_size
        wait_for(lambda: sizes._sum.get() == sum(bucket.get() for bucket in sizes._buckets) == 2)


class Noted(Row):
    """A row that notes its tokens."""

    def put(self, token):
        self.noted = [*getattr(self, "noted", []), *([token] if self.finish is None else [])]
        super().put(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_can_be_joined(family):
    """Rows begin and end at different times: at each stop some are gone, others come, and columns are cut off."""
    torch.manual_seed(0)
    model, tokenizer = make_chat(family), make_tokenizer()
    settings = family_of(model).generator.generation_config
    settings.min_new_tokens = 5
    assert not can_join(model)  # it counts the tokens of one call
    settings.min_new_tokens = None
    config = model.config.get_text_config(decoder=True)
    assert can_join(model) != config.is_encoder_decoder
    if config.is_encoder_decoder:
        return
    further = {"qformer_tokenizer": tokenizer} if family == "instructblip" else {}
    engine = VideoChat(attach(model, make_branch(model)), tokenizer, **further)
    seen = watch(engine, clip(0), Sampling(4))
    prompts = []
    for text, visuals in (("is it moving ?", []), ("left or right ?", [seen]), ("left or right w20 w30 or left ?", []),
                          ("how ?", [seen]), ("w20", [])):  # fmt: skip
        turn = Turn(text, tuple(visual.kind for visual in visuals))
        ids = conversation_ids(engine.processor, [turn], [len(visual.tokens) for visual in visuals])
        prompts.append((ids, [visual.for_question(text) for visual in visuals]))

    def rows():
        ends = end_tokens(engine.model)
        lengths = (12, 4, 9, 8, 5)
        return [
            Noted(tokenizer, ends, Decoding(n), lambda text: None, lambda row: None, threading.Event()) for n in lengths
        ]

    alone = rows()
    for prompt, row in zip(prompts, alone, strict=True):
        generate_rows(engine.model, tokenizer, [prompt], [row])

    def after(count):
        calls = iter(range(1, 100))
        return lambda: next(calls) >= count

    def begun(prompts, rows):
        batch = OpenBatch(engine.model, tokenizer, prompts, rows)
        assert batch.run(lambda: True)
        return batch

    together = rows()
    batch = OpenBatch(engine.model, tokenizer, prompts[:2], together[:2])
    stopped = batch.run(after(3))
    if stopped:
        batch.add(begun(prompts[2:4], together[2:4]))
        if batch.run(after(3)):
            batch.add(begun(prompts[4:], together[4:]))
            assert not batch.run(lambda: False)
    answered = [(row, one) for row, one in zip(together, alone, strict=True) if row.tokens]
    assert stopped and len(answered) >= 4
    for row, one in answered:
        assert (row.noted, row.finish) == (one.noted, one.finish)
