"""The page's components, and which callback each of them calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.image_editor import WebcamOptions

from bt_adapter.mini import MiniError, data_folder
from bt_adapter.model.time_steps import PRETRAINED_STEPS
from bt_adapter.page.callbacks import LONGEST_QUESTION, LiveCallbacks, OpenTalks, VideoCallbacks, stop
from bt_adapter.page.talk import Talk
from bt_adapter.serve.live import LiveSessions
from bt_adapter.serve.service import Service

# Motion to the left must not become motion to the right.
_NOT_MIRRORED: dict[str, Any] = {"mirror": False}
_CAMERA = WebcamOptions(**_NOT_MIRRORED, constraints={"video": {"width": 320, "height": 240}})
_FRAME_SECONDS = 0.1  # between frames of the live camera
_LIVE_SECONDS = 600.0  # after which a camera is started anew
_ALWAYS: Any = "multiple"  # a question during an answer is told to wait; gradio's default drops it without a word
_CACHE_SECONDS = 3600  # uploaded files are deleted when they are older


def build(service: Service, sessions: LiveSessions) -> gr.Blocks:
    """Build the page of a service and its live sessions."""
    open_talks = OpenTalks()
    with gr.Blocks(title="BT-Adapter", analytics_enabled=False, delete_cache=(_CACHE_SECONDS, _CACHE_SECONDS)) as page:
        gr.Markdown(
            f"# {service.options.name}\nQuestions about videos, answered by a chat model with a BT-Adapter branch."
        )
        with gr.Tab("Clip"):
            _build_clip(service, open_talks)
        # LiveVideo takes no other models
        if sessions.limits.live_sessions and len(service.chat.family.feature_layers) == 1:
            with gr.Tab("Live camera"):
                _build_live(sessions, open_talks)
        page.unload(open_talks.leave)
    _refuse_addresses(page)
    return page


def most_frames(service: Service) -> int:
    """Return the slider's upper end: as many frames as the branch was trained with, or the server's default."""
    config, options = service.chat.branch.config, service.options
    trained = config.trained_steps or min(PRETRAINED_STEPS, config.max_frames)
    return min(max(trained, options.sampling.frames), options.limits.frames)


def example_clips() -> list[tuple[Path, str, str]]:
    """List the demo clips with a question and a label each; none where they are not installed."""
    try:
        folder = data_folder() / "clips"
    except MiniError:
        return []
    clips = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    return [(folder / clip["file"], clip["question"], clip["truth"]) for clip in clips]


def _build_clip(service: Service, open_talks: OpenTalks) -> None:
    calls, sampling = VideoCallbacks(service, open_talks), service.options.sampling
    talk = _state(Talk())
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            video = gr.Video(
                label="Video", sources=["upload", "webcam"], height=330, webcam_options=WebcamOptions(**_NOT_MIRRORED),
                elem_id="video",
            )  # fmt: skip
            stills = gr.File(
                label="Stills beside it (added to the next question)", file_count="multiple", file_types=["image"],
                height=150, elem_id="stills",
            )  # fmt: skip
            at_most = "Most frames" if sampling.fps is not None else "Frames"
            frames = gr.Slider(1, most_frames(service), sampling.frames, step=1, label=at_most, elem_id="frames")
            compare = gr.Checkbox(
                label="Compare with the branch switched off", visible=sampling.branch, elem_id="compare"
            )
        with gr.Column(scale=3, min_width=400):
            with gr.Row():
                with gr.Column(min_width=200):
                    first = _chat("With the branch" if sampling.branch else "Without the branch", "chat-0")
                    first_line = _line("line-0")
                with gr.Column(min_width=200, visible=False) as column:
                    second = _chat("Without the branch", "chat-1")
                    second_line = _line("line-1")
            question, ask, stopping = _question("question")
            new = gr.Button("New conversation", size="sm", elem_id="new")
    gallery = gr.Gallery(
        label="Frames that were seen, as the model sees them", columns=8, height=180, object_fit="contain",
        interactive=False, buttons=[], elem_id="gallery",
    )  # fmt: skip
    if clips := example_clips():
        gr.Examples(
            [[str(path), text] for path, text, _ in clips], [video, question],
            example_labels=[label for *_, label in clips], label="Examples", api_visibility="private",
            elem_id="examples",
        )  # fmt: skip
    outputs = [first, second, first_line, second_line, gallery, question, stopping, talk]
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on(
        [ask.click, question.submit], calls.ask, [question, video, stills, frames, compare, talk], outputs,
        concurrency_limit=service.options.limits.waiting, trigger_mode=_ALWAYS, **hidden,
    )  # fmt: skip
    gr.on([new.click, first.clear, second.clear], calls.clear, [video, talk], outputs, queue=False, **hidden)
    stopping.click(stop, talk, None, queue=False, **hidden)
    video.change(calls.choose, [video, talk], outputs, queue=False, **hidden)
    compare.change(lambda shown: gr.Column(visible=shown), compare, column, queue=False, **hidden)


def _build_live(sessions: LiveSessions, open_talks: OpenTalks) -> None:
    calls, limits = LiveCallbacks(sessions, open_talks), sessions.limits
    talk = _state(None)
    with gr.Row():
        with gr.Column():
            camera = gr.Image(
                label="Camera", sources=["webcam"], streaming=True, format="jpeg", image_mode=None,
                webcam_options=_CAMERA, elem_id="camera",
            )  # fmt: skip
            camera.preprocess = _data_url  # type: ignore[method-assign]
            seen = _line("live-frames")
        with gr.Column():
            answer = gr.Textbox(label="Answer", interactive=False, elem_id="live-answer")
            line = _line("live-line")
            question, ask, stopping = _question("live-question")
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    camera.stream(
        calls.push, [camera, talk], [seen, talk], stream_every=_FRAME_SECONDS, time_limit=_LIVE_SECONDS,
        concurrency_limit=limits.live_sessions, **hidden,
    )  # fmt: skip
    gr.on(
        [ask.click, question.submit], calls.ask, [question, talk], [answer, line, stopping],
        concurrency_limit=limits.waiting, trigger_mode=_ALWAYS, **hidden,
    )  # fmt: skip
    stopping.click(stop, talk, None, queue=False, **hidden)


def _state(value: Any) -> gr.State:
    """Keep a value for each browser's page. A function to delete it would show its address to the browser: a type."""
    return gr.State(value, time_to_live=_CACHE_SECONDS, delete_callback=type)  # type: ignore[arg-type]


