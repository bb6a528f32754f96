"""The mini stack's word-level tokenizer, made from the scenes' own words; ``clip.py`` saves it with the weights."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .items import ITEMS
from .scenes import COLOURS, MOTIONS, TEMPLATES, caption

CONTEXT = 16
SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")  # the end must not be number 2, which CLIPTextModel treats as unset


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is every word a caption can hold; sequences are [BOS] words [EOS]."""
    words = sorted(
        {
            word
            for template in TEMPLATES
            for item in range(len(ITEMS))
            for colour in range(len(COLOURS))
            for motion in range(-1, len(MOTIONS))
            for word in caption((item, colour, motion), template).split()
        }
        | {"an", "is", "video", "clip", "and", ".", ",", "?"}
    )
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,?!]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=CONTEXT,
        padding_side="right",
    )
