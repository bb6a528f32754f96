"""Load and faults of ``bt-adapter serve`` with the small stack.

    python bench/serve_load.py                           everything, to bench/results/serve-cpu.json
    python bench/serve_load.py --only load --requests 60 --clients 1 8

Five parts, each with a server of its own in another process, on a free port of the loopback interface:

- load: mixed requests (new and known videos, stills, text; whole and streamed) by 1, 4 and 16 clients at once, batched,
  and by the most clients with one answer at a time: requests per second, median and 95th percentile of their times, the
  time to the first piece of streamed text, and the server's own CPU seconds per request, which other work on the
  machine does not change.
- lengths: the same by the most clients, with answers of very different lengths, which others join.
- threads: one answer at a time by one and two threads, which wait passively or busily, on the machine as it is.
- hostile: requests that a server must refuse or survive, see ``serve_hostile.py``. No answer may be a 500 or tell a
  path or address, and the server's memory must stay flat.
- kill: the server is killed while it streams. Every client must get an error, and no process may be left.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
from measure import ROOT, facts
from PIL import Image

from bt_adapter.data import read_video
from bt_adapter.files import write_json
from bt_adapter.mini import data_folder

PARTS = ("threads", "load", "lengths", "hostile", "kill")
CLIENTS = (1, 4, 16)
QUESTIONS = ("How is it moving?", "What is it?", "What colour is it?", "Is it moving left?")
TOKENS = 12  # of an answer at most
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Server:
    """A running server: its address and process."""

    url: str
    process: subprocess.Popen[str]

    @property
    def memory(self) -> float:
        """Resident memory in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    @property
    def cpu(self) -> float:
        """CPU seconds used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def group(self) -> list[int]:
        """The processes of the server's group that still exist."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.Error):
                continue
        return found


