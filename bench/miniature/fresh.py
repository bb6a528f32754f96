"""Join a CLIP, SmolLM2 and a projector to a LLaVA's folder: ``python bench/miniature/fresh.py CLIP OUT``.

The image chat stage begins with it. The projector starts where words lie, so that the language model's adapters learn
to read it in minutes: a linear map, fitted in closed form, takes an image token into CLIP's shared space, and a point
of that space to the word embeddings of the caption that lies there. No image is paired with its caption or label for
this: the first half is fitted to unlabelled stills, the second to captions alone.

``about.json`` is the CLIP's, so that what it has seen can be read from it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, LlavaProcessor, PreTrainedTokenizerBase

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from miniature.clip import draw_stills, make_clip, text_embeddings  # noqa: E402
from miniature.items import ITEMS, load_items  # noqa: E402
from miniature.probes import ridge  # noqa: E402
from miniature.world import COLOURS, EVENTS, SINGLE, SIZE, caption  # noqa: E402

from bt_adapter.data.image_settings import ImageSettings  # noqa: E402
from bt_adapter.files import remove_unfinished, writing  # noqa: E402
from bt_adapter.mini.language import load_language_model  # noqa: E402
from bt_adapter.mini.llava import IMAGE_TOKEN, make_llava  # noqa: E402

STILLS = 1500


@torch.no_grad()
def start_projector(model: Any, clip: CLIPModel, clip_tokenizer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the map from image tokens to word embeddings into a LLaVA's two-layer projector.

    A linear map of rank r is exact in an MLP with GELU: gelu(u) - gelu(-u) = u, with 2r hidden units. Those that are
    left keep a tenth of their random weights. The output gets the size of word embeddings.
    """
    projector, table = model.model.multi_modal_projector, model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    pixels = ImageSettings(SIZE).normalise(draw_stills(load_items("train"), STILLS, generator)[0])
    parts = (clip.vision_model(part, output_hidden_states=True) for part in pixels.split(250))
    tokens = torch.cat([part.hidden_states[-2][:, 1:] for part in parts])
    mean = tokens.mean(1)
    shared = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(mean)), dim=-1)
    to_shared = _least_squares(mean, shared, (1e-3 * (mean - mean.mean(0)).var()).double())

    labels = [(i, c, e) for i in range(len(ITEMS)) for c in range(len(COLOURS)) for e in (-1, *SINGLE)]
    captions = F.normalize(text_embeddings(clip, clip_tokenizer, [caption(*label) for label in labels]), dim=-1)
    words = torch.stack([_word_embeddings(table, tokenizer, label) for label in labels])
    to_words = _least_squares(captions, words, 1e-4)

    left, sizes, right = torch.linalg.svd(to_shared @ to_words, full_matrices=False)
    rank, centre, size = len(sizes), mean.mean(0), table.std()
    hidden = (left / ((tokens - centre) @ left).std((0, 1))).T  # [r, D], hidden values of size 1
    out = right.T * (sizes * ((tokens - centre) @ left).std((0, 1)))  # [W, r]
    out *= size / ((tokens - centre) @ hidden.T @ out.T).std()
    first, second = projector.linear_1, projector.linear_2
    first.weight /= first(tokens).std()
    second.weight *= 0.1 * size / second(F.gelu(first(tokens))).std()
    for sign, units in ((1, slice(0, rank)), (-1, slice(rank, 2 * rank))):
        first.weight[units], first.bias[units] = sign * hidden, -sign * hidden @ centre
        second.weight[:, units] = sign * out


def _word_embeddings(table: Tensor, tokenizer: PreTrainedTokenizerBase, label: tuple[int, int, int]) -> Tensor:
    """The sum over what a label names of the mean embedding of its words' tokens, [W]."""
    item, colour, event = label
    named = [ITEMS[item], COLOURS[colour], *([EVENTS[event].phrase] if event >= 0 else [])]
    ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in named]
    return torch.stack([table[own].mean(0) for own in ids]).sum(0)


def _least_squares(x: Tensor, y: Tensor, strength: float | Tensor) -> Tensor:
    """The matrix [a, b] that takes centred ``x`` [n, a] to centred ``y`` [n, b], by ridge regression."""
    x, y = (value.double() - value.double().mean(0) for value in (x, y))
    return ridge(x, y, strength).float()


def write(clip_folder: Path, out: Path) -> None:
    """Write the folder, which appears when it is whole."""
    torch.manual_seed(0)
    clip_tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    clip = make_clip(clip_tokenizer).eval()
    clip.load_state_dict(load_file(clip_folder / "model.safetensors"))
    model, tokenizer = make_llava(clip, *load_language_model())
    start_projector(model, clip, clip_tokenizer, tokenizer)
    vision = model.config.vision_config
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=vision.patch_size, vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN, num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    remove_unfinished(out.parent, out.name)
    with writing(out) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        shutil.copy(clip_folder / "about.json", aside)


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
