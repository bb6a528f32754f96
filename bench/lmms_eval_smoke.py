"""A task of the small world under lmms-eval, against this package's own answers: `make test-lmms-eval`.

    python bench/lmms_eval_smoke.py WORK              with the plug-in: both classes, and two processes of torchrun
    python bench/lmms_eval_smoke.py WORK --url URL    with lmms-eval's client of an OpenAI server, such as vLLM's

The command fails unless every accuracy equals that of our own engine's answers to the same eight questions. Run from
the root of a checkout; figures go to bench/results/lmms_eval.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_adapter.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "lmms_eval.json"
MODEL, BATCH, SECONDS = "mini:image", 4, 900
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


def over_http(url: str, model: str) -> tuple[list[str], list[str]]:
    """Return the command of lmms-eval's client for a server that reads this checkout's files."""
    arguments = f"base_url={url},model_version={model},pass_video_url=True,max_frames_num=8"
    return ["-m", "lmms_eval"], ["--model", "openai", "--model_args", arguments, "--batch_size", "1"]


def main() -> None:
    """Run lmms-eval in every way, compare, and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--url", help="address of an OpenAI server, up to /v1")
    parser.add_argument("--served", default="mini", help="name of the model on that server")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    runs = RUNS if options.url is None else {"over HTTP": over_http(options.url, options.served)}
    truth = expected()
    print(f"our own engine: accuracy {truth}", flush=True)
    figures: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (start, more) in runs.items():
        figures[name] = evaluate(name, start, more, work)
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
