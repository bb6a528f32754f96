"""A task of the small world under lmms-eval, against this package's own answers: `make test-lmms-eval`.

    python bench/lmms_eval_smoke.py WORK

With the plug-in: both classes, and two processes of torchrun. Over HTTP: lmms-eval's client of OpenAI's API asks
`bt-adapter serve`. The command fails unless every accuracy equals that of our own engine's answers to the same eight
questions. Figures go to bench/results/lmms_eval.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bt_adapter.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "lmms_eval.json"
MODEL, BATCH, SECONDS = "mini:image", 4, 1800
HTTP = "over HTTP from bt-adapter serve"
PLUGIN = ["--model", "bt_adapter", "--model_args", f"pretrained={MODEL},dtype=float32", "--batch_size", str(BATCH)]
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "chat class": (["-m", "lmms_eval"], PLUGIN),
    "simple class": (["-m", "lmms_eval"], [*PLUGIN, "--force_simple"]),
    "two processes": (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lmms_eval"],
        PLUGIN,
    ),
}


def expected() -> float:
    """Return the accuracy of our own engine's answers."""
    from bt_adapter.chat.engine import VideoChat
    from bt_adapter.chat.watch import Sampling, watch
    from bt_adapter.mini import data_folder

    sys.path.insert(0, str(ROOT / "bench" / "lmms_tasks"))
    import utils

    chat = VideoChat.mini("image")
    clips = json.loads((data_folder() / "clips" / "clips.json").read_text(encoding="utf-8"))
    scores = []
    for clip in (one for one in clips if one["question"] == utils.QUESTION):
        conversation = chat.converse()
        conversation.add(watch(chat, utils.visual(clip)[0], Sampling(repeat=True)))
        scores.append(utils.score(clip, [conversation.ask(clip["question"], 16).text])["accuracy"])
    return sum(scores) / len(scores)


def evaluate(name: str, start: Sequence[str], options: Sequence[str], work: Path) -> dict[str, float]:
    """Run lmms-eval. Returns the accuracy, the number of questions, and the seconds of the whole command."""
    out = work / name.replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, *start, *options, "--tasks", "mini_motion", "--include_path", "bench/lmms_tasks",
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hugging-face")}
    offline["OPENAI_API_KEY"] = "none"
    begin = time.perf_counter()
    with (work / f"{out.name}.log").open("w") as log:
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **offline}, stdout=log, stderr=log, timeout=SECONDS
        ).returncode
    seconds = time.perf_counter() - begin
    found = sorted(out.rglob("*results.json"))
    if code or not found:
        raise SystemExit(f"{name}: exit status {code}\n{(work / f'{out.name}.log').read_text()[-3000:]}")
    results = json.loads(found[-1].read_text(encoding="utf-8"))
    return {
        "accuracy": results["results"]["mini_motion"]["accuracy,none"],
        "questions": results["n-samples"]["mini_motion"]["effective"],
        "seconds": seconds,
    }


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """Run `bt-adapter serve` on a free port, which may read this checkout's files; its output goes to WORK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "bt_adapter.commands", "serve", MODEL, "--served-model-name", "mini", "--port", str(port),
        "--dtype", "float32", "--allowed-media-path", str(ROOT),
    ]  # fmt: skip
    with (work / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            end = time.monotonic() + SECONDS
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start:\n{(work / 'server.log').read_text()[-3000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def over_http(work: Path) -> dict[str, float]:
    """Run lmms-eval's own client against a server. Returns as `evaluate`."""
    with serving(work) as url:
        arguments = f"base_url={url},model_version=mini,pass_video_url=True,max_frames_num=8"
        options = ["--model", "openai", "--model_args", arguments, "--batch_size", "1"]
        return evaluate(HTTP, ["-m", "lmms_eval"], options, work)


def main() -> None:
    """Run lmms-eval in every way, compare, and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work: Path = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    truth = expected()
    print(f"our own engine: accuracy {truth}", flush=True)
    figures: dict[str, Any] = {}
    for name in (*RUNS, HTTP):
        figures[name] = over_http(work) if name == HTTP else evaluate(name, *RUNS[name], work)
        print(f"{name}: {figures[name]}", flush=True)
        if figures[name]["accuracy"] != truth:
            raise SystemExit(f"{name}: accuracy {figures[name]['accuracy']}, expected {truth}")
    from importlib.metadata import version

    from measure import facts

    figures["about"] = {**facts("cpu"), "lmms_eval": version("lmms_eval"), "transformers": version("transformers")}
    write_json(RESULTS, figures)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