@contextmanager
def started(*options: str, waiting: str = "PASSIVE") -> Iterator[Server]:
    """Start ``bt-adapter serve`` with these options, and end it with the context. waiting: of OpenMP's idle threads."""
    command = [sys.executable, "-m", "bt_adapter.commands", "serve", "--no-page", "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": waiting}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        url = next((line for line in process.stderr if line.startswith("serving ")), None)
        if url is None:
            raise SystemExit(f"the server ended with {process.wait()}")
        # what the server logs later must not fill the pipe
        threading.Thread(target=lambda: [print(line, end="", file=sys.stderr) for line in process.stderr]).start()
        yield Server(url.split()[-1].removesuffix("/v1"), process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def message(kind: str | None, content: bytes | None, text: str) -> list[dict[str, Any]]:
    """Messages of a question about a still or video, or of text alone."""
    if kind is None or content is None:
        return [{"role": "user", "content": text}]
    form = {"video": "video/mp4", "image": "image/png"}[kind]
    url = f"data:{form};base64,{base64.b64encode(content).decode()}"
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def mixed(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of mixed requests: of ten, six about the nine clips, two about clips never seen before, a still, a text.

    A trailing comment box makes a clip of other content of the same length in time and pixels.
    """
    draw = random.Random(seed)
    clips = [path.read_bytes() for path in sorted((data_folder() / "clips").glob("*.mp4"))]
    still = io.BytesIO()
    Image.fromarray(read_video(clips[0], 1).frames[0].permute(1, 2, 0).numpy()).save(still, "PNG")
    bodies = []
    for number in range(count):
        kind, content, question = "video", draw.choice(clips), draw.choice(QUESTIONS)
        if number % 10 in (6, 7):
            extra = draw.randbytes(16)
            content += (8 + len(extra)).to_bytes(4, "big") + b"free" + extra
        elif number % 10 == 8:
            kind, content = "image", still.getvalue()
        elif number % 10 == 9:
            kind, content, question = "text", None, "Say hello."
        body = {"model": "mini", "messages": message(None if kind == "text" else kind, content, question)}
        bodies.append(body | {"max_tokens": TOKENS, "stream": number % 2 == 0})
    draw.shuffle(bodies)
    return bodies


def ask(client: httpx.Client, body: dict[str, Any]) -> tuple[float, float | None]:
    """Send one request; return its seconds, and those to the first streamed text."""
    begin, first = time.perf_counter(), None
    if not body["stream"]:
        client.post(CHAT, json=body).raise_for_status()
        return time.perf_counter() - begin, None
    with client.stream("POST", CHAT, json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            choices = json.loads(data)["choices"]
            if first is None and choices and choices[0]["delta"].get("content"):
                first = time.perf_counter() - begin
    return time.perf_counter() - begin, first


def of_mixed_lengths(count: int) -> list[dict[str, Any]]:
    """Bodies of mixed requests with answers of 8 to 200 tokens, streamed; so hot that they do not end before."""
    draw = random.Random(3)
    answers = [{"max_tokens": draw.choice((8, 16, 64, 200)), "temperature": 2.0, "seed": n} for n in range(count)]
    return [body | {"stream": True} | answer for body, answer in zip(mixed(count), answers, strict=True)]


def load(clients: int, batch: int, bodies: list[dict[str, Any]], part: str = "load") -> dict[str, Any]:
    """Send requests by so many clients to a new server that answers so many at once."""
    count = len(bodies)
    with started("--batch-size", str(batch), "--threads", "1") as server:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            for body in mixed(10, seed=1):  # libraries come up
                ask(client, body | {"stream": False})
            before = client.get("/metrics").text
            memory, cpu, begin = server.memory, server.cpu, time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                found = list(pool.map(lambda body: ask(client, body), bodies))
            seconds, used = time.perf_counter() - begin, server.cpu - cpu
            after = client.get("/metrics").text
            grown = server.memory - memory
    times, firsts = [all_ for all_, _ in found], [first for _, first in found if first is not None]
    sizes, batches = (
        _metric(after, name) - _metric(before, name)
        for name in ("bt_adapter_batch_size_sum", "bt_adapter_batch_size_count")
    )
    row = {
        "part": part, "clients": clients, "batch_size": batch, "requests": count,
        "requests_per_s": count / seconds, "p50_s": median(times), "p95_s": quantiles(times, n=20)[-1],
        "first_text_p50_s": median(firsts), "cpu_s_per_request": used / count, "mean_batch": sizes / batches,
        "memory_grown_mib": grown,
    }  # fmt: skip
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def _metric(text: str, name: str) -> float:
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")))


def threads(count: int, waiting: str, requests: int) -> dict[str, Any]:
    """Ask one question after another of a server of so many threads."""
    with (
        started("--threads", str(count), waiting=waiting) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        bodies = mixed(requests + 1, seed=2)
        ask(client, bodies.pop() | {"stream": False})
        cpu = server.cpu
        times = [ask(client, body | {"stream": False})[0] for body in bodies]
        used = server.cpu - cpu
    load_average = round(os.getloadavg()[0], 1)
    return {
        "part": "threads", "threads": count, "waiting": waiting, "requests": requests, "p50_s": round(median(times), 3),
        "longest_s": round(max(times), 3), "cpu_s_per_request": round(used / requests, 3),
        "load_average": load_average, "cores": os.cpu_count(),
    }  # fmt: skip


def kill(clients: int = 4) -> dict[str, Any]:
    """Kill a server while it streams to one of several clients or more, and the others wait for their batch."""
    body = {"model": "mini", "messages": message(None, None, "Tell me a long story."), "max_tokens": 4000}
    streaming = threading.Event()

    def listen(url: str) -> str:
        try:
            with httpx.stream("POST", f"{url}{CHAT}", json=body | {"stream": True}, timeout=300) as answer:
                for number, line in enumerate(line for line in answer.iter_lines() if line):
                    if number == 2:
                        streaming.set()
                    if line == "data: [DONE]":
                        return "an end as if complete"
        except httpx.HTTPError as error:
            return type(error).__name__
        return "no error"

    with started("--threads", "1") as server, ThreadPoolExecutor(clients) as pool:
        heard = [pool.submit(listen, server.url) for _ in range(clients)]
        if not streaming.wait(300):
            raise SystemExit("no client heard anything in 300 seconds")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        told = {future.result() for future in heard}
        row = {"part": "kill", "clients": clients, "told": sorted(told), "processes_left": len(server.group)}
    return row | {"held": not told & {"an end as if complete", "no error"} and row["processes_left"] == 0}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the chosen parts and yield their rows."""
    if "threads" in options.only:
        for count, waiting in ((1, "PASSIVE"), (2, "PASSIVE"), (2, "ACTIVE")):
            yield threads(count, waiting, max(3, options.requests // 20))
    if "load" in options.only:
        for clients in options.clients:
            yield load(clients, options.batch_size, mixed(options.requests))
        yield load(max(options.clients), 1, mixed(options.requests))
    if "lengths" in options.only:
        bodies = of_mixed_lengths(max(20, options.requests // 3))
        yield load(max(options.clients), options.batch_size, bodies, "lengths")
    if "hostile" in options.only:
        from serve_hostile import hostile

        with started("--threads", "1", "--max-new-tokens", "1", "--cache-mb", "16") as server:
            yield hostile(server, options.hostile)
    if "kill" in options.only:
        yield kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a line for each row, and write the rows. Returns 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=200, help="requests of each row of the load")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--hostile", type=int, default=10_000, help="hostile requests")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "serve-cpu.json")
    options = parser.parse_args(arguments)
    about, rows = facts("cpu"), []
    kept = json.loads(options.out.read_text()) if options.out.exists() else []
    kept = [row for row in kept if row["part"] not in options.only]
    for row in run(options):
        rows.append(row | {"facts": about})
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write_json(options.out, kept + rows)
    return 0 if all(row.get("held", True) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
