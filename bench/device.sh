#!/usr/bin/env bash
# Make all measurements on a machine with an NVIDIA GPU in one call of at most 9 minutes, and pack them into one archive.
#
#   bench/device.sh              results in $OUT/device-results.tar.gz (OUT: bench/results if not set)
#   bench/device.sh --rehearse   the same parts at small shapes on a machine without a GPU: Triton's interpreter and the CPU
#
# Nothing is installed or fetched. It uses the packages of PYTHON (default python3), which must have torch, Triton and
# pytest, and builds into bt_kernels/ with CMake. Video decoding and the command line (av, tyro) are not used.
#
# Parts run in the order in which their results matter. Each has a time limit (at most LIMIT_S, if set) and gets no more
# than what is left of DEADLINE_S (default 525). A part that fails or is stopped stops no other, and after each the archive is packed anew,
# so that whatever ends the call leaves the results so far. The exit status tells whether all went well.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
REHEARSE=$([ "${1:-}" = --rehearse ] && echo yes)
archive=${OUT:-$PWD/bench/results}/device-results.tar.gz
export OUT=${RESULTS:-$PWD/build/device/results} # of the benchmarks; the archive holds all of it
export BUILD=$OUT.build
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
LARGEST_LOG=$((512 * 1024)) LARGEST_ARCHIVE=$((16 * 1024 * 1024 - 1024))
mkdir -p "$OUT" "$(dirname "$archive")"
rm -rf "${OUT:?}"/*
failed=()

# pack: the newest state of all results; of a long log its end. Results alone if that is too much.
pack() {
  local log
  for log in "$OUT"/*.log; do
    [ "$(stat -c %s "$log")" -le "$LARGEST_LOG" ] || { tail -c "$LARGEST_LOG" "$log" > "$log.end" && mv "$log.end" "$log"; }
  done
  tar -czf "$archive.writing" -C "$OUT" . || return
  if [ "$(stat -c %s "$archive.writing")" -gt "$LARGEST_ARCHIVE" ]; then
    (cd "$OUT" && tar -czf "$archive.writing" -- *.json summary.txt)
  fi
  mv "$archive.writing" "$archive"
}

# part NAME SECONDS COMMAND...: run it with a time limit, its output in $OUT/NAME.log, and pack.
part() {
  local name=$1 limit=$2 began=$SECONDS status left=$((${DEADLINE_S:-525} - SECONDS))
  shift 2
  if [ "$left" -lt 10 ]; then
    failed+=("$name: no time left") && echo "== $name: no time left" | tee -a "$OUT/summary.txt"
    return
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  [ "${LIMIT_S:-$limit}" -lt "$limit" ] && limit=$LIMIT_S
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 < /dev/null
  status=$?
  [ "$status" = 0 ] || failed+=("$name: $status")
  [ "$status" = 124 ] || [ "$status" = 137 ] && echo "stopped after $limit s" >> "$OUT/$name.log"
  tail -n 12 "$OUT/$name.log" | cut -c -200
  echo "== $name: exit status $status, $((SECONDS - began)) s, $SECONDS s since the beginning" | tee -a "$OUT/summary.txt"
  pack
}

build() {
  local cmake python generator=() options=(-DBT_CUDA=1 -DBT_PTXAS_VERBOSE=ON -DCMAKE_INSTALL_PREFIX="$PWD")
  python=$("$PYTHON" -c 'import sys; print(sys.executable)') || return
  cmake=$(command -v cmake) || cmake=$("$PYTHON" -c 'import cmake; print(cmake.CMAKE_BIN_DIR + "/cmake")') || return
  command -v ninja > /dev/null && generator=(-G Ninja)
  if [ -n "$REHEARSE" ]; then # configured, and what would be compiled is listed
    "$cmake" --fresh -S . -B "$BUILD" "${generator[@]}" -DPython_EXECUTABLE="$python" -DBT_CUDA=0 &&
      "$cmake" --build "$BUILD" -- -n
    return
  fi
  # Code for the device at hand alone, unless told otherwise: a third of the time.
  local archs=${BT_CUDA_ARCHS:-}
  [ -n "$archs" ] || archs=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  "$cmake" --fresh -S . -B "$BUILD" "${generator[@]}" -DPython_EXECUTABLE="$python" "${options[@]}" \
    -DBT_CUDA_ARCHS="$archs" &&
    "$cmake" --build "$BUILD" --parallel "${MAX_JOBS:-$(nproc)}" &&
    "$cmake" --install "$BUILD"
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  nvcc --version | tail -n 2
  "$PYTHON" -m bt_kernels
  [ -n "$REHEARSE" ] || nvidia-smi > /dev/null
}

# Out-of-bounds accesses and races, on one case of each kernel; torch's allocator would hide them in its blocks.
sanitize() {
  local tool check ids=() pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu or not gpu")
  local on=cuda test="tests/test_conformance.py::test_equals_dense"
  [ -n "$REHEARSE" ] && on=cpu
  for case in temporal_attention-triton-$on-heads64 spatial_attention-triton-$on-heads64 gather_merge-triton-$on-padded \
    gather_embed-triton-$on-padded pool_video_tokens-triton-$on-padded alignment_loss-triton-$on-tube70 \
    linear_add-triton-$on-heads64 mlp-triton-$on-heads64 temporal_attention-cuda-cuda-heads64 gather_merge-cuda-cuda-padded; do
    ids+=("$test[$case-bfloat16]")
  done
  [ -n "$REHEARSE" ] && { "${pytest[@]}" --collect-only "${ids[@]}"; return; }
  tool=$(command -v compute-sanitizer) || tool=/usr/local/cuda/bin/compute-sanitizer
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for check in memcheck racecheck; do
    "$tool" --tool $check --error-exitcode 9 "${pytest[@]}" "${ids[@]}" || return
  done
}

export PYTHON REHEARSE MAX_JOBS BT_CUDA_ARCHS
export -f build facts sanitize
tests=("$PYTHON" -m pytest -p no:cacheprovider -q)
workers=()
"$PYTHON" -c "import xdist, pytest_timeout" 2> /dev/null &&
  workers=(-n "$(($(nproc) < 16 ? $(nproc) : 16))" --dist worksteal --timeout 60)
# Those with tests on a GPU that need no video decoder.
gpu_tests=(tests/test_conformance.py tests/test_conformance_quantize.py tests/test_gpu_only.py tests/test_compile.py tests/test_native.py tests/test_tower.py
  tests/test_visible.py)
# Attention at 64-wide heads, which all its kernels take; of the others two forms; and the baseline of bench/step.py.
forms="equals_dense and (triton or cuda-cuda) and attention and heads64 and not float64"
forms+=" or equals_dense and (triton or cuda-cuda) and bfloat16 and not attention and (tube70 or padded-)"
forms+=" or baseline_computes"
conformance=$OUT/conformance.xml
if [ -n "$REHEARSE" ]; then
  unset TRITON_INTERPRET # which tests set themselves; kernels in the interpreter are not timed
  workers=()
  forms="equals_dense and temporal_attention and triton and heads64 and bfloat16 or baseline_computes and eager"
  forms+=" or equals_dense and (linear_add-triton or mlp-triton) and tube70 and bfloat16"
  forms+=" or equals_dense and cpu-cpu and (heads64 or tube70) and float32"
  kernels=(--small --seconds 0.01) cases=(--small --no-peaks --seconds 0.01 --rounds 1 --frames 4 --mask-ratio 0.5)
  cases+=(--batch-size 2) last=(none) rest=(--collect-only)
else
  kernels=(--named) cases=(--batch-size 52) rest=()
  last=(none mlp eager checkpoint layer "mlp own" compiled "compiled tower" graphs fp8)
fi

part build 110 bash -uo pipefail -c build
part facts 30 bash -c facts
part conformance 110 "${tests[@]}" "${workers[@]}" -m "gpu or not gpu" -k "$forms" --junitxml "$conformance" \
  tests/test_conformance.py tests/test_conformance_quantize.py tests/test_step.py
part kernels-attention 60 "$PYTHON" bench/kernels.py "${kernels[@]}" --conformance "$conformance" \
  --op temporal_attention spatial_attention
part kernels-rows 75 "$PYTHON" bench/kernels.py "${kernels[@]}" --conformance "$conformance" \
  --op gather_embed gather_merge pool_video_tokens alignment_loss linear_add mlp residual_norm bias_gelu quantize_rows
part step 100 "$PYTHON" bench/step.py --part step "${cases[@]}" --only eager sdpa none mlp --conformance "$conformance"
part sanitize 75 bash -uo pipefail -c sanitize
part gpu-tests 120 "${tests[@]}" "${workers[@]}" -m gpu "${rest[@]}" --junitxml "$OUT/gpu-tests.xml" "${gpu_tests[@]}"
part step-compiled 120 "$PYTHON" bench/step.py --part step "${cases[@]}" --only "${last[@]}" --conformance "$conformance"
if [ -z "$REHEARSE" ]; then
  part step-others 90 "$PYTHON" bench/step.py --only eager sdpa none mlp --conformance "$conformance"
  part kernels-others 60 "$PYTHON" bench/kernels.py --others --conformance "$conformance"
  part largest-batch 60 "$PYTHON" bench/step.py --fits --conformance "$conformance"
fi

pack
if [ ${#failed[@]} = 0 ]; then echo "all parts passed: $archive"; else
  echo "failed: $(IFS=,; echo "${failed[*]}"); results: $archive"
  exit 1
fi
