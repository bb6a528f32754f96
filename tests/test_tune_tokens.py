"""Training sees the tokens of inference, with tokenizers that cut words: BPE of bytes, BPE and Unigram of Metaspace."""

from __future__ import annotations

import pytest
from test_attach import PATCHES, make_branch, make_chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bt_adapter.chat.attach import attach
from bt_adapter.chat.prompts import Turn, conversation_ids
from bt_adapter.native import make_processor
from bt_adapter.tune.conversations import Exchange, Source, TrainingConversation
from bt_adapter.tune.tokens import IGNORED, Tokens, make_examples

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CORPUS = ["how is it moving ? USER: ASSISTANT: user assistant it is moving left . right red a clip shows a still"] * 9
PLAIN = None  # "USER: … ASSISTANT: …</s>"
SPACE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}{% endif %}{% if m.role == 'assistant' %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
OPEN = SPACE.replace("</s>", " ")  # no token ends an answer
ENDS = ("left", "it is moving left .", "élan →  two spaces", "l")


def make_tokenizer(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    """Trained on a few words; the image token is the one of the small chat model."""
    if kind == "unigram":
        core = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=55, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    else:
        core = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>", byte_fallback=False))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=330 if kind == "bytes" else 55, special_tokens=SPECIAL, initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
    if kind == "bytes":
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chat():
    model = make_chat(0)
    return attach(model, make_branch(model, 3))


def conversation(*pairs: tuple[str, str]) -> TrainingConversation:
    exchanges = tuple(Exchange(q, int(i == 0), a) for i, (q, a) in enumerate(pairs))
    return TrainingConversation("one", exchanges, (Source("clip0.mp4", "video"),))


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "unigram"])
@pytest.mark.parametrize("template", [PLAIN, SPACE, OPEN], ids=["plain", "space", "open"])
@pytest.mark.parametrize("answer", ENDS)
def test_every_answer_is_learned_after_the_prompt_of_inference(chat, kind, template, answer):
    """And its tokens read as the answer does, whatever the tokenizer joins."""
    tokenizer = make_tokenizer(kind, template)
    chat.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor = make_processor(chat, tokenizer)
    pairs = [("how is it moving ?", answer), ("and ?", "right"), ("still ?", answer)]
    turns = [Turn(q, ("video",) if i == 0 else (), a) for i, (q, a) in enumerate(pairs)]
    examples, skipped = make_examples(Tokens(chat, processor), [conversation(*pairs)], 500, False)
    if len(skipped):
        assert kind != "bytes" and "joins the end of the prompt" in skipped.report()
        return
    learned = []
    for number, turn in enumerate(turns):
        prompt = conversation_ids(processor, [*turns[:number], Turn(turn.question, turn.kinds)], [PATCHES + 1])
        example = examples[number if len(examples) > 1 else 0]
        ids, targets = (values.tolist() for values in example.expand())
        assert ids[: len(prompt)] == prompt
        end = next(i for i in range(len(prompt) - 1, len(ids) + 1) if i == len(ids) or targets[i] == IGNORED)
        own = targets[len(prompt) - 1 : end]
        assert own[-1] == tokenizer.eos_token_id and own[:-1] == ids[len(prompt) : len(prompt) + len(own) - 1]
        read = tokenizer.decode(prompt + own[:-1], clean_up_tokenization_spaces=False)
        said = read[len(tokenizer.decode(prompt, clean_up_tokenization_spaces=False)) :]
        shown = answer if kind == "bytes" else tokenizer.decode(tokenizer(turn.answer)["input_ids"])
        assert said.strip() == (turn.answer if kind == "bytes" else shown.strip()), (said, turn.answer)
        learned.append(len(own))
    assert sum(example.answer_tokens for example in examples) == sum(learned)


@pytest.mark.parametrize("template", [PLAIN, SPACE], ids=["one sequence", "one for each answer"])
def test_the_template_runs_once_for_each_answer_and_once_for_the_whole(chat, template, monkeypatch):
    tokenizer = make_tokenizer("bytes", template)
    chat.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor, written = make_processor(chat, tokenizer), []
    write = processor.apply_chat_template
    monkeypatch.setattr(processor, "apply_chat_template", lambda *a, **k: written.append(a) or write(*a, **k))
    pairs = [("how is it moving ?", "left"), ("and ?", "right"), ("still ?", "red"), ("and ?", "a clip")]
    examples = Tokens(chat, processor).examples(conversation(*pairs))
    assert len(written) == len(pairs) + 1 and len(examples) == (1 if template is PLAIN else len(pairs))


def test_a_prompt_that_ends_in_a_space_keeps_its_tokens(chat):
    """Byte-level BPE would join that space and the answer's first word."""
    tokenizer = make_tokenizer("bytes", SPACE)
    chat.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor = make_processor(chat, tokenizer)
    assert len(tokenizer(" left")["input_ids"]) == 1
    example = Tokens(chat, processor).example(conversation(("how is it moving ?", "left")))
    ids = example.expand()[0].tolist()
    prompt = conversation_ids(processor, [Turn("how is it moving ?", ("video",))], [PATCHES + 1])
    assert ids[: len(prompt)] == prompt and tokenizer.convert_ids_to_tokens(prompt[-1]) == "Ġ"
    assert tokenizer.decode(ids[len(prompt) :]) == "left </s>"  # this template writes a space after each text
    two = Tokens(chat, processor).examples(conversation(("how ?", "left"), ("and ?", "right")))
    assert [example.key for example in two] == ["one, answer 1", "one, answer 2"]
