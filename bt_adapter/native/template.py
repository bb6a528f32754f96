"""Chat templates that place videos beside stills."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

# Vicuna's words, for models whose folder brings no template; visuals where they stand in a message.
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

# Every part that is a visual is noted and given to the inner template in a form that it knows: PART, or, where it
# knows text alone, a line of text in one string.
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
# In the inner template's text the k-th image token stands for the k-th visual.
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
    """A chat template that takes parts ``{"type": "video"}`` beside ``{"type": "image"}``.

    It is the tokenizer's own where that has the video's token. Any other is wrapped: it writes an image token for every
    visual, and those of videos become the video's token afterwards. A template that knows text alone is given the
    parts of a message as lines of one text. Without a template, Vicuna's words are taken.

    Args:
        tokenizer: with the image chat model's own ``chat_template``, or none.
        image_token, video_token: what stands for a still and for a video in the text.
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
        except (TypeError, TemplateError):  # it knows text alone, or refuses what it does not know
            continue
        if text.count(image_token) == 1:
            return _wrap(template, image_token, video_token, f"{{'type': '{part}'}}", text_alone=False)
    return _wrap(template, image_token, video_token, "{'type': 'image'}", text_alone=True)


def _wrap(template: str, image_token: str, video_token: str, part: str, text_alone: bool) -> str:
    def filled(text: str) -> str:
        content = "one.lines | join('\\n')" if text_alone else "one.parts"
        text = text.replace("CONTENT", content).replace("PART", part)
        return text.replace("IMAGE", repr(image_token)).replace("VIDEO", repr(video_token))

    return filled(_BEFORE) + template.removesuffix("\n") + filled(_AFTER)  # as Jinja itself ends a template
