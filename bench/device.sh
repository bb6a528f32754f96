#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, within DEADLINE_S seconds (default 580): build with CUDA, run the GPU tests, the
# benchmarks, compute-sanitizer on a small case of each kernel and the resource report; then the rest of the tests. A
# step gets what time is left at most, and one that there is no time for is named at the end.
#
#   bench/device.sh              writes under $OUT, or bench/results where OUT is not set
#
# Nothing is installed or fetched: it uses the packages of the Python it is given (PYTHON, default python3), which must
# have torch, and builds into bt_kernels/ with CMake. A failing step is reported and the next one runs; the exit status
# says whether all went well. Benchmarks write their rows to OUT.
#
# Seconds a step may take: BUILD_S (120), TEST_S (150), BENCH_S (90), STEP_S (90), SANITIZE_S (45), RESOURCES_S (40),
# PRETRAIN_S (60), CHAT_S (60), FITS_S (60), REST_S (400); 0 leaves a step out.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/bench/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=()

# step NAME SECONDS COMMAND...: runs it with a time limit, the output to the screen and to $OUT/NAME.log
step() {
  local name=$1 limit=$2 began=$SECONDS status=0 left=$((${DEADLINE_S:-580} - SECONDS))
  shift 2
  [ "$limit" = 0 ] && return
  [ "$left" -lt 15 ] && failed+=("$name (no time left)") && return
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 124 ] && echo "$name: stopped after $limit s" | tee -a "$OUT/$name.log"
  [ "$status" = 0 ] || failed+=("$name ($status)")
  echo "== $name: exit status $status, $((SECONDS - began)) s"
}

build() {
  local cmake python generator=()
  python=$("$PYTHON" -c 'import sys; print(sys.executable)') || return
  cmake=$(command -v cmake) || cmake=$("$PYTHON" -c 'import cmake; print(cmake.CMAKE_BIN_DIR + "/cmake")') || return
  command -v ninja > /dev/null && generator=(-G Ninja)
  local where=build/device archs=${BT_CUDA_ARCHS:-}
  # Only the device at hand, unless told otherwise: a third of the time.
  [ -n "$archs" ] || archs=$("$PYTHON" -c 'import torch; m, n = torch.cuda.get_device_capability()
print(f"{m}{n}" + ("a" if m in (9, 10, 12) else ""))') || return
  "$cmake" --fresh -S . -B "$where" "${generator[@]}" -DPython_EXECUTABLE="$python" \
    -DCMAKE_INSTALL_PREFIX="$PWD" -DBT_CUDA=1 -DBT_CUDA_ARCHS="$archs" -DBT_PTXAS_VERBOSE=ON &&
    "$cmake" --build "$where" --parallel "${MAX_JOBS:-$(nproc)}" &&
    "$cmake" --install "$where"
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  nvcc --version | tail -n 2
  "$PYTHON" -m bt_kernels
}

# Out-of-bounds accesses and races, on one regular and one ragged form of each kernel; heads64 because attention in CUDA
# C++ takes no narrow heads.
sanitize() {
  local small="test_equals_dense and (cuda-tube70 or cuda-padded or temporal_attention-cuda-cuda-heads64)"
  small="$small and (float32 or bfloat16) and not reference"
  local tool=compute-sanitizer
  command -v $tool > /dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
  for check in memcheck racecheck; do
    "$tool" --tool $check --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_conformance.py \
      -k "$small" || return
  done
}

export PYTHON MAX_JOBS BT_CUDA_ARCHS
export -f build facts sanitize
tests="$PYTHON -m pytest -p no:cacheprovider --continue-on-collection-errors"
# Compiling the kernels is most of the first run, and each process compiles its own.
"$PYTHON" -c "import xdist" 2> /dev/null && tests+=" -n $(($(nproc) < 8 ? $(nproc) : 8)) --dist worksteal"
step build "${BUILD_S:-120}" bash -uo pipefail -c build
step facts 60 bash -c facts
step gpu-tests "${TEST_S:-150}" $tests -m gpu --junitxml "$OUT/gpu-tests.xml"
step bench-kernels "${BENCH_S:-90}" "$PYTHON" bench/kernels.py --minutes 1.2
step bench-step "${STEP_S:-90}" "$PYTHON" bench/step.py --minutes 1
step sanitize "${SANITIZE_S:-45}" bash -uo pipefail -c sanitize
step resources "${RESOURCES_S:-40}" "$PYTHON" bench/resources.py --quick --json "$OUT/resources.json"
step bench-pretrain "${PRETRAIN_S:-60}" "$PYTHON" bench/pretrain.py
step bench-chat "${CHAT_S:-60}" "$PYTHON" bench/chat.py
step largest-batch "${FITS_S:-60}" "$PYTHON" bench/step.py --fits
step rest-of-tests "${REST_S:-400}" $tests -m "not gpu and not full" --junitxml "$OUT/tests.xml"

[ ${#failed[@]} = 0 ] && echo "all steps passed" || { echo "failed: ${failed[*]}"; exit 1; }
