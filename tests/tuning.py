"""A small tuning run for the tests: a LLaVA of random weights, a word-level tokenizer with a template, moving clips."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from test_attach import IMAGE_TOKEN, make_branch, make_chat
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bt_adapter.chat.attach import attach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.data import write_video
from bt_adapter.tune.recipe import TuneRecipe

WORDS = "how is it moving what colour ? . left right up down red green blue user assistant the a clip shows still and"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} "
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
ANSWERS = ("it is moving left .", "it is moving right .", "it is moving up .", "it is moving down .")
SMALL = {
    "frames": 4, "batch_size": 4, "workers": 0, "lr": 5e-3, "dtype": "float32", "lora_r": 4, "lora_dropout": 0.0,
    "device": "cpu", "model": "no/such/tiny/chat", "branch": "no/such/tiny/branch",
}  # fmt: skip


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0} | {word: number for number, word in enumerate(WORDS.split(), 1)}
    assert len(vocabulary) < IMAGE_TOKEN
    # no gap in the ids: a token that is added gets the next one, and the same again when the tokenizer is loaded
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), IMAGE_TOKEN)}
    vocabulary |= {"<image>": IMAGE_TOKEN, "<s>": 61, "<pad>": 62, "</s>": 63}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.?]"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def make_video_chat(seed: int = 0, depth: int = 3) -> VideoChat:
    """The same for the same seed, as a loaded model would be."""
    chat = make_chat(seed)
    torch.nn.init.normal_(chat.lm_head.weight, std=0.5)  # or no answer can become likely while the head is frozen
    with torch.no_grad():
        for parameter in chat.model.multi_modal_projector.parameters():
            parameter *= 10  # or 60 steps do not make the clips tell
    return VideoChat(attach(chat, make_branch(chat, depth)), make_tokenizer())


def write_clips(folder: Path, count: int = 4, broken: tuple[int, ...] = ()) -> None:
    """clip0.mp4 …: a bright bar that moves left, right, up or down; those in ``broken`` without a video in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        frames = torch.full((5, 3, 24, 24), 40, dtype=torch.uint8)
        for t in range(5):
            place = 4 * (t if number % 2 else 4 - t)
            bar = (slice(None), slice(place, place + 6))
            frames[(t, slice(None), *(bar if number % 4 < 2 else bar[::-1]))] = 220 - 10 * number
        path = folder / f"clip{number}.mp4"
        if number in broken:
            path.write_bytes(b"no video " * 20)
        else:
            write_video(path, frames)


def write_still(path: Path) -> None:
    """A picture of 32 x 24 pixels, grey with a bright corner, in the format that the suffix names."""
    from PIL import Image

    pixels = torch.full((24, 32, 3), 80, dtype=torch.uint8)
    pixels[:12, :16] = 220
    Image.fromarray(pixels.numpy()).save(path)


def write_data(folder: Path, count: int = 4, broken: tuple[int, ...] = ()) -> Path:
    """Clips, and a question about each as VideoInstruct has them; returns the list."""
    write_clips(folder, count, broken)
    rows = [
        {"q": "how is it moving ?", "a": ANSWERS[number % 4], "video_id": f"clip{number}"} for number in range(count)
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def recipe(**changes) -> TuneRecipe:
    """A recipe of seconds."""
    return TuneRecipe(**{**SMALL, **changes})


def losses(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and length of the gradient of every line of a run's log."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
