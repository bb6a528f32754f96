"""Prompts with the right number of visual tokens: P for a still image, P+1 for a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaForConditionalGeneration

# for tokenizers that bring no chat template: the first LLaVA's
_VICUNA = "USER: {visual}\n{question} ASSISTANT:"


def patches(chat: LlavaForConditionalGeneration) -> int:
    """P, the patch tokens of one image or frame."""
    vision: Any = chat.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def video_length(chat: LlavaForConditionalGeneration) -> int:
    """P+1, the tokens of one video, whatever its number of frames."""
    return patches(chat) + 1


def image_token(chat: LlavaForConditionalGeneration, tokenizer: Any) -> str:
    """The text of the chat model's image token. Raises ValueError when the tokenizer does not know it."""
    text = tokenizer.convert_ids_to_tokens(chat.config.image_token_id)
    if text is None:
        raise ValueError(f"tokenizer has no token {chat.config.image_token_id}, the chat model's image token")
    return text


def expand(text: str, token: str, lengths: Sequence[int]) -> str:
    """Replace the i-th image token in a prompt by lengths[i] of them.

    Raises ValueError when the prompt holds another number of image tokens than there are lengths.
    """
    pieces = text.split(token)
    if len(pieces) - 1 != len(lengths):
        raise ValueError(f"text holds {len(pieces) - 1} image tokens ({token!r}), but lengths names {len(lengths)}")
    return pieces[0] + "".join(token * n + piece for n, piece in zip(lengths, pieces[1:], strict=True))


def prompt_text(chat: LlavaForConditionalGeneration, tokenizer: Any, question: str) -> str:
    """One question about one image or video as the model's chat template has it, with a single image token."""
    token = image_token(chat, tokenizer)
    if token in question:
        raise ValueError(f"question holds the image token {token!r}; expected plain text")
    if not getattr(tokenizer, "chat_template", None):
        return _VICUNA.format(visual=token, question=question)
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if text.count(token) != 1:  # a template for text alone
        content = f"{token}\n{question}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    return text


def video_prompt(chat: LlavaForConditionalGeneration, tokenizer: Any, question: str, videos: int = 1) -> Any:
    """Token ids of the same question about each of `videos` videos, ``[videos, S]``, with P+1 image tokens each.

    Goes with ``pixel_values [videos, T, 3, h, w]`` into ``chat.generate``.
    """
    return _tokenize(
        tokenizer, prompt_text(chat, tokenizer, question), image_token(chat, tokenizer), video_length(chat), videos
    )


def image_prompt(chat: LlavaForConditionalGeneration, tokenizer: Any, question: str, images: int = 1) -> Any:
    """The same for still images, with P image tokens each (models that take the CLS token too are not handled)."""
    return _tokenize(
        tokenizer, prompt_text(chat, tokenizer, question), image_token(chat, tokenizer), patches(chat), images
    )


def _tokenize(tokenizer: Any, text: str, token: str, length: int, count: int) -> Any:
    text = expand(text, token, [length])
    special = not text.startswith(tokenizer.bos_token or "\0")  # templates that write the opening token themselves
    return tokenizer([text] * count, return_tensors="pt", add_special_tokens=special)
