"""Join a CLIP, SmolLM2 and a fresh projector to a LLaVA's folder: ``python bench/miniature/fresh.py CLIP OUT``.

The image chat stage begins with it. Its ``about.json`` is the CLIP's, so that what it has seen can be read from it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, LlavaProcessor

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from bt_adapter.files import replace_folder  # noqa: E402
from bt_adapter.mini.clip import load_clip  # noqa: E402
from bt_adapter.mini.language import load_language_model  # noqa: E402
from bt_adapter.mini.llava import IMAGE_TOKEN, make_llava  # noqa: E402


def write(clip: Path, out: Path, seed: int) -> None:
    """Write the folder, which appears when it is whole."""
    torch.manual_seed(seed)
    model, tokenizer = make_llava(load_clip(clip)[0], *load_language_model())
    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    aside = out.with_name(f"{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=side), tokenizer,
        patch_size=vision.patch_size, vision_feature_select_strategy="default", image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    ).save_pretrained(aside)  # fmt: skip
    shutil.copy(clip / "about.json", aside / "about.json")
    replace_folder(aside, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the projector")
    options = parser.parse_args()
    write(options.clip, options.out, options.seed)
