"""The first LLaVA's tokens and prompt (``vicuna_v1_1``), for Hugging Face's tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLACE = "<vid_patch>"  # stands where a visual token goes, of a still or a video
VIDEO_ENDS = ("<vid_start>", "<vid_end>")
IMAGE_ENDS = ("<im_start>", "<im_end>")
# in the order in which the published code adds them, so that rows of published embeddings fit
ADDED = (PLACE, *VIDEO_ENDS)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# A visual before the question is followed by a line end, one after it preceded; each between its two tokens.
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
    """Add the tokens it lacks, and the chat template. Returns those added, in order."""
    known = tokenizer.get_vocab()
    added = tuple(token for token in ADDED if token not in known)
    tokenizer.add_tokens(list(added), special_tokens=True)
    ends = IMAGE_ENDS if all(end in known for end in IMAGE_ENDS) else VIDEO_ENDS
    image, video = (repr(f"{first}{PLACE}{last}") for first, last in (ends, VIDEO_ENDS))
    text = _TEMPLATE.replace("SYSTEM", repr(SYSTEM)).replace("VIDEO", video).replace("IMAGE", image)
    tokenizer.chat_template = text
    return added


def grow(table: Tensor, tokenizer: Any) -> Tensor:
    """An embedding or output table ``[rows, W]`` with a row for every token.

    A token the table has no row for starts as the published code has it in training, at the mean of all; but an end
    of a video where the table knows the ends of an image, as that: a model that has seen no video reads both alike.
    """
    rows, names = len(table), tokenizer.convert_ids_to_tokens(list(range(len(table), len(tokenizer))))
    new = []
    for name in names:
        like = tokenizer.get_vocab().get(dict(zip(VIDEO_ENDS, IMAGE_ENDS, strict=True)).get(name, ""), rows)
        new.append(table[like] if like < rows else table.float().mean(0).to(table.dtype))
    return torch.cat([table, torch.stack(new)]) if new else table
