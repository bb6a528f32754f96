"""Chat templates that place videos beside stills."""

from __future__ import annotations

# For models whose folder brings no template: Vicuna's words, visuals where they stand in a message.
PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- ' ASSISTANT: ' -}}"
    "{%- elif message['role'] == 'user' -%}{{- ('' if loop.first else ' ') + 'USER: ' -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- else -%}{{- '<' + part['type'] + '>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
)

_BEFORE = """\
{%- set visual = namespace(kinds=[], messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or not message['content'] -%}
    {%- set visual.messages = visual.messages + [message] -%}
  {%- else -%}
    {%- set one = namespace(parts=[]) -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'video' -%}
        {%- set visual.kinds = visual.kinds + [VIDEO] -%}
        {%- set one.parts = one.parts + [{'type': 'image'}] -%}
      {%- else -%}
        {%- if part['type'] == 'image' -%}{%- set visual.kinds = visual.kinds + [IMAGE] -%}{%- endif -%}
        {%- set one.parts = one.parts + [part] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set visual.messages = visual.messages + [dict(message, content=one.parts)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = visual.messages -%}
{%- set rendered -%}
"""
_AFTER = """\
{%- endset -%}
{%- set pieces = rendered.split(IMAGE) -%}
{%- if pieces | length != visual.kinds | length + 1 -%}
  {{- raise_exception('the text of a message holds the image token ' + IMAGE) -}}
{%- endif -%}
{{- pieces[0] -}}
{%- for piece in pieces[1:] -%}{{- visual.kinds[loop.index0] + piece -}}{%- endfor -%}
"""


def with_videos(template: str | None, image_token: str, video_token: str) -> str:
    """A chat template that takes parts ``{"type": "video"}`` beside ``{"type": "image"}``.

    A template that knows stills alone is wrapped: it writes every video as a still, and the places of videos get the
    video's token afterwards. A template that has the video's token already is left as it is.

    Args:
        template: the image chat model's own template, None where it has none.
        image_token, video_token: what stands for a still and for a video in the text.
    """
    if template is None:
        return PLAIN.replace(
            "'<' + part['type'] + '>\\n'", f"({video_token!r} if part['type'] == 'video' else {image_token!r}) + '\\n'"
        )
    if video_token in template:
        return template
    before, after = (
        part.replace("IMAGE", repr(image_token)).replace("VIDEO", repr(video_token)) for part in (_BEFORE, _AFTER)
    )
    return f"{before}{{#- #}}{template}{after}"
