"""The special tokens and prompt of the first LLaVA (``vicuna_v1_1``), for Hugging Face's tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLACE = "<vid_patch>"  # placeholder of one visual token of a still or a video
VIDEO_ENDS = ("<vid_start>", "<vid_end>")
IMAGE_ENDS = ("<im_start>", "<im_end>")
# in the order of the published code, so that the rows of published embeddings match
ADDED = (PLACE, *VIDEO_ENDS)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# A newline separates a visual from the question; each visual stands between its start and end token.
_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']"
    " -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set system = SYSTEM -%}{%- endif -%}"
    "{{- system + ' ' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{- '' if loop.first else '\\n' -}}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'video' -%}{{- VIDEO -}}"
    "{%- else -%}{{- IMAGE -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- ' ' -}}"
    "{%- else -%}"
    "{{- 'ASSISTANT: ' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def prepare_tokenizer(tokenizer: Any) -> tuple[str, ...]:
    """Add the missing special tokens and the chat template. Returns the added tokens, in order."""
    known = tokenizer.get_vocab()
    added = tuple(token for token in ADDED if token not in known)
    tokenizer.add_tokens(list(added), special_tokens=True)
    ends = IMAGE_ENDS if all(end in known for end in IMAGE_ENDS) else VIDEO_ENDS
    image, video = (repr(f"{first}{PLACE}{last}") for first, last in (ends, VIDEO_ENDS))
    text = _TEMPLATE.replace("SYSTEM", repr(SYSTEM)).replace("VIDEO", video).replace("IMAGE", image)
    tokenizer.chat_template = text
    return added


def grow(table: Tensor, tokenizer: Any) -> Tensor:
    """Extend an embedding or output table ``[rows, W]`` to one row per token.

    A new row is the mean of all rows, as in the published training. The start and end tokens of a video copy those of
    an image if the table has them, because a model that has seen no video should treat both alike.
    """
    rows, names = len(table), tokenizer.convert_ids_to_tokens(list(range(len(table), len(tokenizer))))
    new = []
    for name in names:
        like = tokenizer.get_vocab().get(dict(zip(VIDEO_ENDS, IMAGE_ENDS, strict=True)).get(name, ""), rows)
        new.append(table[like] if like < rows else table.float().mean(0).to(table.dtype))
    return torch.cat([table, torch.stack(new)]) if new else table