def _chat(label: str, name: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=label, height=330, elem_id=name, render_markdown=False, feedback_options=None, buttons=["copy"],
        allow_file_downloads=False,
    )  # fmt: skip


def _line(name: str) -> gr.Textbox:
    return gr.Textbox(show_label=False, container=False, interactive=False, max_lines=3, elem_id=name)


def _question(name: str) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """Add a field for a question and the buttons to ask it and to stop the answer, which works once there is one."""
    question = gr.Textbox(label="Question", placeholder="How is it moving?", max_length=LONGEST_QUESTION, elem_id=name)
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id=f"{name}-ask")
        stopping = gr.Button("Stop", variant="stop", interactive=False, elem_id=f"{name}-stop")
    return question, ask, stopping


def _data_url(payload: Any) -> str | None:
    """Return a camera's frame as the browser sent it; the service's own reader decodes it within its limits."""
    return None if payload is None else payload.url


def _refuse_addresses(page: gr.Blocks) -> None:
    """Let no component download the address that a client sends in place of an uploaded file's path."""
    for block in page.blocks.values():
        move = block.async_move_resource_to_block_cache
        block.async_move_resource_to_block_cache = _local_only(move)  # type: ignore[method-assign]


def _local_only(move: Any) -> Any:
    async def checked(path: Any) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("addresses are not fetched: upload the file", print_exception=False)
        return await move(path)

    return checked
