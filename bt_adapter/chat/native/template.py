"""Chat templates for conversations with videos and stills."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

# Vicuna's prompt, for models without a template; visuals keep their positions in a message.
_PLAIN = """\
{%- for message in messages -%}
  {%- set text = message['content'] | trim -%}
  {%- if message['role'] == 'user' -%}{{- 'USER: ' + text -}}
  {%- elif message['role'] == 'assistant' -%}{{- ' ASSISTANT: ' + text + (eos_token or '') -}}
  {%- else -%}{{- text + ' ' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""

# The kind of each visual is recorded, and the inner template gets the visual in a form that it supports: PART or, if it
# supports only text, a line of text in one string.
_BEFORE = """\
{%- set visual = namespace(kinds=[], messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or not message['content'] -%}
    {%- set visual.messages = visual.messages + [message] -%}
  {%- else -%}
    {%- set one = namespace(parts=[], lines=[]) -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'video' -%}
        {%- set visual.kinds = visual.kinds + [VIDEO] -%}
        {%- set one.parts = one.parts + [PART] -%}
        {%- set one.lines = one.lines + [IMAGE] -%}
      {%- elif part['type'] == 'image' -%}
        {%- set visual.kinds = visual.kinds + [IMAGE] -%}
        {%- set one.parts = one.parts + [part] -%}
        {%- set one.lines = one.lines + [IMAGE] -%}
      {%- else -%}
        {%- set one.parts = one.parts + [part] -%}
        {%- set one.lines = one.lines + [part['text'] | trim] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set visual.messages = visual.messages + [dict(message, content=CONTENT)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = visual.messages -%}
{%- set rendered %}"""
# The k-th image token in the inner template's text belongs to the k-th visual.
_AFTER = """{% endset -%}
{%- set pieces = rendered.split(IMAGE) -%}
{%- if pieces | length != visual.kinds | length + 1 -%}
  {{- raise_exception('the chat template wrote ' ~ (pieces | length - 1) ~ ' image tokens ' ~ IMAGE ~ ' for '
      ~ (visual.kinds | length) ~ ' stills and videos: a text holds that token, or the template leaves visuals out') -}}
{%- endif -%}
{{- pieces[0] -}}
{%- for piece in pieces[1:] -%}{{- visual.kinds[loop.index0] + piece -}}{%- endfor -%}
"""


def with_videos(tokenizer: Any, image_token: str, video_token: str) -> str:
    """Make a chat template that accepts parts ``{"type": "video"}`` as well as ``{"type": "image"}``.

    The tokenizer's template is returned unchanged if it contains the video token. Otherwise it is wrapped: it writes an
    image token for every visual, and those of videos are replaced by the video token. A template that supports only
    text gets the parts of a message as lines of one text. Without a template, Vicuna's prompt is used.

    Args:
        tokenizer: with or without the image chat model's ``chat_template``.
        image_token, video_token: the text of a still's and a video's token.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return _wrap(_PLAIN, image_token, video_token, "{'type': 'image'}", text_alone=True)
    if video_token in template:
        return template
    for part in ("video", "image"):
        parts = [{"type": part}, {"type": "text", "text": "?"}]
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        except (TypeError, TemplateError):  # it supports only text, or refuses this kind of part
            continue
        if text.count(image_token) == 1:
            return _wrap(template, image_token, video_token, f"{{'type': '{part}'}}", text_alone=False)
    return _wrap(template, image_token, video_token, "{'type': 'image'}", text_alone=True)


def _wrap(template: str, image_token: str, video_token: str, part: str, text_alone: bool) -> str:
    def filled(text: str) -> str:
        content = "one.lines | join('\\n')" if text_alone else "one.parts"
        text = text.replace("CONTENT", content).replace("PART", part)
        return text.replace("IMAGE", repr(image_token)).replace("VIDEO", repr(video_token))

    return filled(_BEFORE) + template.removesuffix("\n") + filled(_AFTER)  # Jinja itself removes a final newline


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize the text of a chat template; special tokens are not added if it begins with the BOS token."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
