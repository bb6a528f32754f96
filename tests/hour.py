"""Peak memory of answering about each of some videos, in processes forked from one that has imported everything.

``python tests/hour.py VIDEO ...`` prints, for each: frames, sets of tokens, bytes held before, bytes at the peak.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_attach import make_branch, make_chat
from test_chat import make_tokenizer

from bt_adapter.chat.attach import attach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.watch import Sampling, watch


def status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def answer(chat: VideoChat, path: str) -> None:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    seen = watch(chat, path, Sampling(fps=2))
    conversation = chat.converse()
    conversation.add(seen)
    conversation.ask("how is it moving ?", 8)
    print(seen.frames, seen.sets, before, status("VmHWM"), flush=True)


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    model = make_chat()
    chat = VideoChat(attach(model, make_branch(model)), make_tokenizer())
    for path in paths:
        child = os.fork()
        if not child:
            answer(chat, path)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main(sys.argv[1:])
