#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build with CUDA, run every test, then every benchmark.
#
#   bench/device.sh              writes under $OUT, or bench/results where OUT is not set
#
# Nothing is installed or fetched: it uses the packages of the Python it is given (PYTHON, default python3), which must
# have torch, and builds into bt_kernels/ with CMake. A failing step is reported and the next one runs; the exit status
# says whether all went well. A benchmark is a bench/*.py other than report.py; it gets OUT and writes its rows there.
#
# Seconds a step may take: BUILD_S (300), TEST_S (900), BENCH_S (300, each benchmark).
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/bench/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=()

# step NAME SECONDS COMMAND...: runs it with a time limit, the output to the screen and to $OUT/NAME.log
step() {
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
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

export PYTHON MAX_JOBS BT_CUDA_ARCHS
export -f build facts
step build "${BUILD_S:-300}" bash -uo pipefail -c build
step facts 120 bash -c facts
step tests "${TEST_S:-900}" "$PYTHON" -m pytest -p no:cacheprovider --continue-on-collection-errors \
  --junitxml "$OUT/tests.xml"
for bench in bench/*.py; do
  [ -e "$bench" ] || continue
  name=$(basename "$bench" .py)
  [ "$name" != report ] || continue
  step "bench-$name" "${BENCH_S:-300}" "$PYTHON" "$bench"
done

[ ${#failed[@]} = 0 ] && echo "all steps passed" || { echo "failed: ${failed[*]}"; exit 1; }
